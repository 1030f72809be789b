"""From how many tokens on a product of two matrices is faster on this machine than the layer that it stands for.

A product takes fewer multiply-adds, and two calls in place of one. Both are timed in turns at several numbers of tokens
(`auxin.accounting.latency`); times that were taken once are kept. Weights have no meaning, and with few tokens lie in a
row of copies, so that a small layer's are not in the processor's nearest caches any more when it is its turn again.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from auxin.accounting.latency import Conditions, Run, Stopwatch
from auxin.models.weights_of_no_meaning import Memory

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
"""Numbers of tokens that are timed."""
COPIES, FEW = 4, 64
"""Copies of a layer in a row, with up to so many tokens; with more, what is multiplied is more than what is read."""


@dataclass(frozen=True)
class Pair:
    """A layer and the product in its place, both on the meta device."""

    layer: nn.Module
    product: nn.Module
    inputs: int
    """Width of what they read."""


Seconds = Callable[[int, Pair], tuple[float, float]]
"""(tokens, pair) -> how long the layer takes, and the product."""


def faster_from(pair: Pair, seconds: Seconds) -> int | None:
    """The least of `TOKENS` at which the product is faster, and so at all larger ones; None: at the largest it is
    not."""
    found = None
    for tokens in reversed(TOKENS):
        whole, product = seconds(tokens, pair)
        if product >= whole:
            break
        found = tokens
    return found


class ProductTimes:
    """Times of layers and products on this machine.

    Args:
        dtype: of the weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._here = self._conditions(TOKENS[0])
        self._device = torch.device(self._here.device)
        self._memory = Memory(self._device)

    def __str__(self) -> str:
        """The machine, in words."""
        here = self._here
        threads = f", {here.threads} thread{'s' * (here.threads > 1)}" * (here.device == "cpu")
        return f"{here.processor}{threads}, {here.dtype}"

    def seconds(self, tokens: int, pair: Pair) -> tuple[float, float]:
        """How long the layer takes, and the product, with so many tokens at once."""
        modules = pair.layer, pair.product
        signatures = [f"{_copies(tokens)} x {module}" for module in modules]
        watch = Stopwatch(self._conditions(tokens))
        whole, product = watch.seconds(signatures, lambda: self._runs(modules, tokens, pair.inputs))
        return whole, product

    def _conditions(self, tokens: int) -> Conditions:
        return Conditions.here("forward", 1, tokens, self._dtype)

    def _runs(self, modules: Sequence[nn.Module], tokens: int, width: int) -> list[Run]:
        read = torch.ones(tokens, width, dtype=self._dtype, device=self._device)
        return [self._run(module, read) for module in modules]

    def _run(self, module: nn.Module, read: Tensor) -> Run:
        row = [copy.deepcopy(module) for _ in range(_copies(len(read)))]
        self._memory.fill(row)

        def timed() -> None:
            with torch.inference_mode():
                for one in row:
                    one(read)

        return Run(lambda: timed, len(row))


def _copies(tokens: int) -> int:
    return COPIES if tokens <= FEW else 1
