"""Maps of streams: where the units of a wider or narrower model come from.

A `StreamMap` copies every unit some number of times, which its readers divide by, and can add units that copy none. A
`Widening` holds the maps of all streams; `auxin.planning.width` turns it into edits and knows when it is exact.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from auxin.errors import PlanError
from auxin.words.paths import innermost
from auxin.words.roles import Segment
from auxin.words.widths import FEED_FORWARD, IN_FEED_FORWARD, Sizes, Stream, Width

Padding = Literal["zeros", "mean"]


@dataclass(frozen=True)
class StreamMap:
    """Where the units of a stream come from."""

    old: int
    """Units before."""
    index: tuple[int, ...]
    """New unit i is a copy of old unit index[i]."""
    added: int = 0
    """Further units after these that copy none. In the residual they are padding, which the norms see; heads and
    feed-forward units get random writers and readers of zeros."""

    @property
    def size(self) -> int:
        """Units after."""
        return len(self.index) + self.added

    @property
    def counts(self) -> tuple[int, ...]:
        """How many copies every old unit has."""
        counts = [0] * self.old
        for unit in self.index:
            counts[unit] += 1
        return tuple(counts)

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.added == 0 and self.index == tuple(range(self.old))

    @property
    def is_even(self) -> bool:
        """Whether every old unit has equally many copies, at least one."""
        return len(set(self.counts)) == 1 and self.counts[0] > 0

    @property
    def is_cut(self) -> bool:
        """Whether some old units go, and those that stay are there once."""
        return 0 in self.counts and max(self.counts) == 1 and self.added == 0

    @property
    def is_tiled(self) -> bool:
        """Whether the copies are the old units in order, over and over."""
        return self.is_even and self.index == tuple(range(self.old)) * (len(self.index) // self.old)


def circular(old: int, new: int) -> StreamMap:
    """New unit j copies old unit j mod `old`: n equal copies where `new` = n `old`."""
    return StreamMap(old, tuple(unit % old for unit in range(new)))


def padded(old: int, new: int) -> StreamMap:
    """As many whole copies as fit into `new` units, and the rest padding."""
    return StreamMap(old, tuple(range(old)) * (new // old), new % old)


def drawn(old: int, new: int, draw: Sequence[int]) -> StreamMap:
    """The old units and then copies of those that `draw` names, in that order (Net2Net's random map)."""
    return StreamMap(old, (*range(old), *draw[: new - old]))


def head_maps(
    sizes: Sizes, query_heads: int, key_value_heads: int, chosen: Sequence[int] = ()
) -> tuple[StreamMap, ...]:
    """The maps of query and key-value heads that keep every query head with its key-value head.

    Query head j reads key-value head floor(j / (H/K)). New key-value heads are copies, the old ones over and over; the
    query heads of all copies of one go through its group in a circle, so that their counts differ by one at most. Where
    the number of query heads stays, they stay where they are and their key-value heads are repeated next to each other.

    Args:
        sizes: the model's.
        query_heads: H' after the growth.
        key_value_heads: K' after the growth; divides H'.
        chosen: which old key-value heads those after the old ones copy; default: in a circle.

    Raises:
        PlanError: H' and K' do not go together, or some query head would be lost.
    """
    old_groups, groups = sizes.query_heads // sizes.key_value_heads, query_heads // key_value_heads
    keys = [*range(sizes.key_value_heads), *chosen] if chosen else list(range(key_value_heads))
    keys = [key % sizes.key_value_heads for key in keys]
    if query_heads == sizes.query_heads and key_value_heads % sizes.key_value_heads == 0 and not chosen:
        keys = [head // (key_value_heads // sizes.key_value_heads) for head in range(key_value_heads)]
    seen = [0] * sizes.key_value_heads
    queries: list[int] = []
    for key in keys:
        # A copy begins anew with the first query head where a whole number of rounds fits into it.
        start = seen[key] if groups % old_groups else 0
        queries += [key * old_groups + (start + slot) % old_groups for slot in range(groups)]
        seen[key] += groups
    query, key_value = StreamMap(sizes.query_heads, tuple(queries)), StreamMap(sizes.key_value_heads, tuple(keys))
    if 0 in query.counts:
        lost = query.counts.index(0)
        raise PlanError(
            f"{query_heads} query heads on {key_value_heads} key-value heads: head {lost} would be lost, since its "
            f"key-value head has room for {seen[lost // old_groups]} of the {old_groups} that read it. "
            f"{_nearest_heads(sizes, query_heads, key_value_heads)}"
        )
    return query, key_value


@dataclass(frozen=True)
class Widening:
    """What becomes of every stream of a model."""

    residual: StreamMap
    query: StreamMap
    key_value: StreamMap
    feed_forward: Mapping[Stream, StreamMap]
    """By the stream; those that an architecture lacks are left out, and so are experts where they stay. See
    `feed_forward_maps`."""
    head_dim: int
    """After the growth."""
    padding: Padding = "zeros"
    """What the residual's added units hold: zeros, or the mean of the others (for LayerNorm)."""
    noise: float = 0.0
    """Relative root mean square of the noise by which the shares of the readers of copied units differ; it sums to zero
    over the copies of a unit, so that the function stays and the copies can part."""
    scoped: Mapping[tuple[Stream, str], StreamMap] = field(default_factory=dict)
    """Maps of heads and feed-forward units by (stream, scope), for scopes that the anatomy tells apart; elsewhere the
    maps above hold."""

    @property
    def is_identity(self) -> bool:
        """Whether there is nothing to do but for the head dimension."""
        return all(stream.is_identity for _, _, stream in self.maps())

    def maps(self) -> Iterator[tuple[Stream, str, StreamMap]]:
        """All maps, with their streams and scopes."""
        yield "residual", "", self.residual
        yield "query", "", self.query
        yield "key_value", "", self.key_value
        for stream, stream_map in self.feed_forward.items():
            yield stream, "", stream_map
        for (stream, scope), stream_map in self.scoped.items():
            yield stream, scope, stream_map

    def at(self, stream: Stream, scope: str) -> StreamMap | None:
        """The map of `stream` at `scope`, the innermost one's; None where the stream never grows here."""
        maps = {where: stream_map for name, where, stream_map in self.maps() if name == stream}
        return maps[innermost(scope, maps)] if maps else None

    def stream(self, segment: Segment) -> StreamMap | None:
        """The map of the stream that `segment` runs along; None for one that never grows here."""
        return self.at(segment.stream, segment.scope)

    def sizes(self, old: Sizes) -> Sizes:
        """The widths afterwards.

        Args:
            old: the widths before.
        """
        places = {(width.stream, width.scope): None for width in old.scoped} | dict.fromkeys(self.scoped)
        maps = ((stream, scope, self.at(stream, scope)) for stream, scope in places)
        widths = [
            Width(stream, scope, units)
            for stream, scope, found in maps
            if (units := old.units(stream, scope) if found is None else found.size) is not None
        ]
        inner = {stream: old.units(stream) for stream in IN_FEED_FORWARD}
        inner |= {stream: stream_map.size for stream, stream_map in self.feed_forward.items()}
        new = Sizes.of(self.residual.size, self.query.size, self.key_value.size, self.head_dim, inner)
        return new.with_widths(widths)


def feed_forward_maps(
    old: Sizes,
    new: Sizes,
    units: Callable[[int, int], StreamMap],
    streams: Sequence[Stream] = FEED_FORWARD,
) -> dict[Stream, StreamMap]:
    """The maps of the feed-forward streams of a model, for `Widening.feed_forward`.

    Args:
        old: the model's widths.
        new: those after the growth.
        units: the map from a number of units to another one.
        streams: those that the maps are of.
    """
    widths = {stream: (old.units(stream), new.units(stream)) for stream in streams}
    return {stream: units(before, after) for stream, (before, after) in widths.items() if before and after}


def scoped_maps(
    old: Sizes,
    new: Sizes,
    units: Callable[[int, int], StreamMap],
    heads: Callable[[Sizes, Sizes], tuple[StreamMap, ...]],
) -> dict[tuple[Stream, str], StreamMap]:
    """The maps of the scopes of a model that have widths of their own, for `Widening.scoped`.

    Args:
        old: the model's widths.
        new: those after the growth.
        units: the map from a number of feed-forward units to another one.
        heads: the maps of query and key-value heads between the widths of two models.
    """
    maps: dict[tuple[Stream, str], StreamMap] = {}
    for scope in dict.fromkeys(width.scope for width in old.scoped):
        streams = {width.stream for width in old.scoped if width.scope == scope}
        before, after = old.at(scope), new.at(scope)
        if streams & {"query", "key_value"}:
            maps["query", scope], maps["key_value", scope] = heads(before, after)
        inner = feed_forward_maps(before, after, units)
        maps |= {(stream, scope): stream_map for stream, stream_map in inner.items() if stream in streams}
    return maps


def _nearest_heads(sizes: Sizes, query_heads: int, key_value_heads: int) -> str:
    """The nearest numbers of heads that keep every query head with its key-value head."""
    least = math.ceil(sizes.query_heads / key_value_heads) * key_value_heads
    copies = max(key_value_heads // sizes.key_value_heads, 1)
    group = math.ceil(sizes.query_heads / sizes.key_value_heads / copies)
    heads = max(least, group * key_value_heads)
    return f"The nearest possible: num_attention_heads = {heads} with num_key_value_heads = {key_value_heads}."
