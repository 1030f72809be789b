"""Plans: ordered edits with the promise they make, readable as a table and as YAML, checked before anything changes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import prod
from typing import Any, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting import count_parameters, flops_per_token
from auxin.edits.edit import Edit, PadParameter, ParameterEdit, SetConfig
from auxin.edits.structure import config_from_values, edited_config
from auxin.errors import PlanError
from auxin.models.loading import skeleton
from auxin.settings import Settings

Promise = Literal["exact", "approximate", "none"]


class Plan(Settings):
    """What a method wants done to a model; pure data, to be read, edited by hand, saved and applied."""

    method: str
    """The method that made the plan."""
    settings: dict[str, Any] = {}
    """The method's settings."""
    promise: Promise
    """What holds at the moment of the edit: `exact` (the same function, checked by `apply`), `approximate`, `none`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of all random numbers that the edits draw."""
    edits: list[Edit]
    """The edits, in order."""
    made_for: dict[str, Any] | None = None
    """The config of the model that the plan was made for, so that it can be shown without one; applying ignores it."""

    def __str__(self) -> str:
        head = f"{self.method}: promise {self.promise}, seed {self.seed}"
        if self.made_for is None:
            return "\n".join([head, *(f"  {describe_edit(edit)}" for edit in self.edits)])
        return f"{head}\n{self.table(config_from_values(self.made_for))}"

    def table(self, model: PreTrainedModel | PreTrainedConfig, sequence_length: int | None = None) -> str:
        """The plan as a table for `model` (or a config): edits, parameters and FLOPs per token before and after.

        The FLOPs of a row are those of the matrix products with its parameters; the last row counts the whole model,
        attention at `sequence_length` (default: the model's context length, at most 1024) included.

        Raises:
            PlanError: the plan does not fit.
        """
        before = skeleton(model) if isinstance(model, PreTrainedConfig) else model
        resolved = resolve(self, before)
        rows = [["module", "edit", "parameters", "FLOPs per token, forward"]]
        rows += [["(config)", str(edit), "", ""] for edit in self.edits if isinstance(edit, SetConfig)]
        rows += _parameter_rows(before, resolved.changes.values())
        if sequence_length is None:
            sequence_length = min(1024, getattr(before.config, "max_position_embeddings", 1024) or 1024)
        flops = [flops_per_token(m, sequence_length).forward for m in (before, resolved.after)]
        counts = [count_parameters(m).total for m in (before, resolved.after)]
        rows.append([f"(model, {sequence_length} tokens)", "", _arrow(*counts), _arrow(*map(round, flops))])
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


@dataclass
class ParameterChange:
    """What the plan does to one parameter."""

    name: str
    """The first of its names."""
    old_shape: tuple[int, ...]
    edits: list[tuple[int, ParameterEdit]] = field(default_factory=list)
    """The edits with their positions in the plan."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape before the first edit and after each."""
        shapes = [self.old_shape]
        for _, edit in self.edits:
            shapes.append(edit.new_shape(shapes[-1]))
        return shapes


@dataclass
class ResolvedPlan:
    """A plan that was found to fit a model."""

    before: PreTrainedModel
    """Skeleton of the model's config."""
    after: PreTrainedModel
    """Skeleton of the edited config; has the shapes that all parameters will have."""
    changes: dict[str, ParameterChange]
    """The parameters that change, by the first of their names."""


def describe_edit(edit: Edit) -> str:
    """One line for one edit."""
    return f"{edit.parameter}: {edit}" if isinstance(edit, PadParameter) else str(edit)


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter, by the first one; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def resolve(plan: Plan, model: PreTrainedModel) -> ResolvedPlan:
    """Check that `plan` fits `model` (weights are not looked at; the meta device serves) and find what it changes.

    Raises:
        PlanError: a path that does not exist, a shape that does not fit, edits that collide, or a config that asks for
            other shapes than the edits give; the message names the edit.
    """
    values: dict[str, Any] = {}
    changes: dict[str, ParameterChange] = {}
    names = parameter_names(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for index, edit in enumerate(plan.edits):
        if isinstance(edit, SetConfig):
            if twice := [key for key in edit.values if key in values]:
                raise _wrong(index, edit, f"{twice[0]} was set by an earlier edit; merge the two")
            values |= edit.values
        else:
            _add_changes(index, edit, names, shapes, changes)
    config_index = next((i for i, edit in enumerate(plan.edits) if isinstance(edit, SetConfig)), None)
    try:
        config = edited_config(model.config, values)
    except PlanError as error:
        assert config_index is not None
        raise _wrong(config_index, plan.edits[config_index], str(error)) from error
    resolved = ResolvedPlan(skeleton(model.config, type(model)), skeleton(config, type(model)), changes)
    _check_against_config(plan, resolved, shapes)
    return resolved


def planned_config(plan: Plan, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that `plan` makes of a model of `config`, which stays as it is.

    Raises:
        PlanError: the plan does not fit.
    """
    return resolve(plan, skeleton(config)).after.config


def _add_changes(
    index: int,
    edit: ParameterEdit,
    names: dict[str, list[str]],
    shapes: dict[str, tuple[int, ...]],
    changes: dict[str, ParameterChange],
) -> None:
    matching = [name for name, aliases in names.items() if any(edit.matches(alias) for alias in aliases)]
    if not matching:
        every = [alias for aliases in names.values() for alias in aliases]
        known = sorted({collapse(name) for name in every} if "*" in edit.parameter else set(every))
        near = get_close_matches(edit.parameter, known, n=1, cutoff=0.0)
        raise _wrong(index, edit, f"no parameter has this path. The nearest is {near[0] if near else '(none)'}")
    for name in matching:
        change = changes.setdefault(name, ParameterChange(name, shapes[name]))
        for other_index, other in change.edits:
            if edit.collides_with(other):
                raise _wrong(index, edit, f"collides with edit {other_index + 1}: both change {name}. Keep one of them")
        change.edits.append((index, edit))
        try:
            _ = change.shapes
        except PlanError as error:
            raise _wrong(index, edit, f"does not fit {name}: {error}") from error


def _check_against_config(plan: Plan, resolved: ResolvedPlan, shapes: dict[str, tuple[int, ...]]) -> None:
    """The shapes that the edits give must be those that the new config asks for, and no module may become another."""
    expected = {name: tuple(parameter.shape) for name, parameter in resolved.after.named_parameters()}
    if unknown := sorted(set(expected) ^ set(shapes)):
        raise PlanError(
            f"With the plan's config values the model has other parameters than before ({unknown[0]} and "
            f"{len(unknown) - 1} more), which no edit provides. Leave out the config value that changes them."
        )
    _check_modules(plan, resolved)
    for name, shape in expected.items():
        change = resolved.changes.get(name)
        result = change.shapes[-1] if change else shapes[name]
        if result == shape:
            continue
        blamed = f"Edit {change.edits[-1][0] + 1} ({describe_edit(change.edits[-1][1])})" if change else "No edit"
        raise PlanError(
            f"{blamed}: {name} has shape {list(result)} after the plan's edits, but the plan's config asks for "
            f"{list(shape)}. Make sizes and config values agree."
        )


def _check_modules(plan: Plan, resolved: ResolvedPlan) -> None:
    """Modules stay the objects they are, so that a config value that asks for other ones can't be followed."""
    before, after = ({n: type(m) for n, m in model.named_modules()} for model in (resolved.before, resolved.after))
    if before == after:
        return
    name = min(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    old, new = (types[name].__name__ if name in types else "nothing" for types in (before, after))
    values = ", ".join(str(edit) for edit in plan.edits if isinstance(edit, SetConfig))
    raise PlanError(
        f"With the plan's config values ({values}) the module {name} would be {new} instead of {old}, which is another "
        "function and which no edit provides. Leave out the config value that changes it."
    )


def _wrong(index: int, edit: Edit, problem: str) -> PlanError:
    return PlanError(f"Edit {index + 1} ({describe_edit(edit)}): {problem}.")


def collapse(name: str) -> str:
    """`name` with its layer numbers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _parameter_rows(model: PreTrainedModel, changes: Iterable[ParameterChange]) -> list[list[str]]:
    """One row for the parameters of all layers to which the same happens."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.discard(id(getattr(head, "weight", None)))
    only_looked_up = {name for name, parameter in model.named_parameters() if id(parameter) in tables}
    rows: dict[tuple[str, str], list[int]] = {}
    for change in changes:
        edits = "; ".join(str(edit) for _, edit in change.edits)
        sums = rows.setdefault((collapse(change.name), edits), [0, 0, 0, 0])
        for column, shape in enumerate((change.old_shape, change.shapes[-1])):
            sums[column] += prod(shape)
            if len(shape) == 2 and change.name not in only_looked_up:
                sums[2 + column] += 2 * prod(shape)
    return [[*key, _arrow(*sums[:2]), _arrow(*sums[2:])] for key, sums in rows.items()]


def _arrow(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"
