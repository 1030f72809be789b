"""An attention of Llama alone, and calls of it as its model makes them."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

CASE = {
    "heads": st.sampled_from([(1, 1), (2, 1), (4, 2), (2, 2)]),
    "tokens": st.integers(1, 9),
    "samples": st.integers(1, 2),
    "implementation": st.sampled_from(["eager", "sdpa"]),
    "padding": st.integers(0, 3),
    "seed": st.integers(0, 10**6),
}


def attention(heads: int, groups: int, implementation: str, dtype: torch.dtype, seed: int) -> Any:
    """With heads of 4 entries, on a residual stream of 8."""
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=heads, num_key_value_heads=groups, head_dim=4, attention_dropout=0.0
    )
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    module = LlamaAttention(config, 0).to(torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype).eval()


def called(module: Any, hidden: Tensor, padding: int, implementation: str) -> tuple[Tensor, Any, Tensor]:
    """What a causal attention gives for texts that are padded on the left, its map, and which tokens each may see."""
    tokens = hidden.shape[1]
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    visible[:, : min(padding, tokens - 1)] = False
    visible |= torch.eye(tokens, dtype=torch.bool)  # padding reads something, no matter what
    mask = visible[None, None]
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    elif not padding:
        mask = None  # by which a fused kernel is told that all is causal
    places = torch.ones(len(hidden), tokens, 4, dtype=hidden.dtype), torch.zeros(len(hidden), tokens, 4).to(hidden)
    result, weights = module(hidden, places, mask)
    return result, weights, visible


def projected(module: Any, hidden: Tensor) -> dict[str, Any]:
    """Queries, keys and values, (samples, tokens, heads, 4), by "q", "k", "v", as lists."""
    return {name: getattr(module, f"{name}_proj")(hidden).unflatten(-1, (-1, 4)).double().tolist() for name in "qkv"}
