"""Tiny models of architectures that say something of their layers by number: four layers of all kinds, windows shorter
than the inputs."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 32
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
WINDOWS = {"sliding_window": 3, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_RMS = {**_GROUPED, "rms_norm_eps": 1e-2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
_GROUPS = {"n_group": 1, "topk_group": 1}
_LOW_RANK = {
    **_SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_LINEAR_HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VALUES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_RMS, **_EXPERTS, "decoder_sparse_step": 2}),
    "dots1": ("Dots1ForCausalLM", "Dots1Config", {**_RMS, **_ROUTED, **_GROUPS, **WINDOWS, "first_k_dense_replace": 1}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_LOW_RANK, **_ROUTED, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**_RMS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_RMS,
            "head_dim": 8,
            "intermediate_size_mlp": 20,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 1, 1, 0],
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_RMS,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaForCausalLM", "BambaConfig", {**_RMS, **_MAMBA, "attn_layer_indices": [1]}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_RMS,
            **_EXPERTS,
            **_LINEAR_HEADS,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": [LINEAR, FULL, LINEAR, FULL],
            "mlp_only_layers": [1],
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **{key: value for key, value in _RMS.items() if key != "max_position_embeddings"},
            "head_dim": 8,
            "lru_width": 32,
            "attention_window_size": 4,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 3,
            "max_position_embeddings": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "minicpm3": ("MiniCPM3ForCausalLM", "MiniCPM3Config", {**_LOW_RANK, "scale_depth": 1.4}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**_GROUPED, "layer_types": ["conv", FULL, "conv", FULL]}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_RMS, **WINDOWS, "head_dim": 8}),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_RMS,
            **WINDOWS,
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
        },
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_SIZES,
            "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "use_shared_attention_adapter": True,
            "adapter_rank": 4,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**_SIZES, "pad_token_id": 2}),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_SIZES, "embedding_size": 16}),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_SIZES, "pad_token_id": 2, "cls_token_id": 0, "sep_token_id": 1, "local_attention": 4},
    ),
    "classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**_RMS, "pad_token_id": 2, "num_labels": 3}),
}
_TEXT = {key: value for key, value in _RMS.items() if key != "pad_token_id"}
_IMAGES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}


def layered(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A tiny model of an architecture, weights and gains far from their initial values, in evaluation mode."""
    model_class, config_class, values = VALUES[name]
    return _filled(
        getattr(transformers, model_class), getattr(transformers, config_class)(**{**values, **changes}), dtype
    )


def llava(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Images and text: the stacks are counted by configs within the model's."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.CLIPVisionConfig(**_IMAGES, image_size=16, patch_size=8),
        image_token_id=VOCABULARY - 1,
    )
    return _filled(transformers.LlavaForConditionalGeneration, config, dtype)


def pair(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """An encoder and a decoder of two architectures."""
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**{**_SIZES, "pad_token_id": 0}),
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=4,
            n_head=4,
            add_cross_attention=True,
            bos_token_id=0,
            eos_token_id=1,
        ),
    )
    return _filled(transformers.EncoderDecoderModel, config, dtype)


def _filled(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + noise if parameter.dim() == 1 and name.endswith("weight") else noise)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def ids(model: PreTrainedModel) -> dict[str, Tensor]:
    """Token ids, longer than the windows."""
    tokens = torch.randint(3, VOCABULARY - 1, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}


def logits(model: PreTrainedModel) -> Tensor:
    """Without a cache, so that no layer reads its number."""
    with torch.no_grad():
        return model(**ids(model), use_cache=False).logits


def moved(model: PreTrainedModel, path: str, order: list[int], said: dict[str, Any]) -> PreTrainedModel:
    """A copy of `model` whose very layers stand in another order.

    Args:
        model: the model, which stays as it is.
        path: of its stack.
        order: the old layer that each new one is.
        said: what the model reads from its config when it runs.
    """
    model = copy.deepcopy(model)
    layers = model.get_submodule(path)
    model.set_submodule(path, nn.ModuleList([copy.deepcopy(layers[old]) for old in order]))
    configs = {
        id(config): config
        for m in model.modules()
        if isinstance(config := getattr(m, "config", None), PreTrainedConfig)
    }
    for config in configs.values():
        for key, value in said.items():
            if key in vars(config) and isinstance(vars(config)[key], type(value)):
                setattr(config, key, value)
    return model
