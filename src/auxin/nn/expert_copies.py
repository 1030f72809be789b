"""Experts that are copies of one feed-forward part: the start of sparse upcycling (arXiv 2212.05055)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from auxin.errors import PlanError
from auxin.nn.bricks import MAKINGS, Making, Shapes, Tensors

ROUTER_STD = 0.02
GATED = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


class ExpertCopies(Making):
    """Of a gated feed-forward part (gate_proj, up_proj (units, hidden), down_proj (hidden, units)) the experts and the
    router of Mixtral and its kin: `experts.gate_up_proj` (experts, 2 units, hidden), `experts.down_proj` (experts,
    hidden, units), `gate.weight` (experts, hidden).

    All experts are equal, so that whichever are chosen, with weights that sum to 1, give what the one part gave. The
    router is N(0, 0.02^2): experts part when it sends them different tokens. Setting: `num_experts`.
    """

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        if set(old) != GATED:
            raise PlanError(
                f"experts are made of {', '.join(sorted(GATED))}, and the module has {', '.join(sorted(old)) or 'none'}"
            )
        experts = settings["num_experts"]
        units, hidden = old["gate_proj.weight"]
        return {
            "experts.gate_up_proj": (experts, 2 * units, hidden),
            "experts.down_proj": (experts, hidden, units),
            "gate.weight": (experts, hidden),
        }

    def keeps(self, old: Shapes, **settings: Any) -> Collection[str]:
        return ()

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        experts, gate = settings["num_experts"], old["gate_proj.weight"]
        router = torch.randn(experts, gate.shape[1], generator=draw).mul_(ROUTER_STD)
        return {**_copied(old, experts), "gate.weight": router.to(gate)}

    def moments(self, old: Tensors, moments: Tensors, order: int, **settings: Any) -> dict[str, Tensor] | None:
        """Each expert sees its share of the tokens: of E that are chosen alike, a gradient of 1/E."""
        if set(moments) != GATED:
            return None
        experts = settings["num_experts"]
        return {name: moment / experts**order for name, moment in _copied(moments, experts).items()}


def _copied(parts: Tensors, experts: int) -> dict[str, Tensor]:
    fused = torch.cat([parts["gate_proj.weight"], parts["up_proj.weight"]])
    return {
        "experts.gate_up_proj": fused.expand(experts, *fused.shape).contiguous(),
        "experts.down_proj": parts["down_proj.weight"].expand(experts, -1, -1).contiguous(),
    }


MAKINGS.add("expert_copies", ExpertCopies())
