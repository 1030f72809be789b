"""Experts by hand: routers in which some have a score of minus infinity, and what routers make of experts, token by
token; in float64, knowing neither plans nor measurements."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from oracles.importance import given_to


class MaskedRouters(TorchFunctionMode):
    """Within the context the scores that routers give to some experts are minus infinity.

    Args:
        gone: by router, the matrix whose rows are experts, those experts.
    """

    def __init__(self, gone: list[tuple[Tensor, list[int]]]) -> None:
        super().__init__()
        self._gone = gone
        self.met = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            for router, experts in self._gone:
                if args[1] is router:
                    self.met += 1
                    result = result.index_fill(-1, torch.tensor(experts), -torch.inf)
        return result


def uses(model: Any, path: str, batch: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Of the experts at `path`, gated ones with SiLU and no biases: the share of tokens that get each, the mean over
    all tokens of the router's weight for it (0 where it isn't chosen), and the mean over the tokens that get it of that
    weight times the length of what it gives."""
    experts, (hidden, index, weights) = model.get_submodule(path), given_to(model, path, batch)
    into, out = experts.gate_up_proj.detach(), experts.down_proj.detach()
    number, _, units = out.shape
    found: dict[str, list[float]] = {"frequency": [], "gate": [], "reap": []}
    for expert in range(number):
        given = []
        for token, x in enumerate(hidden):
            for chosen, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                if chosen == expert:
                    gate, up = into[expert, :units] @ x, into[expert, units:] @ x
                    result = out[expert] @ (gate * torch.sigmoid(gate) * up)
                    given.append((weight, weight * result.square().sum().sqrt().item()))
        found["frequency"].append(len(given) / len(hidden))
        found["gate"].append(sum(weight for weight, _ in given) / len(hidden))
        found["reap"].append(sum(value for _, value in given) / len(given) if given else 0.0)
    return found
