"""One language for all methods that make a model wider: a map per stream, and the edits that follow from the maps.

With y = x W^T + b every stream s (residual, query heads, key-value heads, feed-forward units) has an **encoder** R_s,
whose rows say where each new unit comes from, and a **decoder** C_s with C_s R_s = I, which readers use:

    embeddings E' = E R^T          matrices W' = R_out W C_in          biases and gains b' = R b
    untied head W' = W C           tied head: E' is given, so that the last norm's gain and offset take C instead

A `StreamMap` copies every unit some number of times, which its readers divide by, and can add units that copy none. It
is exact iff every norm commutes with the residual's encoder (equal copies, or padding with the norm's gain and
epsilon scaled), query heads keep the key-value head they read, and every old unit is still there. `widen` knows these
conditions and refuses, or promises less, where one does not hold.

Sources: Net2Net (1511.05641), staged training (2203.06211), LEMON (2310.07999), HyperCloning (2409.12903).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from auxin.edits.kinds.architecture_edits import SetConfig
from auxin.edits.kinds.edit import Edit
from auxin.edits.kinds.entry_edits import RouteParameter, ScaleEntries
from auxin.edits.kinds.fills import Fill, MeanFill, NormalFill, ZeroFill
from auxin.edits.kinds.layer_edits import JoinAbove
from auxin.edits.kinds.module_edits import ConfigureModule
from auxin.edits.kinds.parameter_edits import CentreParameter, PadParameter, ScaleParameter, SliceParameter
from auxin.edits.plan import Promise
from auxin.errors import PlanError
from auxin.planning.size_edits import layer_edits, size_edits, size_values
from auxin.planning.width_conditions import fatal_reasons, inexact_reasons, norm_scale, rotary_after
from auxin.planning.width_maps import Widening
from auxin.words.anatomy import Anatomy
from auxin.words.roles import HeadPart, ParameterRole, Segment, laid_out
from auxin.words.widths import SETTINGS, Sizes


@dataclass(frozen=True)
class Widened:
    """What a widening comes to."""

    edits: list[Edit]
    """The edits, the config's values first."""
    promise: Promise
    """What they promise."""
    reasons: tuple[str, ...]
    """Why that is not "exact"."""


def widen(
    anatomy: Anatomy, widening: Widening, approximate: bool = False, from_above: bool = False, cut: bool = False
) -> Widened:
    """The edits of a widening.

    Args:
        anatomy: of the model.
        widening: the maps. Those of narrower scopes are for scopes that the anatomy tells apart.
        approximate: accept maps that do not keep the function; the promise is then "approximate".
        from_above: further output units of a layer's matrices are those of the layer above (bert2BERT's AKI).
        cut: accept maps that lose units and copy none; see `auxin.planning.cutting`. They are approximate.

    Raises:
        PlanError: the maps do not keep the function and `approximate` is false, or they would make nonsense of it; the
            message says why and what would do.
    """
    fatal = fatal_reasons(anatomy, widening, from_above, cut)
    if fatal:
        raise PlanError(fatal[0])
    reasons = inexact_reasons(anatomy, widening)
    if reasons and not approximate:
        raise PlanError(reasons[0])
    writer = _Writer(anatomy, widening, from_above)
    edits = writer.size_edits()
    for role in anatomy.roles:
        edits += writer.edits(role)
    if not edits:
        raise PlanError(f"There is nothing to widen: the model already has {describe_sizes(anatomy)}. Ask for more.")
    return Widened(edits, "approximate" if reasons else "exact", tuple(reasons))


def diagonal_edits(anatomy: Anatomy, widening: Widening) -> list[Edit]:
    """What makes copy j of every matrix's outputs read copy j of its inputs, where `widening` made n equal copies of
    all streams. Readers whose outputs were not copied (the head) stay as they are."""
    copies = len(widening.residual.index) // widening.residual.old
    edits: list[Edit] = []
    for role in anatomy.roles:
        if role.kind == "matrix" and {"writes", "reads"} <= set(role.access):
            output_axis = role.access.index("writes")
            sizes = [copies * segment.size for segment in role.axes[output_axis]]
            dealt = any(segment.dealt for segment in role.axes[output_axis])
            stretches = [sum(sizes)] if dealt else sizes
            edits.append(
                RouteParameter(
                    parameter=role.pattern,
                    output_axis=output_axis,
                    input_axis=role.access.index("reads"),
                    copies=copies,
                    stretches=stretches,
                )
            )
    return edits


def describe_sizes(anatomy: Anatomy) -> str:
    """The model's widths by their names in the settings of methods, ranges where layers differ."""
    if anatomy.towers:
        return f"towers ({', '.join(anatomy.towers)}) with widths of their own"
    parts = []
    for stream, name in SETTINGS.items():
        if stream == "key_value" and not anatomy.fields.key_value_heads:
            continue
        found = {anatomy.sizes.units(stream, scope) for scope in anatomy.scopes(stream) or [""]} - {None}
        widths = sorted(units for units in found if units is not None)
        parts += [f"{name} = {' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))}"] if widths else []
    return ", ".join(parts)


class _Writer:
    """Writes down the edits of one parameter after the other."""

    def __init__(self, anatomy: Anatomy, widening: Widening, from_above: bool) -> None:
        self.anatomy, self.widening, self.from_above = anatomy, widening, from_above
        residual = widening.residual
        self.eta = norm_scale(anatomy, residual)
        self.growth = math.sqrt(residual.size / residual.old)

    def size_edits(self) -> list[Edit]:
        """The edits that say the widths: those of the config and those of modules."""
        if self.anatomy.fields.of_layers:
            return [*layer_edits(self.anatomy, self.widening)]
        said, modules = size_edits(self.anatomy, self.widening.sizes(self.anatomy.sizes))
        values = self._config_values(said, modules)
        return [*([SetConfig(values=values)] if values else []), *modules]

    def _config_values(self, said: Sizes, modules: Sequence[ConfigureModule]) -> dict[str, Any]:
        """The config's values after the widening, those that change."""
        values, epsilon = size_values(self.anatomy, said, modules), self.anatomy.fields.epsilon
        return values | ({epsilon: self.anatomy.epsilon * self.eta**2} if self.eta != 1 and epsilon else {})

    def edits(self, role: ParameterRole) -> list[Edit]:
        """The edits of the parameters of one role."""
        edits: list[Edit] = []
        if self._is_centred(role):
            edits += [
                CentreParameter(parameter=role.pattern, axis=axis)
                for axis in range(len(role.axes))
                if self._runs_along_residual(role, axis)
            ]
        joined = self._joined_with_above(role)
        edits += [joined] if joined else []
        for axis, segments in enumerate(role.axes):
            if joined and joined.axis == axis:
                edits += self._by_entries(role, axis, segments, joined=True)
            elif segments:
                edits += self._along(role, axis, segments)
        return edits + self._scales(role)

    def _along(self, role: ParameterRole, axis: int, segments: tuple[Segment, ...]) -> list[Edit]:
        maps = [self.widening.stream(segment) for segment in segments]
        turned = self.widening.head_dim != self.anatomy.sizes.head_dim and any(segment.parts for segment in segments)
        if not turned and all(m is None or m.is_identity for m in maps):
            return []
        if turned or len(segments) > 1:
            return self._by_entries(role, axis, segments)
        (stream,), (segment,) = maps, segments
        assert stream is not None
        divide = self._is_divided(role, axis)
        edits: list[Edit] = []
        if stream.index != tuple(range(stream.old)):
            index, unit = list(stream.index), segment.unit
            if stream.is_tiled:  # the same, said shortly
                index, unit = [0] * (len(index) // stream.old), unit * stream.old
            edits.append(self._slice(role, axis, index, unit, divide))
        if stream.added:
            fill = self._padding(role, axis) if segment.stream == "residual" else _silent(role, axis)
            size = stream.size * segment.unit
            edits.append(PadParameter(parameter=role.pattern, axis=axis, size=size, fill=fill))
        return edits

    def _slice(self, role: ParameterRole, axis: int, index: list[int], unit: int, divide: bool) -> SliceParameter:
        noisy = divide and role.access[axis] == "reads"
        noise = self.widening.noise if noisy else 0.0
        offset = self.anatomy.gain_offset if divide and role.kind == "gain" else 0.0
        return SliceParameter(
            parameter=role.pattern, axis=axis, index=index, unit=unit, divide=divide, offset=offset, noise=noise
        )

    def _padding(self, role: ParameterRole, axis: int) -> Fill:
        """What the residual's added units get: what they hold does not matter to readers, whose input there is zero
        behind the norm, so that these start random and can learn; zeros where there is no norm."""
        if role.access[axis] == "reads":
            return ZeroFill() if role.pattern in self.anatomy.unnormed_readers else NormalFill()
        if role.kind in ("gain", "scale"):
            return MeanFill()
        return MeanFill() if self.widening.padding == "mean" and role.kind != "offset" else ZeroFill()

    def _joined_with_above(self, role: ParameterRole) -> JoinAbove | None:
        """The edit that offers the outputs of the layer above to a matrix, bias or factor whose outputs grow."""
        if not self.from_above or role.kind not in ("matrix", "bias", "scale"):
            return None
        for stack in self.anatomy.stacks:
            name = role.pattern.removeprefix(f"{stack.path}.*.")
            if name == role.pattern:
                continue
            for axis, segments in enumerate(role.axes):
                maps = [self.widening.stream(segment) for segment in segments if role.access[axis] == "writes"]
                if any(m is not None and not m.is_identity for m in maps):
                    return JoinAbove(layers=stack.path, parameter=name, axis=axis)
        return None

    def _by_entries(
        self, role: ParameterRole, axis: int, segments: tuple[Segment, ...], joined: bool = False
    ) -> list[Edit]:
        """Entry by entry: heads of several kinds in one axis or of another dimension, outputs of the layer above."""
        places = _Places(self.anatomy, self.widening, role, axis, joined)
        index = places.index(segments)
        edits: list[Edit] = []
        if places.fresh > places.old:
            fill = _writing(role)
            edits.append(PadParameter(parameter=role.pattern, axis=axis, size=places.fresh, fill=fill))
        return [*edits, self._slice(role, axis, index, 1, self._is_divided(role, axis))]

    def _scales(self, role: ParameterRole) -> list[Edit]:
        """Factors on whole parameters: norms of a padded residual, tied heads, queries of another head dimension."""
        edits: list[Edit] = []
        offset = self.anatomy.gain_offset if role.kind == "gain" else 0.0
        factor = self.eta if role.kind == "gain" and self._runs_along_residual(role, 0) else 1.0
        if self._is_read_by_tied_head(role) and (self.anatomy.logits_scaled or self.anatomy.embedding_scaled):
            factor *= self.growth
        if role.kind == "length":
            factor *= self.growth
        if self.anatomy.logits_scaled and not self.anatomy.tied and role.pattern == f"{self.anatomy.head}.weight":
            factor *= self.growth  # T5 divides the logits of a head of its own, too, where its config says so
        if self.anatomy.embedding_scaled and role.pattern in self.anatomy.token_embeddings:
            factor /= self.growth
        if role.kind in ("matrix", "bias") and self.anatomy.qk_norm != "none" and _parts(role) & {"query", "key"}:
            # The norm on queries and keys has the same epsilon, which shrank; its input shrinks with it.
            factor *= self.eta
        if factor != 1:
            edits.append(ScaleParameter(parameter=role.pattern, factor=factor, offset=offset))
        return edits + self._query_scale(role)

    def _query_scale(self, role: ParameterRole) -> list[Edit]:
        """Scores are divided by the root of the head dimension, so that queries make up for a larger one."""
        old, new = self.anatomy.sizes.head_dim, self.widening.head_dim
        if old == new or not self.anatomy.attention_scaled or role.kind == "scale":
            return []
        axis = next((a for a, how in enumerate(role.access) if how == "writes" and _has_query(role.axes[a])), None)
        if axis is None:
            return []
        factor, segments = math.sqrt(new / old), role.axes[axis]
        if segments[0].parts == ("query",) and len(segments) == 1:
            return [ScaleParameter(parameter=role.pattern, factor=factor)]
        query = self.widening.stream(segments[0])
        assert query is not None
        heads, step = query.size, len(segments[0].parts) * new
        entries = {head * step + dim for head in range(heads) for dim in range(new)}
        places = laid_out(
            segments, [self._units(segment) for segment in segments], [len(s.parts) * new for s in segments]
        )
        index = [place for place, entry in enumerate(places) if entry in entries]
        return [ScaleEntries(parameter=role.pattern, factor=factor, axis=axis, index=index)]

    def _units(self, segment: Segment) -> int:
        """Units of a segment after the growth."""
        stream = self.widening.stream(segment)
        return segment.count if stream is None else stream.size

    def _is_divided(self, role: ParameterRole, axis: int) -> bool:
        """Whether entries are divided by their copies: those of readers, and those of the norm before a tied head."""
        maps = [self.widening.stream(segment) for segment in role.axes[axis]]
        if any(m is not None and m.is_cut for m in maps):
            return False
        return role.access[axis] == "reads" or self._is_read_by_tied_head(role)

    def _is_read_by_tied_head(self, role: ParameterRole) -> bool:
        """Whether the parameter belongs to the last norm, whose output the token embedding reads as a head."""
        final, residual = self.anatomy.final_norm, self.widening.residual
        return (
            self.anatomy.tied
            and final is not None
            and not residual.is_identity
            and role.pattern.rpartition(".")[0] == final
        )

    def _is_centred(self, role: ParameterRole) -> bool:
        """Whether the mean of what the parameter writes is taken off, for a LayerNorm to take padding with zeros."""
        return (
            self.anatomy.norm == "layer"
            and self.widening.residual.added > 0
            and self.widening.padding == "zeros"
            and role.kind in ("matrix", "bias", "embedding")
            and role.along("residual", "writes")
        )

    @staticmethod
    def _runs_along_residual(role: ParameterRole, axis: int) -> bool:
        return role.access[axis] == "writes" and any(segment.stream == "residual" for segment in role.axes[axis])


class _Places:
    """Where the new entries of an axis come from, one by one."""

    def __init__(self, anatomy: Anatomy, widening: Widening, role: ParameterRole, axis: int, joined: bool) -> None:
        self.anatomy, self.widening = anatomy, widening
        self.reads, self.is_scale = role.access[axis] == "reads", role.kind == "scale"
        size = sum(segment.size for segment in role.axes[axis])
        self.above = size if joined else 0
        """How much further back the same entry of the layer above is; 0 where it is not to be used."""
        self.old = size + self.above
        """Entries of the axis before."""
        self.fresh = self.old
        """As many after padding with random entries, which the new heads take one after the other."""
        self.dims = (anatomy.sizes.head_dim, widening.head_dim)
        self.rotary = (anatomy.rotary_dim, rotary_after(anatomy, widening.head_dim))

    def index(self, segments: tuple[Segment, ...]) -> list[int]:
        """The old entry of every new one; -1 for zeros, those from `old` on for random ones."""
        index = self._one_after_the_other(segments)
        if not any(segment.dealt for segment in segments):
            return index
        maps = [self.widening.stream(segment) for segment in segments]
        units = [m.size for m in maps if m is not None]
        now = laid_out(segments, units, [sum(self._sizes(segment)) for segment in segments])
        before = laid_out(segments, [segment.count for segment in segments], [segment.unit for segment in segments])
        size = len(before)
        where = dict(zip(before, range(size), strict=True))
        # Those of the layer above lie behind, in the same order.
        where |= {entry + size: place + size for entry, place in where.items()} if self.above else {}
        return [where.get(index[entry], index[entry]) for entry in now]

    def _sizes(self, segment: Segment) -> tuple[int, ...]:
        """Entries of the parts of a unit after the growth; those of one without parts are its own."""
        if not segment.parts:
            return (segment.unit,)
        before, after = self.dims
        return segment.sizes_of_parts if before == after else (after,) * len(segment.parts)

    def _one_after_the_other(self, segments: tuple[Segment, ...]) -> list[int]:
        """The same for an axis whose segments lie one after the other."""
        index: list[int] = []
        start = 0
        for segment in segments:
            stream = self.widening.stream(segment)
            assert stream is not None
            for place, unit in enumerate((*stream.index, *(None,) * stream.added)):
                first = None if unit is None else start + unit * segment.unit
                if first is not None and place >= stream.old:
                    first += self.above
                offset = first
                for part, before, after in zip(
                    segment.parts, segment.sizes_of_parts, self._sizes(segment), strict=False
                ):
                    index += [self._entry(part, offset, dim, before, after) for dim in range(after)]
                    offset = None if offset is None else offset + before
                if not segment.parts:
                    index += [self._new() if first is None else first + dim for dim in range(segment.unit)]
            start += segment.size
        return index

    def _entry(self, part: HeadPart, offset: int | None, dim: int, before: int, after: int) -> int:
        """The old entry for dimension `dim` of a part whose old dimensions, `before` of them, begin at `offset`; None
        for a new head."""
        if offset is None:
            return self._new()
        old = dim % before if part == "value" or before == after else self._turned(dim)
        if old is not None:
            return offset + old
        # A product of two zeros would never learn: queries get zeros, keys random numbers, factors of them others.
        return self._new() if part == "key" or self.is_scale else -1

    def _turned(self, dim: int) -> int | None:
        """The old dimension of a query or key at `dim`: rotated pairs (i, i + r/2) go to (m i, m i + r'/2), or
        (2i, 2i + 1) to (2 m i, 2 m i + 1), which turns as fast; the others stay in order behind them."""
        (old, new), (old_dims, _) = self.rotary, self.dims
        neighbours = self.anatomy.rotary_pairs == "neighbours"
        if dim >= new:
            kept = old + dim - new
            return kept if kept < old_dims else None
        times, half = new // old, new // 2
        pair, second = (dim // 2, dim % 2 == 1) if neighbours else (dim % half, dim >= half)
        if pair % times:
            return None
        return 2 * (pair // times) + second if neighbours else pair // times + (old // 2 if second else 0)

    def _new(self) -> int:
        """The next random entry, or a zero where the axis is read."""
        if self.reads:
            return -1
        self.fresh += 1
        return self.fresh - 1


def _silent(role: ParameterRole, axis: int) -> Fill:
    """What an added head or feed-forward unit gets: random writers whose output is read by zeros."""
    return ZeroFill() if role.access[axis] == "reads" else _writing(role)


def _writing(role: ParameterRole) -> Fill:
    """New entries that write: random, but for factors, which are as the old ones on average."""
    return MeanFill() if role.kind == "scale" else NormalFill()


def _has_query(segments: tuple[Segment, ...]) -> bool:
    return any("query" in segment.parts for segment in segments)


def _parts(role: ParameterRole) -> set[str]:
    """Which parts of heads the parameter writes."""
    return {
        part
        for segments, access in zip(role.axes, role.access, strict=True)
        if access == "writes"
        for segment in segments
        for part in segment.parts
    }
