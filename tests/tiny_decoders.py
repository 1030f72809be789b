"""Configs of tiny decoders of the architectures that name their modules as Llama does, with what is peculiar to each:
windows shorter than the inputs, a head dimension of its own, layers of every kind, multipliers that are not 1."""

from typing import Any

import transformers
from transformers import PreTrainedModel

Made = tuple[type[PreTrainedModel], type, dict[str, Any]]

TITLE = "Decoders with the names of Llama's modules"
VOCABULARY = 19
WINDOW = 3
EPSILON = 1e-2
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
"""Sizes of a tiny decoder."""
_RMS = {**COMMON, "rms_norm_eps": EPSILON}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
}


def rope(share: float, **more: Any) -> dict[str, Any]:
    """Rotary embeddings of a share of the head dimension."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share, **more}}


VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {**_RMS, "head_dim": 6, "sliding_window": WINDOW}),
    "ministral": ("Ministral", {**_RMS, "head_dim": 6, **_WINDOWS}),
    "mixtral": ("Mixtral", {**_RMS, **_EXPERTS, "sliding_window": WINDOW}),
    "phi": ("Phi", {**COMMON, "layer_norm_eps": EPSILON, "hidden_size": 32, "qk_layernorm": True, **rope(0.5)}),
    "phi3": ("Phi3", {**_RMS, "hidden_size": 32, "sliding_window": WINDOW, **rope(0.5)}),
    "gemma2": (
        "Gemma2",
        {**_RMS, **_WINDOWS, "head_dim": 6, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 5.0},
    ),
    "gemma3_text": ("Gemma3", {**_RMS, **_WINDOWS, "head_dim": 6, "query_pre_attn_scalar": 9}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_RMS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 10,
            "shared_expert_intermediate_size": 14,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_RMS, "head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10},
    ),
    "olmo3": ("Olmo3", {**_RMS, **_WINDOWS}),
    "olmoe": ("Olmoe", {**_RMS, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("Granite", {**_RMS, **_MULTIPLIERS}),
    "granitemoe": ("GraniteMoe", {**_RMS, **_MULTIPLIERS, **_EXPERTS}),
    "cohere": ("Cohere", {**COMMON, "layer_norm_eps": EPSILON, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**COMMON, **_WINDOWS, "layer_norm_eps": EPSILON, "head_dim": 6}),
    "smollm3": ("SmolLM3", {**_RMS, "no_rope_layers": [1, 0]}),
    "stablelm": (
        "StableLm",
        {**COMMON, "layer_norm_eps": EPSILON, "hidden_size": 32, "use_qkv_bias": True, **rope(0.5)},
    ),
    "starcoder2": ("Starcoder2", {**COMMON, "norm_epsilon": EPSILON, "sliding_window": WINDOW}),
    "glm": ("Glm", {**_RMS, "head_dim": 8, **rope(0.5)}),
    "glm4": ("Glm4", {**_RMS, "head_dim": 8, **rope(0.5)}),
    "exaone4": ("Exaone4", {**_RMS, **_WINDOWS}),
    "gpt_oss": ("GptOss", {**_RMS, **_WINDOWS, **_EXPERTS, "head_dim": 6, **rope(1.0)}),
}
"""By model type: what the names of its classes begin with, and the values of its config."""


def made(name: str, values: dict[str, Any]) -> Made:
    """Classes of model and config, and the values."""
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    return getattr(transformers, f"{name}ForCausalLM"), config, values


HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama_without_head": ("LlamaModel", "LlamaConfig", {**_RMS}),
    "llama_for_texts": ("LlamaForSequenceClassification", "LlamaConfig", {**_RMS, "pad_token_id": 2}),
    "llama_for_tokens": ("LlamaForTokenClassification", "LlamaConfig", {**_RMS}),
    "llama_for_answers": ("LlamaForQuestionAnswering", "LlamaConfig", {**_RMS}),
    "mixtral_without_head": ("MixtralModel", "MixtralConfig", {**_RMS, **_EXPERTS}),
    "gemma2_without_head": ("Gemma2Model", "Gemma2Config", {**_RMS, **_WINDOWS, "head_dim": 6}),
    "qwen3_for_texts": ("Qwen3ForSequenceClassification", "Qwen3Config", {**_RMS, "pad_token_id": 2}),
}
"""Models without a head, and with others than the language model's."""
MODELS: dict[str, Made] = {family: made(*own) for family, own in VALUES.items()}
MODELS |= {
    name: (getattr(transformers, cls), getattr(transformers, config), own) for name, (cls, config, own) in HEADS.items()
}
"""Model class, config class and values of the config, by name."""
INPUTS: dict[str, Any] = {}
