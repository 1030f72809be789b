"""How long a model and what is made of it take on this machine, told from a table of its parts.

The latency of a model is the sum of its parts': what is around the layers (embeddings, head), and each layer. Of a
model that is made smaller

* layers that are as before take as long as before;
* layers that lost heads, feed-forward units or units of the residual are read off **curves**: a layer of each kind is
  timed with some numbers of them, and between these the time is taken to change evenly. Less is never slower: what was
  measured otherwise is noise, and is evened out (the nearest rising numbers, by least squares). Fewer than were
  measured take as long as the fewest;
* what heads and feed-forward units save is added up; units of the residual, which all matrices read, leave a share of
  what is left, but of the time that no unit takes;
* any other layer, one without its attention say, is timed by itself, and is no slower than it was.

Everything is timed once (`auxin.accounting.latency`); weights are not looked at, and one layer at a time has some
(`auxin.planning.timed_parts`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil

import torch
from transformers import PreTrainedModel

from auxin.accounting.latency import Conditions, Stopwatch
from auxin.edits.resolution import resolve
from auxin.edits.structure import skeleton_of
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.weights_of_no_meaning import Memory
from auxin.planning.cutting import cut, narrowest_scopes
from auxin.planning.timed_parts import Part, TimedParts
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses
from auxin.words.widths import FEED_FORWARD, SETTINGS, Stream

POINTS = 8
"""Sizes that are timed of each kind, evenly spread."""
CUT: tuple[Stream, ...] = ("residual", "query", *FEED_FORWARD)
"""The streams that layers are read off curves by."""
CHEAP_SECONDS, CHEAP_BYTES = 0.5, 2**30
"""What a model may take, to be timed as a whole as well."""
MILLISECONDS = 1000.0
Seconds = Callable[[Sequence[Part]], Sequence[float]]
"""(parts that are compared) -> how long each takes."""


@dataclass(frozen=True)
class Curve:
    """How the time of something falls with a number of units."""

    units: tuple[int, ...]
    """Rising."""
    seconds: tuple[float, ...]
    """Never falling."""

    @classmethod
    def through(cls, measured: Mapping[int, float]) -> "Curve":
        """The curve nearest to what was measured, by number of units."""
        units = sorted(measured)
        return cls(tuple(units), tuple(rising([measured[number] for number in units])))

    def share(self, units: int) -> float:
        """What part of the time of the largest number remains."""
        return self._at(units) / self.seconds[-1]

    @property
    def floor(self) -> float:
        """What part of that time no unit takes: where a line through the two smallest numbers meets none."""
        if len(self.units) < 2:
            return 0.0
        (first, second), (low, high) = self.units[:2], self.seconds[:2]
        at_none = low - first * (high - low) / (second - first)
        return max(at_none, 0.0) / self.seconds[-1]

    def _at(self, units: int) -> float:
        for (low, before), (high, after) in pairwise(zip(self.units, self.seconds, strict=True)):
            if units < high:
                return before + (after - before) * max(units - low, 0) / (high - low)
        return self.seconds[-1]


def rising(values: Sequence[float]) -> list[float]:
    """The never falling numbers that are nearest to `values` by least squares (isotonic regression: neighbours that
    fall are pooled, Barlow et al. 1972)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, many), (mean, more) = pools.pop(), pools.pop()
            pools.append(((mean * more + last * many) / (more + many), more + many))
    return [mean for mean, many in pools for _ in range(many)]


class LatencyTable:
    """Times of the parts of one model, from which those of what is made of it are told, in milliseconds.

    Args:
        model: the model, on any device; weights are not looked at.
        conditions: under which it is run.
        seconds: times parts; None: a `Stopwatch`, whose times are kept.

    Raises:
        PlanError: the model can't be run so; the message says why.
    """

    def __init__(self, model: PreTrainedModel, conditions: Conditions, seconds: Seconds | None = None) -> None:
        self.conditions = conditions
        self._before = skeleton_of(model)
        self._parts = TimedParts(self._before, conditions)
        self._seconds = seconds or self._by_stopwatch
        self._watch = Stopwatch(conditions)
        self._memory = Memory(torch.device(conditions.device))
        self._curves: dict[tuple[str, Stream], Curve | None] = {}
        self._known: dict[str, float] = {}
        self._narrowed: dict[tuple[str, Stream, int], TimedParts | None] = {}

    @cached_property
    def whole(self) -> float:
        """Of the model as it is."""
        return MILLISECONDS * sum(self._known[part.signature] for part in self._timed())

    def _timed(self) -> list[Part]:
        """The parts of the model as it is, whose times are known then."""
        parts = [self._parts.frame, *(self._parts.layer(path) for path in self._parts.layers)]
        if kinds := {part.signature: part for part in parts if part.signature not in self._known}:
            self._known |= zip(kinds, self._seconds(list(kinds.values())), strict=True)
        return parts

    def predicted(self, after: PreTrainedModel, origins: Mapping[str, str | None]) -> float:
        """Of a model that was made of it.

        Args:
            after: its skeleton.
            origins: the path that each of its modules had before; None for new ones.

        Raises:
            PlanError: a part of it can't be run.
        """
        self._timed()  # what is as before is known then
        parts = TimedParts(after, self.conditions)
        found = _anatomy(after, parts.layers)
        layers = [self._layer(parts, path, origins.get(path), found) for path in parts.layers]
        return MILLISECONDS * sum([self._frame(parts, found), *layers])

    def measured(self, after: PreTrainedModel) -> tuple[float, float] | None:
        """Of the model and of one that was made of it, both run as a whole; None where that takes long or much
        memory."""
        parts = [self._parts.whole, TimedParts(after, self.conditions).whole]
        if self.whole > MILLISECONDS * CHEAP_SECONDS or parts[0].bytes > CHEAP_BYTES:
            return None
        before, later = self._seconds(parts)
        return MILLISECONDS * before, MILLISECONDS * later

    def rows(self) -> list[str]:
        """What was timed until now, in words, one line for each kind of part."""
        kinds: dict[str, list[str]] = {}
        for path in self._parts.layers:
            kinds.setdefault(self._parts.layer(path).signature, []).append(path)
        rows = [f"around the layers {_told(self._known[self._parts.frame.signature])}"]
        for signature, paths in kinds.items():
            like = f" and {len(paths) - 1} like it" * (len(paths) > 1)
            rows.append(f"{paths[0]}{like} {_told(self._known[signature])}")
        for (name, stream), curve in self._curves.items():
            if curve is not None:
                points = zip(curve.units, curve.seconds, strict=True)
                place = kinds[name][0] if name in kinds else "around the layers"
                listed = ", ".join(f"{units}: {_told(seconds)}" for units, seconds in points)
                rows.append(f"{place} by {SETTINGS[stream]} {listed}")
        own = {*kinds, self._parts.frame.signature}
        rows += [f"a changed {name.split()[0]} {_told(time)}" for name, time in self._known.items() if name not in own]
        return rows

    def _by_stopwatch(self, parts: Sequence[Part]) -> list[float]:
        return self._watch.seconds([p.signature for p in parts], lambda: [part.run(self._memory) for part in parts])

    def _beside(self, part: Part, before: Part | None) -> float:
        """How long another part takes, which is no slower than that of the model which it was."""
        if part.signature not in self._known:
            if before is None:
                (self._known[part.signature],) = self._seconds([part])
            else:
                # In turns with what it was, so that what else the machine does now is in both.
                old, new = self._seconds([before, part])
                self._known[part.signature] = self._known[before.signature] * min(new / old, 1.0)
        return self._known[part.signature]

    # Of what was made of the model ------------------------------------------------------------------------------------

    def _frame(self, parts: TimedParts, found: Anatomy | None) -> float:
        part, before = parts.frame, self._parts.frame
        if part.signature in self._known:
            return self._known[part.signature]
        if found is not None and self._body is not None and found.sizes.residual < self._body.sizes.residual:
            curve = self._curve("", "residual")
            if curve is not None:
                return self._known[before.signature] * curve.share(found.sizes.residual)
        return self._beside(part, before)

    def _layer(self, parts: TimedParts, path: str, origin: str | None, found: Anatomy | None) -> float:
        part = parts.layer(path)
        if part.signature in self._known:
            return self._known[part.signature]
        if origin not in self._parts.layers:
            return self._beside(part, None)
        before = self._parts.layer(origin)
        share = None if found is None else self._share(parts, path, origin, found)
        return self._beside(part, before) if share is None else self._known[before.signature] * share

    def _share(self, parts: TimedParts, path: str, origin: str, found: Anatomy) -> float | None:
        """What is left of a layer's time, where it lost units and nothing else, and curves tell of these."""
        if self._body is None or not self._is_narrower(parts.model, path, origin):
            return None
        left, by_residual, floor = 1.0, 1.0, 0.0
        had, has = _units(self._body, origin), _units(found, path)
        for stream in (stream for stream in CUT if had.get(stream) != has.get(stream)):
            curve = self._curve(origin, stream)
            if curve is None:
                # Where heads and residual go together, the residual's curve has both.
                if stream == "query" and had["residual"] != has["residual"] and self._body.fields.heads_are_bound:
                    continue
                return None
            if stream == "residual":
                by_residual, floor = curve.share(has[stream]), curve.floor
            else:
                left -= 1 - curve.share(has[stream])
        if floor >= 1:
            return 1.0
        return floor + (by_residual - floor) * (max(left, floor) - floor) / (1 - floor)

    def _is_narrower(self, after: PreTrainedModel, path: str, origin: str) -> bool:
        """Whether a layer differs from what it was in the widths of streams alone."""
        assert self._body is not None
        old = dict(self._before.get_submodule(origin).named_parameters())
        new = dict(after.get_submodule(path).named_parameters())
        if old.keys() != new.keys():
            return False
        for name, parameter in new.items():
            axes = self._body.role(f"{origin}.{name}").axes
            for axis, (before, now) in enumerate(zip(old[name].shape, parameter.shape, strict=True)):
                streams = {segment.stream for segment in axes[axis]} if axis < len(axes) else set()
                if now != before and not streams <= {*CUT, "key_value"}:
                    return False
        return True

    # Curves -----------------------------------------------------------------------------------------------------------

    @cached_property
    def _body(self) -> Anatomy | None:
        return _anatomy(self._before, self._parts.layers)

    def _curve(self, layer: str, stream: Stream) -> Curve | None:
        """How the time of layers like one of the model, or of what is around them (""), falls with the units of a
        stream; None where no fewer are possible."""
        full = self._parts.layer(layer) if layer else self._parts.frame
        key = (full.signature, stream)
        if key not in self._curves:
            parts = {units: self._narrow(layer, stream, units) for units in self._sizes(layer, stream)}
            there = {units: narrow for units, narrow in parts.items() if narrow is not None}
            if there:
                seconds = self._seconds([full, *there.values()])
                most = _units(self._whole_body, layer)[stream]
                self._curves[key] = Curve.through(dict(zip([most, *there], seconds, strict=True)))
            else:
                self._curves[key] = None
        return self._curves[key]

    @property
    def _whole_body(self) -> Anatomy:
        assert self._body is not None
        return self._body

    def _sizes(self, layer: str, stream: Stream) -> list[int]:
        """The numbers of units that are timed, besides all of them."""
        body = self._whole_body
        most, step = _units(body, layer)[stream], 1
        if stream == "query":
            groups = body.sizes.at(layer).key_value_heads
            step = most // groups if groups > 1 else 1
        elif stream == "residual" and (body.fields.heads_are_bound or body.heads_divide_hidden_size):
            step = body.sizes.head_dim if body.fields.heads_are_bound else body.sizes.query_heads
        blocks = most // step
        return sorted({step * ceil(blocks * point / POINTS) for point in range(1, POINTS)} - {most})

    def _narrow(self, layer: str, stream: Stream, units: int) -> Part | None:
        """A layer, or what is around the layers, with fewer units of a stream; None where that is refused."""
        # The residual is one through all layers.
        key = ("" if stream == "residual" else layer, stream, units)
        if key not in self._narrowed:
            keep = dict.fromkeys(self._places(layer, stream), range(units))
            if stream == "residual" and self._whole_body.fields.heads_are_bound:
                keep["query", ""] = range(units // self._whole_body.sizes.head_dim)
            try:
                after = resolve(cut(self._before, keep).edits, self._before).after
            except PlanError:
                self._narrowed[key] = None
            else:
                self._narrowed[key] = TimedParts(after, self.conditions)
        found = self._narrowed[key]
        return None if found is None else found.layer(layer) if layer else found.frame

    def _places(self, layer: str, stream: Stream) -> list[tuple[Stream, str]]:
        scopes = narrowest_scopes(self._whole_body, stream)
        return [(stream, scope) for scope in scopes if encloses(scope, layer) or encloses(layer, scope)]


def _anatomy(model: PreTrainedModel, layers: Sequence[str]) -> Anatomy | None:
    """The anatomy of a model whose layers are told apart; None where it is not known."""
    try:
        return anatomy(model, scopes=layers)
    except PlanError:
        return None


def _units(body: Anatomy, layer: str) -> dict[Stream, int]:
    """The widths of a layer by their streams; of experts and others in it the largest."""
    found: dict[Stream, int] = {}
    for stream in CUT:
        inner = [scope for scope in body.scopes(stream) if layer and encloses(layer, scope)]
        units = [body.sizes.units(stream, scope) for scope in inner or [layer]]
        if known := [number for number in units if number is not None]:
            found[stream] = max(known)
    return found


def _told(seconds: float) -> str:
    return in_milliseconds(MILLISECONDS * seconds)


def in_milliseconds(value: float) -> str:
    """A latency in words, with four digits."""
    return f"{value:.4g} ms"
