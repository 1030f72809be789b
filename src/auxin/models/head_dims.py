"""Whether an architecture's code takes the head dimension from a config whose class does not list it.

Many of transformers' attentions read `getattr(config, "head_dim", hidden_size // num_attention_heads)` although their
config has no such field (Qwen2, OLMo, Granite): written into the config it is stored, loaded and obeyed.
"""

import torch
from transformers import AutoModel, PreTrainedConfig

from auxin.foreign import offline

HEAD_DIM = "head_dim"
"""What they call it."""
_OUTPUTS = ("self_attn.o_proj.weight", "self_attn.dense.weight", "attention.o_proj.weight")
_KNOWN: dict[tuple[type[PreTrainedConfig], frozenset[str]], bool] = {}


def reads_unlisted_head_dim(config: PreTrainedConfig) -> bool:
    """Whether models of such a config have heads of the dimension that is written there as `head_dim`, although its
    class does not list it.

    A model is built on the meta device with heads of twice the usual dimension: the outputs of its attentions must be
    made for these and, where there are some, the rotary frequencies and the norms on queries and keys, too (OLMoE's
    stay as long as the residual). That is done once for a class and the switches of the config.

    Args:
        config: makes a model. A class that lists `head_dim`, or that transformers has no model for, does not count.
    """
    kind = type(config)
    if hasattr(kind, HEAD_DIM) or kind not in AutoModel._model_mapping:
        return False
    key = kind, frozenset(name for name, value in vars(config).items() if value is True)
    if key not in _KNOWN:
        hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        known = isinstance(hidden, int) and isinstance(heads, int) and _follows(config, 2 * (hidden // heads))
        _KNOWN[key] = known
    return _KNOWN[key]


def _follows(config: PreTrainedConfig, doubled: int) -> bool:
    values = {key: value for key, value in config.to_dict().items() if key != HEAD_DIM}
    usual = _sizes(type(config).from_dict(values))
    after = _sizes(type(config).from_dict({**values, HEAD_DIM: doubled}))
    # A share of the dimensions that is rotated may be rounded.
    moved = all(after[name] != size if "inv_freq" in name else after[name] == 2 * size for name, size in usual.items())
    return moved and any(name.endswith(_OUTPUTS) for name in usual)


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    """How many entries output matrices of attentions have, norms in these, and tables of rotary frequencies."""
    with torch.device("meta"), offline():
        model = AutoModel.from_config(config, trust_remote_code=False)
    of_heads = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.endswith(_OUTPUTS) or (".self_attn." in name and "norm" in name.rpartition("self_attn")[2])
    ]
    frequencies = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    return {name: tensor.numel() for name, tensor in (*of_heads, *frequencies)}
