"""Pattention: attention of the input over learned key and value parameter tokens (TokenFormer, arXiv 2410.23168, eq. 4 and 16)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ScoreFunction = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
Gelu = Literal["erf", "tanh"]


def pattention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    tau: Tensor,
    group_sizes: Sequence[int],
    score_function: ScoreFunction = "l2_norm_gelu",
    gelu: Gelu = "erf",
    eps: float = 1e-6,
) -> Tensor:
    """sum over groups g of f(A_g * tau_g / ||A_g||) V_g with A = x K^T."""
    approximate = "none" if gelu == "erf" else "tanh"
    scores = F.linear(x, keys)
    outputs = []
    for index, block in enumerate(scores.split(list(group_sizes), dim=-1)):
        if score_function == "softmax":
            outputs.append((block.float().softmax(-1) * tau[index] ** 2).to(block.dtype))
            continue
        if score_function == "gelu_l2_norm":
            block = F.gelu(block, approximate=approximate)
        scale = tau[index] / (block.float().norm(dim=-1, keepdim=True) + eps)
        block = block * scale.to(block.dtype)
        outputs.append(block if score_function == "gelu_l2_norm" else F.gelu(block, approximate=approximate))
    return torch.cat(outputs, dim=-1) @ values


class Pattention(nn.Module):
    """Token-parameter attention."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_sizes: Sequence[int],
        tau: Sequence[float] | None = None,
        score_function: ScoreFunction = "l2_norm_gelu",
        gelu: Gelu = "erf",
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_sizes = in_features, out_features, tuple(group_sizes)
        self.score_function, self.gelu, self.eps = score_function, gelu, eps
        self.initial_tau = tuple(math.sqrt(size) for size in group_sizes) if tau is None else tuple(tau)
        self.keys = nn.Parameter(torch.empty(sum(group_sizes), in_features, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(sum(group_sizes), out_features, device=device, dtype=dtype))
        self.register_buffer("tau", torch.tensor(self.initial_tau, dtype=torch.float32, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return pattention(
            x, self.keys, self.values, self.tau, self.group_sizes, self.score_function, self.gelu, self.eps
        )
