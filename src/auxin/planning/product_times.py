"""From how many tokens on a product of two matrices is faster on this machine than the layer that it stands for, and
which ranks the machine likes.

A product takes fewer multiply-adds, and two calls in place of one. Both are timed in turns at several numbers of tokens
(`auxin.accounting.latency`); times that were taken once are kept. Weights have no meaning, and with few tokens lie in a
row of copies, so that a small layer's are not in the processor's nearest caches any more when it is its turn again.

Kernels compute some widths faster than others. Ranks that are odd, or multiples of 2 and no more, and so on, are timed
beside each other, and the least multiple is chosen that loses nothing for each rank.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.accounting.latency import Conditions, Run, Stopwatch
from auxin.models.weights_of_no_meaning import Memory
from auxin.nn.bricks import find_brick
from auxin.nn.linear import widths

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
"""Numbers of tokens at which layers and products are timed."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers whose multiples a machine may like."""
MANY, NEAR = 256, 1.03
"""Tokens at which ranks are compared, and how much more time than the least counts as no more."""
COPIES, FEW = 4, 64
"""Copies of a layer in a row, with up to so many tokens; with more, what is multiplied is more than what is read."""


def faster_from(seconds: Callable[[int], Sequence[float]]) -> int | None:
    """The least of `TOKENS` at which a product is faster, and so at all larger ones; None: at the largest it is not.

    Args:
        seconds: (tokens) -> what the layer takes, and the product.
    """
    found = None
    for tokens in reversed(TOKENS):
        whole, product = seconds(tokens)
        if product >= whole:
            break
        found = tokens
    return found


def ranks_to_compare(rank: int) -> dict[int, int]:
    """For each of `MULTIPLES` the largest rank, `rank` or less, that is a multiple of it and of no larger one, where
    there is one."""
    found = {}
    for multiple in MULTIPLES:
        near = rank // multiple * multiple
        if multiple != MULTIPLES[-1] and near % (2 * multiple) == 0:
            near -= multiple
        if near > 0:
            found[multiple] = near
    return found


def liked(each: Mapping[int, float]) -> int:
    """The least multiple whose ranks take no more time than those of any larger one.

    Args:
        each: by multiple, the seconds for each rank.
    """
    return next(
        multiple
        for multiple in sorted(each)
        if each[multiple] <= NEAR * min(time for other, time in each.items() if other >= multiple)
    )


class ProductTimes:
    """Times of linear layers and products on this machine.

    Args:
        dtype: of the weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._here = self._conditions(TOKENS[0])
        self._device = torch.device(self._here.device)
        self._memory = Memory(self._device)

    def start(self, layer: nn.Module, product: nn.Module) -> int | None:
        """The least of `TOKENS` from which on `product` is faster than `layer`; None: at none it is.

        Args:
            layer, product: both read and write as much; weights are not looked at.
        """
        pair = [_without_weights(module) for module in (layer, product)]
        return faster_from(lambda tokens: self.seconds(pair, tokens))

    def findings(
        self, layers: Mapping[str, nn.Module], products: Mapping[str, nn.Module], forms: Mapping[str, str]
    ) -> str:
        """From how many tokens on products are faster than their layers, shape by shape, in words; of several products
        the largest is timed, the slowest.

        Args:
            layers: by path.
            products: in their places.
            forms: what these are, in words ("of rank 8").
        """
        sizes = {path: sum(one.numel() for one in products[path].parameters()) for path in layers}
        largest = {widths(layers[path]): path for path in sorted(layers, key=lambda path: sizes[path])}
        told = []
        for (inputs, outputs), path in largest.items():
            start = self.start(layers[path], products[path])
            when = "never" if start is None else f"from {start:,} token{'s' * (start > 1)} on"
            told.append(f"{inputs} -> {outputs} {forms[path]} {when}")
        here = self._here
        threads = f", {here.threads} thread{'s' * (here.threads > 1)}" * (here.device == "cpu")
        timed = f"{here.processor}{threads}, {here.dtype}, timed with {TOKENS[0]} to {TOKENS[-1]:,} tokens at once"
        return f"Products are faster than their layers on {timed}: {'; '.join(told)}."

    def liked_multiple(self, product: Callable[[int], nn.Module], rank: int) -> int:
        """The multiple of which ranks are best on this machine, told from products in the place of a layer.

        Args:
            product: (rank) -> the product, on the meta device.
            rank: the largest that is tried.
        """
        ranks = ranks_to_compare(rank)
        seconds = self.seconds([product(rank) for rank in ranks.values()], MANY)
        return liked({multiple: time / ranks[multiple] for multiple, time in zip(ranks, seconds, strict=True)})

    def seconds(self, modules: Sequence[nn.Module], tokens: int) -> list[float]:
        """How long each of some modules takes, all of which read as much, with so many tokens at once."""
        signatures = [f"{_copies(tokens)} x {module}" for module in modules]
        return Stopwatch(self._conditions(tokens)).seconds(signatures, lambda: self.runs(modules, tokens))

    def runs(self, modules: Sequence[nn.Module], tokens: int) -> list[Run]:
        """The modules as what is timed."""
        read = torch.ones(tokens, widths(modules[0])[0], dtype=self._dtype, device=self._device)
        return [self._run(module, read) for module in modules]

    def _conditions(self, tokens: int) -> Conditions:
        return Conditions.here("forward", 1, tokens, self._dtype)

    def _run(self, module: nn.Module, read: Tensor) -> Run:
        row = [copy.deepcopy(module) for _ in range(_copies(len(read)))]
        self._memory.fill(row)

        def timed() -> None:
            with torch.inference_mode():
                for one in row:
                    one(read)

        return Run(lambda: timed, len(row))


def on_shapes(brick: str, layer: nn.Module, **settings: Any) -> nn.Module:
    """The product called `brick` that stands in the place of `layer`, without values."""
    replacing: Any = find_brick(brick)
    made: nn.Module = replacing.replacing(_without_weights(layer), **settings)
    return made


def _without_weights(module: nn.Module) -> nn.Module:
    return module if next(module.parameters()).is_meta else copy.deepcopy(module).to("meta")


def _copies(tokens: int) -> int:
    return COPIES if tokens <= FEW else 1
