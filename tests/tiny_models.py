"""Tiny models of every known architecture, with nothing trivial in them: random gains, biases and epsilon 1e-2."""

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import tiny_decoders
import tiny_encoders
import tiny_gpts
import tiny_seq2seq
import tiny_vision
from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM
from outputs import output
from tiny_decoders import COMMON, EPSILON, VOCABULARY
from tiny_seq2seq import T5

LENGTH = 7

_NEOX = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
_ENCODER = {key: value for key, value in _NEOX.items() if not key.startswith(("bos", "eos", "pad"))}

MODELS: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {**COMMON, "rms_norm_eps": EPSILON, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**COMMON, "rms_norm_eps": EPSILON}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**COMMON, "rms_norm_eps": EPSILON, "head_dim": 6}),
    "olmo": (OlmoForCausalLM, OlmoConfig, COMMON),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {**COMMON, "rms_norm_eps": EPSILON}),
    # Embeddings times the root of the hidden size (16, so that it is a whole number), gains stored less one.
    "gemma": (GemmaForCausalLM, GemmaConfig, {**COMMON, "rms_norm_eps": EPSILON, "head_dim": 4}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 12,
            "n_positions": 32,
            "layer_norm_epsilon": EPSILON,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {
            **_NEOX,
            "hidden_size": 32,
            "layer_norm_eps": EPSILON,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        T5,
    ),
    "bert": (
        BertForMaskedLM,
        BertConfig,
        {
            **_ENCODER,
            "layer_norm_eps": EPSILON,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": None,
        },
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig,
        {
            **{key: value for key, value in _ENCODER.items() if key not in ("vocab_size", "max_position_embeddings")},
            "layer_norm_eps": EPSILON,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 3,
        },
    ),
    "tokenformer": (
        TokenFormerForCausalLM,
        TokenFormerConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "qkv_tokens": 10,
            "proj_tokens": 9,
            "ffn_tokens": 14,
            "layer_norm_eps": EPSILON,
            "max_position_embeddings": 32,
            # A new model's layer in one slot, the released models' in the others.
            "score_function": "l2_norm_gelu",
            "proj_score_function": "gelu",
            "partial_rotary_factor": 0.5,
        },
    ),
}
FAMILIES = [family for family in MODELS if family != "gemma"]
"""The architectures with which every method is tested in every way, by their model types."""
GROUPS = (tiny_decoders, tiny_gpts, tiny_encoders, tiny_seq2seq, tiny_vision)
"""The further ones, by kind: MODELS as above, and INPUTS, what makes inputs (model, batch, length, generator) of other
kinds than token ids, by model type."""
FURTHER = {family: made for group in GROUPS for family, made in group.MODELS.items()}
"""All of them by name: the model type, with a word behind it where there are several of one."""
MODELS |= FURTHER
INPUTS = {model_type: make for group in GROUPS for model_type, make in group.INPUTS.items()}
ALWAYS_TIED = ("t5",)


def tiny(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float64, head: str = "", **config: Any
) -> PreTrainedModel:
    """A tiny model of `family` in evaluation mode, weights normal with standard deviation 0.5, gains around 1.

    Args:
        family: one of `MODELS`.
        seed: of the weights.
        dtype: of the weights.
        head: the class of transformers, where it is another than the usual one.
        config: values of its config that differ from the usual ones, e.g. tie_word_embeddings=True.
    """
    model_class, config_class, values = MODELS[family]
    model_class = getattr(transformers, head) if head else model_class
    return filled(model_class(config_class(**{**values, **config})), seed, dtype)


def filled(model: PreTrainedModel, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """`model` with the weights of a tiny one; see `tiny`."""
    generator = torch.Generator().manual_seed(seed)
    made = model._keys_to_ignore_on_save or ()  # what the model makes again instead of saving it
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("bias")]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *biases]:
            if name in made:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.5 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):  # of batch norms
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(0.5 * noise if name.endswith("mean") else 1 + noise.square())
    if dtype == torch.float64 and any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the others know no float64
    return model.to(dtype).eval()


def fresh_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A tiny Llama as transformers makes it, to be trained: float32, in training mode, no biases, the usual epsilon.

    Args:
        seed: of the weights.
        config: values of its config that differ from the usual sizes.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**COMMON, **config}))


def inputs(model: PreTrainedModel, seed: int = 1, batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """Inputs of `model`'s forward, without labels; the same ones for a model whose vocabulary has grown."""
    generator = torch.Generator().manual_seed(seed)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # below PEFT's adapters
    config: Any = model.config
    if config.model_type in INPUTS:
        return INPUTS[config.model_type](model, batch, length, generator)
    if config.model_type == "vit":
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)}

    def ids(size: int) -> Tensor:
        return torch.randint(min(config.vocab_size, VOCABULARY), (batch, size), generator=generator)

    if config.model_type == "t5":
        return {"input_ids": ids(length), "decoder_input_ids": ids(length - 2)}
    if config.model_type == "bert":
        return {"input_ids": ids(length), "token_type_ids": torch.randint(2, (batch, length), generator=generator)}
    return {"input_ids": ids(length)}


def labels(model: PreTrainedModel, seed: int = 2, batch: int = 2, length: int = LENGTH) -> Tensor:
    """Labels that fit `inputs`."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    if config.model_type == "vit":
        return torch.randint(config.num_labels, (batch,), generator=generator)
    size = length - 2 if config.model_type == "t5" else length
    return torch.randint(min(config.vocab_size, VOCABULARY), (batch, size), generator=generator)


class InDouble(TorchFunctionMode):
    """Within the context a float64 model computes in float64 throughout: norms and softmax that go to float32 on the
    way, whatever the model's type, stay. For tests that look for errors below float32's rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if double and (func is torch.Tensor.float or (func is torch.Tensor.type and torch.float32 in args)):
            return args[0]
        if double and func is torch.Tensor.to:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if double and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def logits(model: PreTrainedModel, seed: int = 1) -> Tensor:
    """The output on `inputs`, in the model's type throughout."""
    with torch.no_grad(), InDouble():
        return output(model(**inputs(model, seed)))


def change(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|."""
    return ((after - before).abs().max() / before.abs().max()).item()
