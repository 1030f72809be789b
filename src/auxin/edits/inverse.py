"""The plan that takes a plan back."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.kinds.architecture_edits import SetConfig
from auxin.edits.kinds.edit import describe_edit
from auxin.edits.kinds.layer_edits import ArrangeLayers
from auxin.edits.kinds.module_edits import (
    ConfigureModule,
    MergeModule,
    RemoveModule,
    ReplaceModule,
    ResizeModule,
    WrapModule,
)
from auxin.edits.kinds.parameter_edits import ParameterEdit
from auxin.edits.origin import Step
from auxin.edits.plan import Plan
from auxin.edits.resolution import resolve
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.configs import config_holding


def inverse_plan(plan: Plan, model: PreTrainedModel) -> Plan:
    """The plan that makes of the edited model what `model` is now, up to rounding and noise.

    Padded entries are cut off, copies dropped, divisions multiplied back, wrappers taken off, layers put where they
    were.

    Args:
        plan: a plan that fits `model`.
        model: the model before `plan`; its weights are not looked at.

    Raises:
        PlanError: an edit loses what can't be had back; the message names it.
    """
    if changed_files := [*plan.drops, *(file.into for file in plan.files if file.into)]:
        raise PlanError(
            f"The plan changes files of the checkpoint ({', '.join(changed_files)}), and no inverse brings them back: "
            "keep the checkpoint that it was applied to."
        )
    resolved = resolve(plan.edits, model)
    gone = _copies(plan, model)
    steps: dict[int, list[Step]] = {}
    for origin in resolved.origins.values():
        for step in origin.steps:
            # What happened to a copied layer goes with it.
            if not any(step.index > index and step.name.startswith(layer) for layer, index in gone.items()):
                steps.setdefault(step.index, []).append(step)
    back: list[Any] = []
    for index in reversed(range(len(plan.edits))):
        if isinstance(plan.edits[index], ConfigureModule | ResizeModule):
            back += resolved.configured[index]
        else:
            back += _undone(plan, index, model, resolved.after, steps.get(index, []))
    changed = {key: value for edit in plan.edits if isinstance(edit, SetConfig) for key, value in edit.values.items()}
    if changed:
        back.append(SetConfig(values={key: _old_value(resolved.before.config, key) for key in changed}))
    return Plan(
        method=f"inverse of {plan.method}",
        promise=plan.promise,
        vocabulary=plan.vocabulary,
        seed=plan.seed,
        edits=back,
        made_for=config_values(resolved.after.config),
    )


def _old_value(config: PreTrainedConfig, key: str) -> Any:
    """The value that `key`, which may be dotted, has in `config`, as plans write it."""
    holder, name = config_holding(config, key)
    return holder.to_dict().get(holder.attribute_map.get(name, name))


def _copies(plan: Plan, model: PreTrainedModel) -> dict[str, int]:
    """Path prefixes of the copied and fresh layers that the way back drops, with the edits that made them."""
    found: dict[str, int] = {}
    for index, edit in enumerate(plan.edits):
        if isinstance(edit, ArrangeLayers):
            back = edit.inverse(_length(model, edit))
            kept = set(range(len(edit.order))) if back is None else set(back.order)
            found |= {f"{edit.layers}.{place}.": index for place in range(len(edit.order)) if place not in kept}
    return found


def _length(model: PreTrainedModel, edit: ArrangeLayers) -> int:
    stack = model.get_submodule(edit.layers)
    assert isinstance(stack, nn.ModuleList)
    return len(stack)


def _undone(plan: Plan, index: int, model: PreTrainedModel, after: PreTrainedModel, steps: list[Step]) -> list[Any]:
    """The edits that take one edit back."""
    edit: Any = plan.edits[index]
    found: list[Any] | None = None
    if isinstance(edit, SetConfig):
        return []
    if isinstance(edit, ParameterEdit):
        found = _parameter_undone(edit, steps)
    elif isinstance(edit, ArrangeLayers):
        arranged = edit.inverse(_length(model, edit))
        found = None if arranged is None else [arranged]
    elif isinstance(edit, ReplaceModule):
        found = _merged(edit, after)
    elif isinstance(edit, WrapModule):
        found = [RemoveModule(module=edit.module, leaves="inner")]
    if found is None:
        raise PlanError(f"Edit {index + 1} ({describe_edit(edit)}) has no inverse: it loses what can't be had back.")
    return found


def _merged(edit: ReplaceModule, after: PreTrainedModel) -> list[Any] | None:
    """The edit that merges the brick back; None where the brick knows no way back, or it stands there no more."""
    merge = MergeModule(module=edit.module)
    try:
        resolve([merge], after)
    except PlanError:
        return None
    return [merge]


def _parameter_undone(edit: ParameterEdit, steps: list[Step]) -> list[ParameterEdit] | None:
    """One edit for all parameters where they had one shape, otherwise one for each."""
    if not steps:
        return []
    if len({step.old_shape for step in steps}) == 1:
        return edit.inverse(steps[0].old_shape)
    undone: list[ParameterEdit] = []
    for step in {step.name: step for step in steps}.values():
        inverse = edit.model_copy(update={"parameter": step.name}).inverse(step.old_shape)
        if inverse is None:
            return None
        undone += inverse
    return undone
