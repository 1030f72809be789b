"""Checking that an edited model computes what it computed before."""

import torch
from torch import Tensor, nn

from auxin.edits.plan import Plan
from auxin.edits.probe import INNER, LOGITS, Outputs
from auxin.errors import PlanError, PromiseError

TOLERANCE = 1e-5
MAPS = "feature_maps"
"""How the names of a backbone's hidden states begin."""
EMBEDDINGS = "_embeds"
"""How the names of a pair's embeddings end, which may lie below the logits of pairs."""


def tolerance(model: nn.Module) -> float:
    """How far the outputs of a kept promise may move, each relative to its largest value.

    1e-5 in float32, and in float64 too, since constants and norms of most architectures stay in float32; eight units in
    the last place of the coarsest parameter type below that: 0.0625 in bfloat16, 0.0078 in float16.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max([TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize < 4)])


def relative_change(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|: 0 when nothing moved, infinite if shapes differ or values aren't finite."""
    if before.shape != after.shape:
        return float("inf")
    dtype = torch.promote_types(before.dtype, torch.float32)
    largest, moved = before.to(dtype).abs().max().item(), (after.to(dtype) - before.to(dtype)).abs().max().item()
    if moved == 0:
        return 0.0
    return moved / largest if 0 < largest < float("inf") and moved == moved else float("inf")


def measured_change(plan: Plan, before: Outputs, after: Outputs, allowed: float) -> float | None:
    """How far the outputs moved, where that is a number: of the largest `relative_change` among them. Of outputs that
    are wider than before, as the hidden states of a wider model without a head, those entries count that there were.

    None, for plans that promise nothing, where outputs have another shape than before or were all zero: nothing is to
    be compared.

    Args:
        plan: what was done.
        before, after: the outputs.
        allowed: the change up to which an exact plan counts as kept.

    Raises:
        PlanError: the outputs were not finite before the edit.
        PromiseError: they are not finite after it, they moved farther than an exact plan may move them, or there is
            nothing to compare and the plan promised something.
    """
    _check_finite(plan, before, "before")
    _check_finite(plan, after, "after")
    before, after = _comparable(before, after)
    changes = {name: relative_change(before[name], after[name]) for name in before if name in after}
    name = max(changes, key=changes.__getitem__, default=None)
    if name is not None and before.keys() == after.keys() and changes[name] != float("inf"):
        if plan.promise == "exact" and changes[name] > allowed:
            small = changes[name] < 100 * allowed and before[name].dtype != torch.float64
            rounding = " So small a change may be rounding alone, which the model in float64 would tell." * small
            raise PromiseError(
                f"The plan of {plan.method} promised to keep the function, but the {_called(name)} moved by "
                f"{changes[name]:.3g} of the largest one (allowed: {allowed:.3g}). Nothing was changed.{rounding} "
                "Correct the plan, or let it promise less."
            )
        return changes[name]
    if plan.promise == "none":
        return None
    if name is None or before.keys() != after.keys():
        what = f"are {', '.join(after)} and were {', '.join(before)}"
    elif before[name].shape != after[name].shape:
        what = f"have shape {list(after[name].shape)} and had {list(before[name].shape)}"
    else:
        what = "were all zero"
    which = "" if name in (None, LOGITS) else f" ({name})"
    raise PromiseError(
        f"The plan of {plan.method} promises {plan.promise!r}, but the outputs{which} {what}: no telling how far they "
        "moved. Nothing was changed. Let the plan promise 'none', or give a probe on which it can be told."
    )


def _comparable(before: Outputs, after: Outputs) -> tuple[Outputs, Outputs]:
    """The outputs whose values can be held against each other.

    Hidden states of a wider model without a head have more entries than before: the old units come first, copies and
    new ones behind them. Embeddings that became wider (SigLIP's are hidden states of length 1) are left out where there
    are logits of pairs, which alone they serve.
    """
    served = any(LOGITS in name for name in before)
    wider = [name for name in before if name in after and _is_wider(before[name], after[name])]
    left = {name for name in wider if served and name.endswith(EMBEDDINGS)}
    inner = [name for name in wider if name.endswith(INNER) or name.startswith(MAPS)]
    old = {name: after[name][tuple(map(slice, before[name].shape))] for name in inner}
    kept = {name: old.get(name, value) for name, value in after.items() if name not in left}
    return {name: value for name, value in before.items() if name not in left}, kept


def _is_wider(before: Tensor, after: Tensor) -> bool:
    """Whether one axis is longer, that of the units: the last one, or in maps of features the second."""
    pairs = list(zip(before.shape, after.shape, strict=False))
    longer = [old < new for old, new in pairs if old != new]
    return before.dim() == after.dim() and longer == [True]


def _check_finite(plan: Plan, outputs: Outputs, when: str) -> None:
    for name, values in outputs.items():
        if not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            message = (
                f"{bad} of {values.numel()} {_called(name)} are not finite on the probe {when} the edits of "
                f"{plan.method}. Nothing was changed. "
            )
            if when == "before":
                raise PlanError(message + "Mend the model, or probe it with other inputs.")
            raise PromiseError(message + "Correct the plan: some of its factors or values are too large.")


def _called(name: str) -> str:
    return name if name.endswith(LOGITS) else f"values of {name}"
