"""Taking single units of single layers out of a model: cut where the architecture takes other numbers, else silenced.

What cuts is `auxin.planning.cutting`. Where a layer can't have fewer units than the others (heads of BERT, whose
dimension is hidden size / heads; heads with ALiBi; units that the config works out), the columns that read them become
zero: the function is that of the model in which the units are masked, and nothing gets smaller.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from auxin.edits import Edit
from auxin.edits.kinds.parameter_edits import ABSENT_UNIT, SliceParameter
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.cutting import cut
from auxin.planning.target import removal
from auxin.planning.unit_order import Place
from auxin.words.anatomy import Anatomy
from auxin.words.paths import encloses


def without_units(model: PreTrainedModel, gone: Mapping[Place, Sequence[int]]) -> tuple[list[Edit], dict[Place, str]]:
    """The edits that take units out of `model`, and of the places where they are silenced alone why that is.

    Args:
        model: the model, on any device; weights are not looked at.
        gone: the units, counted from 0, by stream ("query", "key_value" for key-value heads with the query heads that
            read them, or one of the feed-forward streams) and layer; not all of a layer's.

    Raises:
        PlanError: an unknown architecture, or units that nothing is known to read.
    """
    body = anatomy(model, scopes=list(dict.fromkeys(scope for _, scope in gone)))
    taken = dict(_of_queries(body, place, units) for place, units in gone.items())
    kept = {
        (stream, scope): [unit for unit in range(body.sizes.units(stream, scope) or 0) if unit not in units]
        for (stream, scope), units in taken.items()
    }
    silent: dict[Place, str] = {}
    try:
        edits = _cut(model, kept)
    except PlanError:
        silent = {place: reason for place in kept if (reason := _why_not(model, {place: kept[place]}))}
        cuttable = {place: units for place, units in kept.items() if place not in silent}
        if reason := _why_not(model, cuttable):  # one tensor in two layers, say, of which other units would stay
            silent |= dict.fromkeys(cuttable, reason)
            cuttable = {}
        edits = _cut(model, cuttable)
    for place in silent:
        edits += _silenced(model, body, place, taken[place])
    return edits, silent


def _cut(model: PreTrainedModel, kept: Mapping[Place, Sequence[int]]) -> list[Edit]:
    """The edits that cut, which fit; PlanError where the architecture does not take it."""
    if not kept:
        return []
    edits = list(cut(model, kept).edits)
    removal(model, edits)
    return edits


def _why_not(model: PreTrainedModel, kept: Mapping[Place, Sequence[int]]) -> str:
    """Why units can't be cut; empty where they can."""
    try:
        _cut(model, kept)
    except PlanError as error:
        return str(error)
    return ""


def _of_queries(body: Anatomy, place: Place, units: Sequence[int]) -> tuple[Place, set[int]]:
    """A place and its units, key-value heads as the query heads that read them."""
    stream, scope = place
    if stream != "key_value":
        return place, set(units)
    sizes = body.sizes.at(scope)
    group = sizes.query_heads // sizes.key_value_heads
    return ("query", scope), {unit * group + one for unit in units for one in range(group)}


def _silenced(model: PreTrainedModel, body: Anatomy, place: Place, gone: set[int]) -> list[Edit]:
    """Zeros for what reads some units."""
    stream, scope = place
    found: list[Edit] = []
    for name, _ in model.named_parameters():
        read = body.role(name).units_read
        if encloses(scope, name) and read is not None and read[1].stream == stream:
            axis, segment = read
            index = [ABSENT_UNIT if unit in gone else unit for unit in range(segment.count)]
            found.append(SliceParameter(parameter=name, axis=axis, index=index, unit=segment.unit))
    if not found:
        raise PlanError(f"{scope}: no matrix is known that reads its units of {stream}. Leave them in.")
    return found
