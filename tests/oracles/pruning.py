"""Pruned Llamas by hand: norms of units, which stay, and every tensor taken apart by `index_select`; for the names and
shapes of Llama alone, in float64."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

State = dict[str, Tensor]
MLP, ATTENTION = "model.layers.{}.mlp.", "model.layers.{}.self_attn."


def feed_forward_norms(state: State, layer: int) -> Tensor:
    """sqrt(|gate_j|^2 + |up_j|^2 + |down_:j|^2), biases of the first two included."""
    at = MLP.format(layer)
    squares = [state[f"{at}{name}_proj.weight"].pow(2).sum(1) for name in ("gate", "up")]
    squares += [state[f"{at}{name}_proj.bias"].pow(2) for name in ("gate", "up") if f"{at}gate_proj.bias" in state]
    return torch.stack([*squares, state[f"{at}down_proj.weight"].pow(2).sum(0)]).sum(0).sqrt()


def group_norms(state: State, layer: int, config: LlamaConfig) -> Tensor:
    """The same of a key-value head with the query heads that read it and what reads those."""
    at, dim, keys = ATTENTION.format(layer), config.head_dim, config.num_key_value_heads
    total = torch.zeros(keys, dtype=torch.float64)
    for key in range(keys):
        for name, heads in (("q", config.num_attention_heads // keys), ("k", 1), ("v", 1)):
            rows = slice(key * heads * dim, (key + 1) * heads * dim)
            for kind in ("weight", "bias"):
                if f"{at}{name}_proj.{kind}" in state:
                    total[key] += state[f"{at}{name}_proj.{kind}"][rows].pow(2).sum()
            if name == "q":
                total[key] += state[f"{at}o_proj.weight"][:, rows].pow(2).sum()
    return total.sqrt()


def residual_norms(state: State) -> Tensor:
    """The same of a unit of the residual, over the whole model, norms left out."""
    total = 0
    for name, value in state.items():
        if "norm" in name:
            continue
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            total = total + value.pow(2).sum(1)
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            total = total + value.pow(2)
        elif value.dim() == 2:  # embeddings, the head, and what reads
            total = total + value.pow(2).sum(0)
    return total.sqrt()


def largest(scores: Tensor, count: int) -> list[int]:
    """The units with the largest scores, in order."""
    return sorted(scores.argsort(descending=True)[:count].tolist())


def pruned(
    state: State, config: LlamaConfig, groups: list[list[int]], units: list[list[int]], residual: list[int]
) -> tuple[State, dict[str, Any]]:
    """The state and the config's values of the model that has of every layer the key-value groups and feed-forward
    units named, and these units of the residual."""
    dim, per = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    width = torch.tensor(residual)
    growth = (config.hidden_size / len(residual)) ** 0.5
    made: State = {}
    for name, value in state.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if "norm" in name:
            value = value.index_select(0, width) * growth
        elif "q_proj" in name or "k_proj" in name or "v_proj" in name or "o_proj" in name:
            wide = per if "q_proj" in name or "o_proj" in name else 1
            rows = torch.tensor([g * wide * dim + i for g in groups[layer] for i in range(wide * dim)])
            if "o_proj" in name:
                value = value.index_select(0, width)
                value = value.index_select(1, rows) if value.dim() == 2 else value
            else:
                value = value.index_select(0, rows)
                value = value.index_select(1, width) if value.dim() == 2 else value
        elif "down_proj" in name:
            value = value.index_select(0, width)
            value = value.index_select(1, torch.tensor(units[layer])) if value.dim() == 2 else value
        elif "gate_proj" in name or "up_proj" in name:
            value = value.index_select(0, torch.tensor(units[layer]))
            value = value.index_select(1, width) if value.dim() == 2 else value
        else:  # embedding and head
            value = value.index_select(1, width)
        made[name] = value
    values = {
        "hidden_size": len(residual),
        "intermediate_size": len(units[0]),
        "num_attention_heads": per * len(groups[0]),
        "num_key_value_heads": len(groups[0]),
        "head_dim": dim,
        "rms_norm_eps": config.rms_norm_eps * growth**2,
    }
    return made, values
