"""Going on with AdamW after an edit exactly as it would have gone on before it.

Why with AdamW alone: let a parameter be p' = f p with gradient g' = g / f. AdamW's step, lr m / (sqrt(v) + eps), has no
scale of the gradient once eps has the factor 1 / f, so that lr f is the right rate; the decay lr wd p follows p. With
amsgrad v is the largest so far, which has v's factor. SGD's step is the gradient itself, which would need lr f^2, and
copies that share a gradient another one; a decay that is added to the gradient (Adam's weight_decay) has the factor f,
the gradient 1 / f.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from auxin.edits.executor import Receipt
from auxin.edits.kinds.rate import Rate
from auxin.errors import PlanError


def continue_exactly(optimizer: Optimizer, model: nn.Module, receipt: Receipt) -> None:
    """Regroup `optimizer` so that its next steps on the edited `model` are those of the model before.

    Every parameter's learning rate, weight decay and epsilon are those of its group times the factors of `receipt`;
    parameters with the same factors share a group, and schedulers that multiply the groups' rates go on working.
    Gradient clipping sees another norm than before; without it the steps agree up to rounding.

    Args:
        optimizer: the optimizer that was given to `apply`: torch's AdamW, or its Adam without weight decay or with
            decoupled_weight_decay; amsgrad or not.
        model: the edited model.
        receipt: what `apply` gave back.

    Raises:
        PlanError: the optimizer is another one, or for some parameter no such factors exist; the message names it and
            says why. Nothing was changed.
    """
    _refuse_other_rules(optimizer)
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


def _refuse_other_rules(optimizer: Optimizer) -> None:
    """PlanError unless the steps of `optimizer` are AdamW's."""
    # A subclass may step by another rule.
    if type(optimizer) not in (AdamW, Adam):
        raise PlanError(
            f"optimizer: {type(optimizer).__name__} has no exact continuation; its steps depend on the scale of the "
            "gradients in another way than those of torch.optim.AdamW. Train with that one, or train on with a warm-up."
        )
    for number, group in enumerate(optimizer.param_groups):
        if group["weight_decay"] and not group.get("decoupled_weight_decay", type(optimizer) is AdamW):
            raise PlanError(
                f"optimizer: {type(optimizer).__name__} adds weight_decay = {group['weight_decay']:g} (group {number}) "
                "to the gradient, so that there is no exact continuation. Use torch.optim.AdamW, or weight_decay = 0; "
                "or train on with a warm-up."
            )


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
            changed |= {"weight_decay": group["weight_decay"] / lr, "eps": group["eps"] * eps}
            result.append({**group, **changed})
    return result
