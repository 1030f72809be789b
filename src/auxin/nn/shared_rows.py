"""Layers whose parameter tokens several processes share: tensor parallelism of a Pattention layer.

Of R processes process r has the keys K_r (n_r, d) and values V_r (n_r, e) of its own tokens, and all have the same
input X (rows, d). Scores are of one token each, and the output is a sum over tokens, so that

    A_r = X K_r^T,    S_r = f(A_r),    Y = sum_r S_r V_r.

Only the norm of a group g looks at other tokens: ||A_g||^2 = sum_r ||A_{g,r}||^2, a number per row and group. Forward:

    1. the sums of squares of all groups are added up (groups x rows numbers);
    2. S_r V_r is added up (rows x e numbers).

Backward, with dY the gradient of Y, which all processes have alike: dS_r = dY V_r^T and dV_r = S_r^T dY are of a
process's own tokens. With Z = tau A / (||A|| + eps) and S = GELU(Z) the gradient of the norm joins the tokens of a
group:

    dA_r = tau / (||A|| + eps) dZ_r - Z_r <Z, dZ> / (tau ||A||),    <Z, dZ> = sum_r <Z_r, dZ_r>,

and dK_r = dA_r^T X is a process's own again, but dX = sum_r dA_r K_r is not:

    3. <Z, dZ> of all groups is added up (groups x rows numbers);
    4. dA_r K_r is added up (rows x d numbers).

Query, key and value of an attention layer have the same input. Their scores are one product, their groups' sums one
reduction, their outputs another, and so is the gradient of the input. A TokenFormer's layer, which has these three, the
output projection and the feed-forward part, thus takes 2 + 2 + 2 reductions forward and as many backward; without norms
(score functions "gelu" and "linear") 3 and 3. What lies between them (norms of the stream, attention between tokens,
embedding and head) each process computes alike.

In which process a token lies does not matter. Each has a run of rows as `torch.chunk` cuts them, whatever the groups:
then all have as many tokens, and the parameters are ordinary pieces (`Shard(0)` of torch's DTensor).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Processes:
    """Processes that compute layers together, as one of them sees them."""

    rank: int
    """Which one this is, from 0."""
    size: int
    """How many there are."""
    add_up: Callable[[Tensor], object]
    """Replaces a contiguous tensor by its sum over the processes, the same bits in all of them."""

    def rows(self, total: int) -> range:
        """Those of `total` rows that this process has: equally many in each, but for the last ones."""
        most = -(-total // self.size)
        return range(min(self.rank * most, total), min((self.rank + 1) * most, total))


def local(parameter: nn.Parameter) -> Tensor:
    """The rows that this process has of a parameter that lies in pieces."""
    rows: Tensor = cast(Any, parameter).to_local()
    return rows


def seen_by_all(x: Tensor, processes: Processes) -> Tensor:
    """`x`, which all processes have alike and go on from each in its own way: its gradient is the sum of theirs.

    It must have one consumer, a matrix product, whose backward pass makes the gradient for this alone.
    """
    found: Tensor = _SeenByAll.apply(x, processes)
    return found


def summed(x: Tensor, processes: Processes) -> Tensor:
    """The sum of what the processes have, in all of them, in the memory of `x`, which nobody else uses."""
    found: Tensor = _Summed.apply(x, processes)
    return found


class _SeenByAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        ctx.processes.add_up(gradient)
        return gradient, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        processes.add_up(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
