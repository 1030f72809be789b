"""What the changes in a model's books made of what was there before them."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

from transformers import PreTrainedModel

from auxin.accounting import Ledger
from auxin.edits import AverageRows, CentreParameter, PadParameter, Plan, ScaleParameter, SliceParameter
from auxin.edits.origin import Joined, Made, Origin
from auxin.edits.resolution import ResolvedPlan, resolve
from auxin.edits.structure import config_from_values, edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.models.anatomy import anatomy
from auxin.models.layers import layer_paths

OldShapes = dict[str, tuple[int, ...]]
"""By a parameter's name the shape of its old entries, which are the first ones along every axis."""
KEEPS_IN_FRONT = (PadParameter, ScaleParameter, CentreParameter)
"""Edits after which the old entries of a parameter are its first ones."""
KEEPS_UNITS = (PadParameter, SliceParameter, ScaleParameter, AverageRows)
"""Edits after which the entries along the axes that are not theirs are what they were."""


def changes_since_training(ledger: Ledger) -> list[Plan]:
    """The plans of the changes after the last training, in order."""
    plans: list[Plan] = []
    for record in reversed(ledger.stages):
        if record.kind == "train":
            break
        if record.kind == "change" and record.plan is not None:
            plans.insert(0, Plan.model_validate(record.plan))
    return plans


def last_changes(ledger: Ledger, asked: str) -> list[Plan]:
    """The plans of the last changes that no training lies between, in order.

    Raises:
        ConfigError: there is none; `asked` says what asked for it.
    """
    stages = ledger.stages
    while stages:
        if plans := changes_since_training(Ledger(stages=stages)):
            return plans
        stages = stages[:-1]
    raise ConfigError(
        f"{asked} is for what was there before the last change, but the model's ledger records no change. Leave it "
        "out, or train after a change stage."
    )


def old_shapes(plans: list[Plan]) -> OldShapes:
    """The entries that were there before `plans`, by the parameters' names after them.

    A parameter that grew holds its old entries in front; of a layer's copies the first is the old one.

    Raises:
        PlanError: a plan mixes old entries with new ones.
    """
    if plans[0].made_for is None:
        raise PlanError(
            f"The plan by {plans[0].method} does not say what it was made for, so that there is no telling old entries "
            "from new ones. Give it made_for, the config before it, or leave out the hook old_rates."
        )
    model = edited_skeleton(config_from_values(plans[0].made_for))
    shapes: OldShapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for plan in plans:
        resolved = resolve(plan.edits, model)
        model = resolved.after
        left = dict(shapes)
        shapes = {}
        for name, _ in model.named_parameters():
            origin = resolved.origins[name]
            told_apart = origin.is_fresh or origin.kept is not None
            if not told_apart or not all(isinstance(step.edit, KEEPS_IN_FRONT) for step in origin.steps):
                raise PlanError(
                    f"The change by {plan.method} makes {name} out of old entries and new ones alike, so that there is "
                    "no telling them apart. Leave out the hook old_rates."
                )
            if origin.kept in left:
                shapes[name] = left.pop(origin.kept)
    return shapes


def changes_between(ancestor: Ledger, descendant: Ledger) -> list[Plan] | None:
    """The plans of the changes that made the model of `descendant` out of that of `ancestor`, in order, whatever either
    was trained on since they parted; None where the books don't tell: they have no beginning in common, or `ancestor`
    was changed since."""
    old, new = ([record for record in books.stages if record.kind != "evaluate"] for books in (ancestor, descendant))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    if not shared or any(record.plan is not None for record in old[shared:]):
        return None
    return [Plan.model_validate(record.plan) for record in new[shared:] if record.plan is not None]


def resolved_in_turn(plans: Sequence[Plan], model: PreTrainedModel) -> list[ResolvedPlan]:
    """What each of `plans`, applied one after the other to `model`, makes of what those before it left.

    Raises:
        PlanError: a plan does not fit.
    """
    found: list[ResolvedPlan] = []
    for plan in plans:
        found.append(resolve(plan.edits, found[-1].after if found else model))
    return found


def layers_made_from(changes: Sequence[ResolvedPlan], model: PreTrainedModel) -> dict[int, int]:
    """By a layer's number in what `changes` make of `model`, the layer of `model` that it was made from.

    A layer was made from another one if all its parameters that come from layers come from that one: kept, cut, padded,
    or made anew out of its own. Copies were all made from the layer that they are copies of; layers that are new, or
    blended of several, from none.

    Args:
        changes: as by `resolved_in_turn`.
        model: the model before; its weights are not looked at.

    Raises:
        PlanError: the layers of the architecture are not known.
    """
    found = {number: number for number in range(len(layer_paths(model)))}
    for change in changes:
        found = {new: found[old] for new, old in _sources(change).items() if old in found}
    return found


def units_made_from(changes: Sequence[ResolvedPlan], model: PreTrainedModel) -> tuple[int, ...] | None:
    """By a unit's number in the residual stream of what `changes` make of `model`, the unit of `model` that it was made
    from: those that were left by a cut, or that copies are of. None where they are the same ones, or some come from
    none, as padding does, or from several.

    Args:
        changes: as by `resolved_in_turn`.
        model: the model before; its weights are not looked at.

    Raises:
        PlanError: the architecture's anatomy is not known, or no parameter tells.
    """
    same = found = tuple(range(anatomy(model).sizes.residual))
    for change in changes:
        old = _old_units(change)
        if old is None:
            return None
        found = tuple(found[unit] for unit in old)
    return None if found == same else found


def _old_units(change: ResolvedPlan) -> list[int] | None:
    """The same for one plan: a parameter that writes the residual and came through tells it of all, as there is one
    stream."""
    body = anatomy(change.after)
    for name, origin in change.origins.items():
        role = next((role for role in body.roles if role.matches(name)), None)
        if role is None or origin.kept is None:
            continue
        for axis, segments in enumerate(role.axes):
            if role.access[axis] == "writes" and [segment.stream for segment in segments] == ["residual"]:
                return _followed(origin, axis)
    raise PlanError("No parameter that writes the residual stream was there before the change and is after it.")


def _followed(origin: Origin, axis: int) -> list[int] | None:
    """By an entry of a parameter along `axis` the old one that it was; None where one was none, or several."""
    entries = list(range(origin.source_shape[axis]))
    for step in origin.steps:
        edit = step.edit
        if isinstance(edit, SliceParameter) and edit.axis == axis:
            chosen = [unit * edit.unit + entry for unit in edit.index for entry in range(edit.unit)]
            if min(chosen) < 0:
                return None
            entries = [entries[place] for place in chosen]
        elif getattr(edit, "axis", None) == axis or not isinstance(edit, KEEPS_UNITS):
            return None
    return entries


def _sources(resolved: ResolvedPlan) -> dict[int, int]:
    """By a layer's number after one plan, that of the layer before which it was made from."""
    before, after = _Numbers(resolved.before), _Numbers(resolved.after)
    sources: dict[int, set[int]] = {}
    for name, origin in resolved.origins.items():
        new = after.layer_of(name)
        if new is not None:
            old = (before.layer_of(read) for read in _own_reads(origin))
            sources.setdefault(new, set()).update(number for number in old if number is not None)
    return {new: next(iter(old)) for new, old in sources.items() if len(old) == 1}


def _own_reads(origin: Origin) -> Iterator[str]:
    """The old tensors that a parameter is made of, without those that were put behind its own for a choice."""
    match origin.source:
        case Joined(names):
            yield names[0]
        case Made(group):
            for part in group.inputs.values():
                yield from _own_reads(part)
        case _:
            yield from origin.reads


class _Numbers:
    """The numbers of a model's layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._numbers = {path: number for number, path in enumerate(layer_paths(model))}

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a parameter lies in; None outside of layers."""
        parts = name.split(".")
        paths = (".".join(parts[:length]) for length in range(1, len(parts)))
        return next((self._numbers[path] for path in paths if path in self._numbers), None)
