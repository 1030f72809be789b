"""Configs of tiny decoders of the families around GPT: fused queries, keys and values in several layouts, ALiBi, layers
with local attention, embeddings of another width; and of further decoders with Llama's names, with low-rank attention
or shared experts."""

from typing import Any

from tiny_decoders import COMMON, EPSILON, WINDOW, Made, made, rope

TITLE = "Decoders around GPT, and with low-rank attention or shared experts"
_RMS = {**COMMON, "rms_norm_eps": EPSILON}
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_TOKENS = {key: COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
_PLAIN = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
_FALCON = {
    **{key: value for key, value in _PLAIN.items() if key != "intermediate_size"},
    **_NO_DROPOUT,
    "ffn_hidden_size": 12,
    "layer_norm_epsilon": EPSILON,
    "bias": True,
}
_GPT = {
    **_TOKENS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 12,
    "n_positions": 32,
    "layer_norm_epsilon": EPSILON,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
_OPT = {
    **{key: value for key, value in _PLAIN.items() if key != "intermediate_size"},
    "ffn_dim": 12,
    "dropout": 0.0,
    "pad_token_id": 1,
    "word_embed_proj_dim": 16,
}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 2}
_GROUPS = {
    **_EXPERTS,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
_LATENT = {
    **_RMS,
    **_GROUPS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "q_lora_rank": 7,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "attention_bias": True,
}

VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2, "hidden_size": 32},
    ),
    "falcon multi-query": ("Falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon alibi": ("Falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "bloom": (
        "Bloom",
        {**_TOKENS, **_NO_DROPOUT, "hidden_size": 16, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": EPSILON},
    ),
    "mpt": (
        "Mpt",
        {**_TOKENS, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "layer_norm_epsilon": EPSILON},
    ),
    "opt": ("OPT", _OPT),
    "opt projected": ("OPT", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 10}),
    "gptj": ("GPTJ", {**_GPT, "n_embd": 32, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeo",
        {
            **{key: value for key, value in _PLAIN.items() if not key.startswith("num_")},
            "num_heads": 4,
            "num_layers": 2,
            "attention_types": [[["local", "global"], 1]],
            "window_size": WINDOW,
            "layer_norm_epsilon": EPSILON,
            **dict.fromkeys(("attention_dropout", "embed_dropout", "resid_dropout"), 0.0),
        },
    ),
    "gpt_bigcode": ("GPTBigCode", _GPT),
    "gpt_bigcode by heads": ("GPTBigCode", {**_GPT, "multi_query": False, "n_inner": None}),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, "q_lora_rank": None}),
    "glm4_moe": ("Glm4Moe", {**_RMS, **_GROUPS, "head_dim": 8, "use_qk_norm": True, **rope(0.5)}),
    "dots1": ("Dots1", {**_RMS, **_GROUPS, "head_dim": 6, "sliding_window": WINDOW, "max_window_layers": 1}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            **_RMS,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "use_bias": True,
        },
    ),
    "nemotron": ("Nemotron", {**COMMON, "norm_eps": EPSILON, "hidden_size": 32, **rope(0.5)}),
    "helium": ("Helium", {**_RMS, "head_dim": 4}),
    "arcee": ("Arcee", {**_RMS, "head_dim": 6}),
    "apertus": ("Apertus", _RMS),
    "seed_oss": ("SeedOss", {**_RMS, "head_dim": 6}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {**_RMS, "head_dim": 6}),
    "nanochat": ("NanoChat", _RMS),
}
"""By model type, with a word behind it where there are several: what the names of its classes begin with, and the
values of its config."""
MODELS: dict[str, Made] = {name: made(*own) for name, own in VALUES.items()}
"""Model class, config class and values of the config, by the same."""
INPUTS: dict[str, Any] = {}
