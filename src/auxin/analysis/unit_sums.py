"""What is added up over tokens while activations, and gradients, pass through the places of units."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from auxin.analysis.measurement import check_mask, wide
from auxin.analysis.units import Group, Place, Rows
from auxin.errors import PlanError

Score = Literal["taylor", "fisher", "activation", "output", "fluctuation"]
OF_GRADIENTS: tuple[Score, ...] = ("taylor", "fisher")
Aggregation = Literal["mean", "l2", "variance"]
"""What is made of several numbers: the mean of their absolute values, the root of their mean square, or the mean of
their squared distances from their mean."""


def add_up(sums: dict[Group, Tensor], group: Group, values: Tensor) -> None:
    """Add values to a group's sum, which may lie on another device."""
    sums[group] = values if group not in sums else sums[group] + values.to(sums[group].device)


class _Sums:
    """What both kinds of runs know of the samples that pass.

    Args:
        samples: how many.
        kept: which tokens count, (samples, tokens); of a decoder under True.
    """

    def __init__(self, samples: int, kept: Mapping[bool, Tensor | None]) -> None:
        self.sums: dict[Group, Tensor] = {}
        """By group what is added up, (samples, units)."""
        self.samples, self._kept = samples, kept

    def cells(self, place: Place, rows: Rows) -> tuple[Tensor, Tensor]:
        """Which sample and expert each row belongs to, (samples * experts, rows) of 0 and 1, no one's where it is
        padding; and the tokens of each sample, (samples,)."""
        length, rest = divmod(rows.tokens, self.samples)
        if rest:
            raise PlanError(
                f"{place.group[1] or 'The model'}: {rows.tokens} tokens pass through {type(place.module).__name__}, "
                f"which is no whole number for each of {self.samples} samples. Only models that keep the tokens of "
                "samples apart can be measured."
            )
        device, kept = rows.values.device, self._kept[place.decoder]
        if kept is not None:
            check_mask(kept, (self.samples, length))
        kept = torch.ones(self.samples, length, dtype=torch.bool) if kept is None else kept
        kept = kept.to(device)
        token = torch.arange(rows.tokens, device=device) if rows.token is None else rows.token
        cell = token // length * rows.experts + (0 if rows.expert is None else rows.expert)
        numbers = torch.arange(self.samples * rows.experts, device=device)[:, None]
        counted = (cell == numbers) & kept.flatten()[token]
        return counted.to(wide(rows.values).dtype), kept.sum(1).to(wide(rows.values).dtype)

    def by_cell(self, cells: Tensor, values: Tensor, rows: Rows) -> Tensor:
        """Sums over the rows of each sample and expert: (samples, experts, entries)."""
        return (cells @ values).unflatten(0, (self.samples, rows.experts))

    def around_means(self, place: Place, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Of each sample and expert the means over the sample's tokens and the sums of squared distances from them,
        (samples, experts, entries) each. Tokens that went to other experts are zeros."""
        cells, tokens = self.cells(place, rows)
        tokens = tokens[:, None, None]
        means = self.by_cell(cells, values, rows) / tokens
        around = values - cells.T @ means.flatten(0, 1)
        squares = self.by_cell(cells, around.square(), rows)
        others = tokens - cells.sum(1).view(self.samples, rows.experts, 1)
        return means, squares + others * means.square()


class Gradients(_Sums):
    """Adds up a dL/da in a backward pass, from the loss to `root`."""

    def __init__(self, samples: int, kept: Mapping[bool, Tensor | None]) -> None:
        super().__init__(samples, kept)
        # Zero is added to everything that passes, so that a graph leads from the loss to all places whether or not
        # parameters ask for gradients, and to nothing else.
        self.root = torch.zeros((), requires_grad=True)

    def __call__(self, place: Place, rows: Rows) -> Tensor:
        passed = rows.values + self.root.to(rows.values)
        if passed.requires_grad:
            passed.register_hook(partial(self._slope, place, replace(rows, values=rows.values.detach())))
        return passed

    def _slope(self, place: Place, rows: Rows, gradient: Tensor) -> None:
        cells, _ = self.cells(place, rows)
        products = self.by_cell(cells, wide(rows.values) * wide(gradient), rows)
        add_up(self.sums, place.group, place.of_units(products))


class Uses(_Sums):
    """Adds up how routers use experts, (samples, experts, 1 or 2): by layer and sample, for each expert how many tokens
    get it, the sum of the weights with which they do, and the sum of the norms of what it gives them, times these
    weights."""

    def __init__(self, samples: int, kept: Mapping[bool, Tensor | None]) -> None:
        super().__init__(samples, kept)
        self.tokens: dict[str, Tensor] = {}
        """Of each sample, by layer."""

    def __call__(self, place: Place, rows: Rows) -> Tensor:
        cells, tokens = self.cells(place, rows)
        if rows.gates is not None:  # between the matrices of experts
            self.tokens[place.group[1]] = tokens
            values = torch.cat([torch.ones_like(rows.gates), rows.gates], dim=1)
        else:  # behind them
            values = rows.values.norm(dim=1, keepdim=True)
        add_up(self.sums, place.group, self.by_cell(cells, wide(values).to(cells), rows))
        return rows.values


class Statistics(_Sums):
    """Adds up what a score is made of while activations pass."""

    def __init__(self, score: Score, samples: int, kept: Mapping[bool, Tensor | None]) -> None:
        super().__init__(samples, kept)
        self.read: list[Place] = []
        self.means: list[Tensor] = []
        """Of each place that was read the means over tokens, (samples, experts * entries)."""
        self.of_heads: dict[Group, Tensor] = {}
        """Of a fluctuation what is added up of query heads, by entry instead of by head, (samples, entries)."""
        self._score = score

    def __call__(self, place: Place, rows: Rows) -> Tensor:
        cells, tokens = self.cells(place, rows)
        values = wide(rows.values if rows.gates is None else rows.values * rows.gates)
        tokens = tokens[:, None, None]
        if self._score == "fluctuation":
            means, squares = self.around_means(place, values, rows)
            self.read.append(place)
            self.means.append(means.flatten(1))
        else:
            squares = self.by_cell(cells, values.square(), rows)
        if self._score != "activation":
            assert place.weights is not None
            squares = squares * place.weights
        add_up(self.sums, place.group, place.of_units(squares / tokens))
        if self._score == "fluctuation" and place.group[0] == "query":
            add_up(self.of_heads, place.group, (squares / tokens).sum(1))
        return rows.values


class OverTokens(_Sums):
    """Makes one number of what a unit is at all tokens of a sample: its value, or the length of its entries where it
    has several.

    Args:
        how: the number is made.
        samples, kept: as of the others.
    """

    def __init__(self, how: Aggregation, samples: int, kept: Mapping[bool, Tensor | None]) -> None:
        super().__init__(samples, kept)
        self.found: list[tuple[Place, Tensor]] = []
        """The numbers, (samples, experts, units), of each run of a place; of whole experts they are one unit each."""
        self._how = how

    def __call__(self, place: Place, rows: Rows) -> Tensor:
        values = wide(rows.values if rows.gates is None else rows.values * rows.gates)
        if place.entries != 1:
            values = values.unflatten(-1, (-1, place.entries or values.shape[-1])).norm(dim=-1)
        cells, tokens = self.cells(place, rows)
        tokens = tokens[:, None, None]
        if self._how == "mean":
            made = self.by_cell(cells, values.abs(), rows) / tokens
        elif self._how == "l2":
            made = (self.by_cell(cells, values.square(), rows) / tokens).sqrt()
        else:
            made = self.around_means(place, values, rows)[1] / tokens
        self.found.append((place, made))
        return rows.values
