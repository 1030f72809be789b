"""What every parameter of a transformer is, and what its axes run along: segments of streams.

A parameter **writes** a stream (`auxin.words.widths`) with the axis that produces its units (outputs, embeddings,
gains, biases) and **reads** it with the axis that consumes them. Along experts it does neither: they are chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from auxin.words.paths import path_pattern
from auxin.words.widths import FEED_FORWARD, Sizes, Stream

Access = Literal["writes", "reads"]
Kind = Literal[
    "matrix",
    "bias",
    "embedding",
    "gain",
    "offset",
    "head",
    "query_gain",
    "key_gain",
    "scale",
    "mixing",
    "shape",
    "length",
]
"""What a parameter is: a matrix between streams, its bias, an embedding (of tokens, positions, types), a norm's gain or
its offset (the norm's bias), the output head, the gain of a norm on queries or keys, a factor of units that a matrix
writes or reads, what mixes a layer's input with its output (AltUp), a number in an activation function or a router that
runs along no stream, or the length that a weight norm gives to a parameter over all units of the residual."""
HeadPart = Literal["query", "key", "value"]


@dataclass(frozen=True)
class Segment:
    """A stretch of an axis: `count` units of `unit` consecutive entries each."""

    stream: Stream
    unit: int
    count: int
    parts: tuple[HeadPart, ...] = ()
    """What a head's unit is made of: its query, key or value, or all three one after another. The attention's output is
    read as values are. Empty where a unit has no head dimensions."""
    part_sizes: tuple[int, ...] = ()
    """Entries of each part; empty where all have the head dimension."""
    scope: str = ""
    """Where this width holds, in the module's words; "" is the whole model."""
    dealt: bool = False
    """Whether the axis is laid out by key-value heads: for each of them its share of every segment, and not one segment
    after the other. All segments of an axis are, or none."""

    @property
    def size(self) -> int:
        """Entries of the segment."""
        return self.unit * self.count

    @property
    def sizes_of_parts(self) -> tuple[int, ...]:
        """Entries of each part."""
        return self.part_sizes or (self.unit // max(len(self.parts), 1),) * len(self.parts)


def laid_out(segments: Sequence[Segment], units: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Where the entries of an axis are: entry i of the axis is entry `laid_out(...)[i]` of its segments one after the
    other. The same numbers, in order, where segments are not dealt out.

    Args:
        segments: of the axis.
        units: how many units each has.
        sizes: how many entries a unit of each has.
    """
    starts = list(accumulate((count * size for count, size in zip(units, sizes, strict=True)), initial=0))
    if not any(segment.dealt for segment in segments):
        return list(range(starts[-1]))
    heads = min(units)
    shares = [count // heads * size for count, size in zip(units, sizes, strict=True)]
    return [
        start + head * share + entry
        for head in range(heads)
        for start, share in zip(starts, shares, strict=False)
        for entry in range(share)
    ]


@dataclass(frozen=True)
class ParameterRole:
    """What the parameters of one pattern are and what their axes run along."""

    pattern: str
    """Dotted name, `*` for one part."""
    axes: tuple[tuple[Segment, ...], ...]
    """Per axis the segments that make it up, concatenated; an empty tuple for an axis along no stream."""
    access: tuple[Access | None, ...]
    """Per axis whether the parameter writes or reads the stream there."""
    kind: Kind
    added: bool = False
    """Whether a brick has it beside the parameters of the module that it replaces or wraps."""

    def matches(self, name: str) -> bool:
        """Whether the parameter `name` has this role."""
        return path_pattern(self.pattern).fullmatch(name) is not None

    def vector(self, axis: int, kind: Kind) -> "ParameterRole":
        """The role of a vector that runs along one axis of this parameter: a bias, or a factor of its units. What reads
        units does not produce them; a factor of them does."""
        access: Access | None = "writes" if self.axes[axis] else None
        return ParameterRole(self.pattern, (self.axes[axis],), (access,), kind)

    def beside(self, axis: int, place: int) -> "ParameterRole":
        """The role of a matrix that does along its axis `place`, 0 or 1, what this parameter does along `axis`, and
        whose other axis runs along no stream (one of two factors, say)."""
        ends = [(self.axes[axis], self.access[axis]), ((), None)]
        (one, how), (other, so) = ends if place == 0 else reversed(ends)
        return ParameterRole(self.pattern, (one, other), (how, so), "matrix")

    def along(self, stream: Stream, access: Access | None = None) -> bool:
        """Whether an axis runs along `stream` (and is accessed so)."""
        return any(
            segment.stream == stream and access in (None, how)
            for segments, how in zip(self.axes, self.access, strict=True)
            for segment in segments
        )

    @property
    def units_read(self) -> tuple[int, Segment] | None:
        """The axis along which a matrix reads heads or feed-forward units, and the segment that it is; None of
        others."""
        if self.kind != "matrix":
            return None
        for axis, (segments, how) in enumerate(zip(self.axes, self.access, strict=True)):
            if how == "reads" and len(segments) == 1 and segments[0].stream in ("query", *FEED_FORWARD):
                return axis, segments[0]
        return None


@dataclass(frozen=True)
class Axes:
    """The segments of a model's streams, from which roles are written down."""

    residual: tuple[Segment, ...]
    query: tuple[Segment, ...]
    key: tuple[Segment, ...]
    value: tuple[Segment, ...]
    attended: tuple[Segment, ...]
    """The attention's output before it goes back to the residual."""
    ffn: tuple[Segment, ...]
    vocabulary: tuple[Segment, ...]

    @classmethod
    def of(cls, sizes: Sizes, vocabulary: int) -> "Axes":
        """The axes of a model of these sizes."""
        return cls(
            residual=(Segment("residual", 1, sizes.residual),),
            query=(Segment("query", sizes.head_dim, sizes.query_heads, ("query",)),),
            key=(Segment("key_value", sizes.head_dim, sizes.key_value_heads, ("key",)),),
            value=(Segment("key_value", sizes.head_dim, sizes.key_value_heads, ("value",)),),
            attended=(Segment("query", sizes.head_dim, sizes.query_heads, ("value",)),),
            ffn=(Segment("ffn", 1, sizes.ffn),) if sizes.ffn else (),
            vocabulary=(Segment("vocabulary", 1, vocabulary),),
        )

    @property
    def fused(self) -> tuple[Segment, ...]:
        """Query, key and value of one head after those of the one before it."""
        (query,) = self.query
        return (replace(query, unit=3 * query.unit, parts=("query", "key", "value")),)


def per_head(heads: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Segments with one entry for each head of `heads`, whose units are heads."""
    return tuple(replace(segment, unit=1, parts=()) for segment in heads)


def linear(
    module: str, output: tuple[Segment, ...], read: tuple[Segment, ...], kind: Kind = "matrix"
) -> list[ParameterRole]:
    """The roles of a Linear's weight (out, in) and bias (out,)."""
    access: tuple[Access | None, ...] = ("writes" if output else None, "reads" if read else None)
    return [
        ParameterRole(f"{module}.weight", (output, read), access, kind),
        ParameterRole(f"{module}.bias", (output,), ("writes" if output else None,), "bias"),
    ]


def conv1d(module: str, output: tuple[Segment, ...], read: tuple[Segment, ...]) -> list[ParameterRole]:
    """The roles of a GPT-2 Conv1D's weight (in, out) and bias (out,)."""
    return [
        ParameterRole(f"{module}.weight", (read, output), ("reads", "writes"), "matrix"),
        ParameterRole(f"{module}.bias", (output,), ("writes",), "bias"),
    ]


def norm(module: str, segments: tuple[Segment, ...], kind: Kind = "gain") -> list[ParameterRole]:
    """The roles of a norm's gain and offset."""
    return [
        ParameterRole(f"{module}.weight", (segments,), ("writes" if segments else None,), kind),
        ParameterRole(f"{module}.bias", (segments,), ("writes" if segments else None,), "offset"),
    ]


def embedding(parameter: str, *axes: tuple[Segment, ...]) -> ParameterRole:
    """The role of an embedding: it writes along every axis that has a stream."""
    return ParameterRole(parameter, axes, tuple("writes" if segments else None for segments in axes), "embedding")
