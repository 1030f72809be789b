"""Masks on units: what some of them give becomes zero while the model runs, other ones in each copy of its inputs."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from auxin.analysis.units import WORDS, Group, Place, Rows, Units
from auxin.words.widths import FEED_FORWARD

Streams = Literal["heads", "ffn"]


@dataclass(frozen=True)
class Mask:
    """Units that are masked at once."""

    group: Group
    """Where they are."""
    units: tuple[int, ...]
    """Their numbers in it."""


def maskable(units: Units, streams: Sequence[Streams]) -> list[Group]:
    """The groups of units that could go, by kind and then by layer: of heads the key-value groups, or the query heads
    where all read a single key-value head."""
    order = list(WORDS)
    found: list[Group] = []
    for kind, scope in units.counts:
        grouped = units.counts.get(("key_value", scope), 1) > 1
        of_heads = kind == ("key_value" if grouped else "query")
        if ("heads" in streams and of_heads) or ("ffn" in streams and kind in FEED_FORWARD):
            found.append((kind, scope))
    return sorted(found, key=lambda group: order.index(group[0]))


@contextlib.contextmanager
def masked(units: Units, masks: Sequence[Mask]) -> Iterator[None]:
    """Within the context, what the units of a mask give is zero.

    Args:
        units: of the model.
        masks: of one group; the model's inputs come once for each, one copy after the other.
    """
    group = masks[0].group
    read: Group = ("query" if group[0] == "key_value" else group[0], group[1])
    gone = torch.zeros(len(masks), units.counts[group], dtype=torch.bool)
    for copy, mask in enumerate(masks):
        gone[copy, list(mask.units)] = True
    # Query heads come group by group.
    gone = gone.repeat_interleave(units.counts[read] // units.counts[group], dim=1)

    def silence(place: Place, rows: Rows) -> Tensor:
        device, each = rows.values.device, rows.tokens // len(masks)
        token = torch.arange(rows.tokens, device=device) if rows.token is None else rows.token
        entries = gone.to(device).repeat_interleave(place.entries, dim=1)
        # Not a product with zero: what is not finite must go, too.
        return rows.values.masked_fill(entries[token // each], 0)

    with units.read_by(silence, [read]):
        yield
