"""Families of models that both the `gguf` library and transformers' reader of GGUF know: their keys, and what llama.cpp
wants arranged otherwise."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxin.errors import ConfigError, shown


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` stand in a GGUF file."""

    architecture: str
    """The file's `general.architecture`."""
    model_class: str
    """The class with the language head."""
    rotary: bool = True
    """Whether positions are rotations, norms are RMSNorms, and heads may share keys and values."""
    interleaved: bool = False
    """Whether llama.cpp rotates neighbouring pairs of a head's units, where transformers rotates the halves: rows of
    queries and keys lie in another order then."""

    def describe(self, writer: Any, config: PreTrainedConfig) -> None:
        """Add the keys of `config` to a GGUFWriter."""
        heads = config.num_attention_heads
        writer.add_context_length(config.max_position_embeddings)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_head_count(heads)
        writer.add_vocab_size(config.vocab_size)
        if not self.rotary:
            writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
            return
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])

    def tensors(self, model: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
        """Each tensor to write: its name in the file, its name in the model, and its values in the shape that they have
        in the file, in the model's type; rows are arranged when they are written. A tied head is written once, as the
        embedding.

        Raises:
            ConfigError: one has no name in a file.
        """
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], model.config.num_hidden_layers)
        for key, value in model.named_parameters():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ConfigError(f"The model has no GGUF form: the tensor {key} has no name in a file of this family.")
            module = model.get_submodule(key.rpartition(".")[0])
            yield name, key, value.detach().T if isinstance(module, Conv1D) and value.dim() == 2 else value.detach()

    def arranged(self, key: str, value: Tensor, config: PreTrainedConfig) -> Tensor:
        """`value`, the tensor called `key`, with its rows in the order of the file."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(key.split(".")[-2])
        if not self.interleaved or heads is None:
            return value
        count = getattr(config, heads)
        rows = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
        return rows.swapaxes(1, 2).reshape(value.shape)


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", rotary=False),
}

_WITHOUT_EFFECT = {
    # Where it is from, what it was saved with, what it is told to return.
    *("_name_or_path", "architectures", "dtype", "transformers_version", "return_dict", "use_cache"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder"),
    # Labels of other heads, and what new weights are drawn with.
    *("id2label", "label2id", "problem_type", "initializer_range", "pretraining_tp"),
    # How attention is summed, not what it computes; a window that `sliding_window` and `layer_types` say whether it is.
    *("reorder_and_upcast_attn", "max_window_layers"),
    # Said by the tokenizer's keys, and by whether the file has a head.
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
}
"""Fields that a model computes the same without."""
_TRAINING = ("dropout", "pdrop", "summary_")
"""In names of fields that count in training, or in heads for other tasks."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of `config`; ConfigError where it has none."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"A {config.model_type} has no GGUF form here: {', '.join(FAMILIES)} have one that the gguf library writes "
            "and transformers reads. Others: llama.cpp's convert_hf_to_gguf.py, where it knows the architecture."
        )
    return family


def not_carried(config: PreTrainedConfig, read: PreTrainedConfig) -> Iterator[str]:
    """What `read`, the config that transformers finds in a GGUF file, says otherwise than `config`, field by field."""
    ours, theirs = config.to_dict(), read.to_dict()
    if ours.get("n_inner") == 4 * config.hidden_size:
        ours["n_inner"] = None  # GPT-2's way to say the same
    for field in config.__class__().to_dict():
        if field in _WITHOUT_EFFECT or any(part in field for part in _TRAINING):
            continue
        if not _same(ours.get(field), theirs.get(field)):
            yield f"{field} is {shown(ours.get(field))}, and would be read as {shown(theirs.get(field))}"


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, numbers to the precision of float32."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
