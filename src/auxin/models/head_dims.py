"""Whether an architecture's code takes the head dimension from a config whose class does not list it.

Many of transformers' attentions read `getattr(config, "head_dim", hidden_size // num_attention_heads)` although their
config has no such field (Qwen2, OLMo, Granite): written into the config it is stored, loaded and obeyed.
"""

import torch
from transformers import AutoModel, PreTrainedConfig

from auxin.foreign import offline

HEAD_DIM = "head_dim"
"""What they call it."""
_KNOWN: dict[type[PreTrainedConfig], bool] = {}


def reads_unlisted_head_dim(config: PreTrainedConfig) -> bool:
    """Whether models of configs of this class have heads of the dimension that is written there as `head_dim`, although
    the class does not list it.

    A model is built on the meta device with heads of twice the usual dimension: its attentions must be made for these
    and, where they are rotary, the frequencies too. That is done once for a class.

    Args:
        config: one of the class, which makes a model. A class that lists `head_dim`, or that transformers has no model
            for, does not count.
    """
    kind = type(config)
    if hasattr(kind, HEAD_DIM) or kind not in AutoModel._model_mapping:
        return False
    if kind not in _KNOWN:
        hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        known = isinstance(hidden, int) and isinstance(heads, int)
        _KNOWN[kind] = known and _follows(config, 2 * (hidden // heads))
    return _KNOWN[kind]


def _follows(config: PreTrainedConfig, doubled: int) -> bool:
    values = {key: value for key, value in config.to_dict().items() if key != HEAD_DIM}
    attended, frequencies = _shapes(type(config).from_dict(values))
    attended_after, frequencies_after = _shapes(type(config).from_dict({**values, HEAD_DIM: doubled}))
    twice = bool(attended) and attended_after == [2 * size for size in attended]
    return twice and (not frequencies or frequencies_after != frequencies)


def _shapes(config: PreTrainedConfig) -> tuple[list[int], list[int]]:
    """How many inputs the output matrices of attentions take, and how many rotary frequencies there are."""
    with torch.device("meta"), offline():
        model = AutoModel.from_config(config, trust_remote_code=False)
    outputs = ("self_attn.o_proj.weight", "self_attn.dense.weight")
    inputs = [parameter.shape[1] for name, parameter in model.named_parameters() if name.endswith(outputs)]
    return inputs, [buffer.shape[0] for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
