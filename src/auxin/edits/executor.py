"""The executor: the only code that changes a model."""

import time

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.accounting import count_parameters
from auxin.edits.edit import moment_order
from auxin.edits.plan import ParameterChange, Plan, resolve
from auxin.edits.promise import check_promise, default_probe, probe_logits, relative_change, tolerance
from auxin.edits.structure import Restructuring
from auxin.errors import PlanError
from auxin.settings import Settings


class Receipt(Settings):
    """What the executor did and measured."""

    plan: Plan
    parameters_before: int
    """Parameters before, tied ones once."""
    parameters_after: int
    """Parameters after, tied ones once."""
    max_relative_change: float | None
    """max |change of a logit| / max |logit| on the probe batch; None on the meta device, where there is no data."""
    tolerance: float
    """The change up to which an exact plan counts as kept, in the parameters' data type."""
    seconds: float
    """Wall time, the probe included."""


@torch.inference_mode(False)
def apply(
    plan: Plan, model: PreTrainedModel, optimizer: Optimizer | None = None, probe: Tensor | None = None
) -> Receipt:
    """Change `model` in place as `plan` says, and the state of `optimizer` with it.

    Parameters keep their identity, so the optimizer's groups, tied weights and hooks stay valid; gradients of
    changed parameters are dropped, and a loss computed before can't be differentiated any more. A
    DistributedDataParallel wrapper holds buckets of the old shapes: grow the model inside and wrap it again. On any
    error, a broken promise included, model and optimizer are as before.

    One parameter is changed at a time: the peak is the new model, the new optimizer state and one tensor. Where old
    entries can't be had back bit by bit from the new ones (values divided between copies, moments of copied keys), the
    old tensors stay until the promise was checked: "duplicate" needs up to the old model and state more.

    Args:
        plan: what to do.
        model: the model, or what torch.compile made of it; on the meta device only the structure changes and no promise
            is checked.
        optimizer: the optimizer that trains the model, any of torch's whose state has the parameters' shape.
        probe: token ids (batch, sequence) on which the promise is checked; default: two random sequences.

    Raises:
        PlanError: the plan does not fit the model, which may be sharded, or a weight is not finite; found before
            anything changes.
        PromiseError: the plan promised to keep the function and did not.
    """
    start = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps
    parameters = dict(model.named_parameters())
    _refuse_sharded(parameters)
    resolved = resolve(plan, model)
    _check_optimizer(resolved.changes, parameters, optimizer)
    has_data = not any(parameter.is_meta for parameter in parameters.values())
    count, allowed = count_parameters(model).total, tolerance(model)
    if has_data:
        for name, parameter in parameters.items():
            check_finite(name, parameter)
        probe = default_probe(plan, model) if probe is None else probe
        reference = probe_logits(model, probe)
    structure = Restructuring(model, resolved.before, resolved.after)
    surgery = _Surgery(plan.seed, optimizer)
    change: float | None = None
    try:
        structure.do()
        for item in resolved.changes.values():
            surgery.operate(item, parameters[item.name])
        if has_data and probe is not None:
            change = relative_change(reference, probe_logits(model, probe))
            check_promise(plan, change, allowed)
    except BaseException:
        surgery.undo()
        structure.undo()
        raise
    return Receipt(
        plan=plan,
        parameters_before=count,
        parameters_after=count_parameters(model).total,
        max_relative_change=change,
        tolerance=allowed,
        seconds=time.perf_counter() - start,
    )


def _refuse_sharded(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise PlanError(
                f"{name} is distributed over several processes (DTensor). Grow the model before it is sharded, or its "
                "checkpoint."
            )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise PlanError, naming the tensor, when it holds an infinity or a NaN."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise PlanError(
            f"{name} holds {bad} value(s) that are not finite; the model is broken and was not changed. Go back to an "
            "earlier checkpoint."
        )


def map_parameter(change: ParameterChange, old: Tensor, seed: int) -> Tensor:
    """The new tensor of the parameter that `change` describes."""
    for _, edit in change.edits:
        old = edit.map_parameter(old, seed, change.name)
    return old


def map_moment(change: ParameterChange, state: str, old: Tensor) -> Tensor:
    """The new tensor of the optimizer's state called `state`; states that are no tensor of the old shape stay."""
    if tuple(old.shape) != change.old_shape:
        return old
    order = moment_order(state, change.name)
    for _, edit in change.edits:
        old = edit.map_moment(old, order)
    return old


def check_moment(change: ParameterChange, state: str, tensor: Tensor) -> None:
    """Raise PlanError when the optimizer's state called `state` can't follow `change`."""
    if tuple(tensor.shape) == change.old_shape:
        moment_order(state, change.name)
    elif tensor.numel() != 1:
        raise PlanError(
            f"The optimizer's state {state!r} of {change.name} has shape {list(tensor.shape)}, the parameter "
            f"{list(change.old_shape)}; it can't follow. Give the optimizer that trains this model, or none."
        )


def _check_optimizer(
    changes: dict[str, ParameterChange], parameters: dict[str, nn.Parameter], optimizer: Optimizer | None
) -> None:
    if optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not known & {id(parameter) for parameter in parameters.values()}:
        raise PlanError("The optimizer holds no parameter of this model. Give the one that trains it, or none.")
    for change in changes.values():
        for state, tensor in optimizer.state.get(parameters[change.name], {}).items():
            if isinstance(tensor, Tensor):
                check_moment(change, state, tensor)


class _Surgery:
    """Changes parameters and optimizer state one by one and can take it all back.

    The old tensor is kept only where it can't be had back, bit by bit, from the new one.
    """

    def __init__(self, seed: int, optimizer: Optimizer | None) -> None:
        self.seed, self.optimizer = seed, optimizer
        self._done: list[tuple[ParameterChange, nn.Parameter, Tensor | None, Tensor | None]] = []
        self._states: list[tuple[dict, str, ParameterChange, Tensor | None]] = []

    def operate(self, change: ParameterChange, parameter: nn.Parameter) -> None:
        """Give `parameter` its new data and its optimizer state the same shape."""
        data = map_parameter(change, parameter.data, self.seed)
        kept = None if self._restores(change, data, parameter.data) else parameter.data
        self._done.append((change, parameter, kept, parameter.grad))
        parameter.grad = None
        _replace_data(parameter, data)
        state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tuple(tensor.shape) == change.old_shape:
                moment = map_moment(change, name, tensor)
                view = _first_rows(moment, change.old_shape)
                self._states.append((state, name, change, None if torch.equal(view, tensor) else tensor))
                state[name] = moment

    def undo(self) -> None:
        """Put every tensor back, last one first."""
        while self._states:
            state, name, change, kept = self._states.pop()
            state[name] = _first_rows(state[name], change.old_shape).clone() if kept is None else kept
        while self._done:
            change, parameter, kept, gradient = self._done.pop()
            if kept is not None:
                _replace_data(parameter, kept)
            elif tuple(parameter.shape) != change.old_shape:
                _replace_data(parameter, self._restored(change, parameter.data).clone())
            parameter.grad = gradient

    def _restores(self, change: ParameterChange, new: Tensor, old: Tensor) -> bool:
        return not new.is_meta and torch.equal(self._restored(change, new), old)

    @staticmethod
    def _restored(change: ParameterChange, new: Tensor) -> Tensor:
        for (_, edit), shape in zip(reversed(change.edits), reversed(change.shapes[:-1]), strict=True):
            new = edit.restore_parameter(new, shape)
        return new


def _replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give `parameter` other data, of any shape.

    The node that accumulates its gradient lives as long as a graph that leads to it (a loss that was kept) and knows
    the shape. Only a change of data type or device makes the parameter forget it, so that it takes one on the way.
    """
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


def _first_rows(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The leading block of `shape`."""
    return tensor[tuple(slice(length) for length in shape)]
