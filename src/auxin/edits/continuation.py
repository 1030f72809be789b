"""Going on with AdamW after an edit exactly as it would have gone on before it."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from auxin.edits.executor import Receipt
from auxin.edits.kinds.rate import Rate
from auxin.errors import PlanError


def continue_exactly(optimizer: Optimizer, model: nn.Module, receipt: Receipt) -> None:
    """Regroup `optimizer` so that its next steps on the edited `model` are those of the model before.

    Every parameter's learning rate, weight decay and epsilon are those of its group times the factors of `receipt`;
    parameters with the same factors share a group, and schedulers that multiply the groups' rates go on working.
    Gradient clipping sees another norm than before; without it the steps agree up to rounding.

    Args:
        optimizer: the optimizer that was given to `apply`; AdamW or Adam (decoupled weight decay is assumed).
        model: the edited model.
        receipt: what `apply` gave back.

    Raises:
        PlanError: for some parameter no such factors exist; the message names it and says why. Nothing was changed.
    """
    if receipt.plan.promise != "exact":
        raise PlanError(
            f"The plan of {receipt.plan.method} promises {receipt.plan.promise!r}: there is no exact way to go on. "
            "Train on with a warm-up instead."
        )
    for name, rate in receipt.continuation.items():
        if not rate.exact:
            raise PlanError(
                f"{name} has no exact continuation: its copies are uneven, or it holds new values that learn from the "
                "first step on. Train on with a warm-up instead, or choose copies that come out even."
            )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        groups += _split(group, names, receipt.continuation)
    optimizer.param_groups[:] = groups


def _split(group: dict[str, Any], names: Mapping[int, str], rates: Mapping[str, Rate]) -> list[dict[str, Any]]:
    """The group as several, one for every pair of factors; the unchanged parameters come first."""
    members: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, 1.0): []}
    for parameter in group["params"]:
        rate = rates.get(names.get(id(parameter), ""), Rate())
        members.setdefault((rate.lr, rate.eps), []).append(parameter)
    result = []
    for (lr, eps), parameters in members.items():
        if parameters:
            changed = {"params": parameters, "lr": group["lr"] * lr}
            changed |= {"initial_lr": group["initial_lr"] * lr} if "initial_lr" in group else {}
            changed |= {"weight_decay": group["weight_decay"] / lr} if "weight_decay" in group else {}
            changed |= {"eps": group["eps"] * eps} if "eps" in group else {}
            result.append({**group, **changed})
    return result
