"""How large a model is expected to be when each of its units stays with some probability."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.planning.unit_order import Place
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses
from auxin.words.roles import Segment

MULTIPLIED = ("matrix", "head")
"""What is multiplied with every token, and so costs FLOPs in proportion to its entries."""


@dataclass(frozen=True)
class _Term:
    """The parameters that grow with the same units."""

    axes: tuple[tuple[tuple[float, Place | None], ...], ...]
    """Of each axis along which units can go, what part of it runs along which units; None: along units that stay. A
    sublayer is one more axis, of a single entry."""


class ExpectedSize:
    """The size of a model as a function of how probably its units stay: the sum over parameters of their entries times
    the shares that stay along their axes, times the probability that the sublayer stays with which they go.

    Args:
        model: the model, on any device; weights are not looked at.
        body: its anatomy.
        counts: how many units each place has; of heads the key-value groups under "key_value", and the query heads
            under "query" where these go alone.
        multiplied: whether only that is counted which is multiplied with every token.
        sublayers: the names of the parameters that go with each sublayer that can go, by its path; its place is
            ("sublayer", path).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        body: Anatomy,
        counts: Mapping[Place, int],
        multiplied: bool = False,
        sublayers: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        of_sublayers: dict[Place, Collection[str]] = {("sublayer", path): n for path, n in (sublayers or {}).items()}
        self._counts, self._terms = {**counts, **dict.fromkeys(of_sublayers, 1)}, dict[_Term, int]()
        head = None if body.head is None else f"{body.head}.weight"
        # A head that is tied to an embedding is multiplied as any other.
        tied = None if head is None else dict(model.named_parameters(remove_duplicate=False)).get(head)
        for name, parameter in model.named_parameters():
            role = body.role(name)
            if not multiplied or role.kind in MULTIPLIED or parameter is tied:
                axes = tuple(self._axis(name, segments) for segments in role.axes if self._goes(name, segments))
                whole = tuple(((1.0, place),) for place, names in of_sublayers.items() if name in names)
                term = _Term((*axes, *whole))
                self._terms[term] = self._terms.get(term, 0) + parameter.numel()
        self.whole = sum(self._terms.values())
        """Of the model as it is."""

    def left(self, shares: Mapping[Place, Tensor]) -> Tensor:
        """The share of the size that is expected to be left.

        Args:
            shares: by place how probably each unit stays, (units,).
        """
        means = {place: values.mean() for place, values in shares.items()}
        total = next(iter(means.values())) * 0
        for term, entries in self._terms.items():
            total = total + entries * prod(
                sum((part * (1.0 if place is None else means[place]) for part, place in axis), 0.0)
                for axis in term.axes
            )
        return total / self.whole

    def of_a_unit(self) -> dict[Place, float]:
        """By place how many entries go with one unit alone."""
        shares = {place: torch.ones(1, dtype=torch.float64, requires_grad=True) for place in self._counts}
        slopes = torch.autograd.grad(self.left(shares), list(shares.values()), allow_unused=True)
        return {
            place: 0.0 if slope is None else slope.item() * self.whole / self._counts[place]
            for place, slope in zip(shares, slopes, strict=True)
        }

    def _goes(self, name: str, segments: tuple[Segment, ...]) -> bool:
        return any(self._place(name, segment) is not None for segment in segments)

    def _axis(self, name: str, segments: tuple[Segment, ...]) -> tuple[tuple[float, Place | None], ...]:
        size = sum(segment.size for segment in segments)
        return tuple((segment.size / size, self._place(name, segment)) for segment in segments)

    def _place(self, name: str, segment: Segment) -> Place | None:
        """The units along which a segment of a parameter runs, where they can go; of heads, a key-value head goes where
        as many go as there are, and not with single query heads that share one."""
        heads = segment.stream in ("query", "key_value")
        for (stream, scope), count in self._counts.items():
            same = stream in ("query", "key_value") if heads else stream == segment.stream
            if same and encloses(scope, name) and segment.count >= count:
                return stream, scope
        return None
