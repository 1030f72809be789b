"""The executor: the only code that changes a model."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.accounting import count_parameters
from auxin.edits.fresh import FreshValues
from auxin.edits.kinds.edit import moment_order
from auxin.edits.kinds.rate import Rate
from auxin.edits.plan import Plan
from auxin.edits.promise import Probe, check_promise, default_probe, probe_logits, relative_change, tolerance
from auxin.edits.resolution import Origin, ResolvedPlan, resolve
from auxin.edits.tree import Undo, rebuild_tree
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
    continuation: dict[str, Rate] = {}
    """How AdamW must go on with those parameters for which it is not as before, by name; see `continue_exactly`."""
    seconds: float
    """Wall time, the probe included."""

    @property
    def overshoot(self) -> float:
        """How many times too far the first steps move the function if the old learning rates are kept: the largest
        factor among the parameters, also of those that no rate serves exactly; 1 says that they can be kept."""
        return max([1.0, *(rate.overshoot for rate in self.continuation.values())])

    @property
    def continues_exactly(self) -> bool:
        """Whether `continue_exactly` makes the next steps those of the smaller model."""
        return self.plan.promise == "exact" and all(rate.exact for rate in self.continuation.values())


@torch.inference_mode(False)
def apply(
    plan: Plan, model: PreTrainedModel, optimizer: Optimizer | None = None, probe: Probe | None = None
) -> Receipt:
    """Change `model` in place as `plan` says, and the state of `optimizer` with it.

    Parameters that live on keep their identity, so the optimizer's groups, tied weights and hooks stay valid; new ones
    join the group of their nearest relative. Gradients of changed parameters are dropped, and a loss computed before
    can't be differentiated any more. A DistributedDataParallel wrapper holds buckets of the old shapes: edit the model
    inside and wrap it again; compile it again too. On any error, a broken promise included, model and optimizer are as
    before.

    Parameters are changed one at a time: the peak is the new model, the new optimizer state and one tensor. Where old
    entries can't be had back bit by bit from the new ones (values divided between copies, moments of copied units), the
    old tensors stay until the promise was checked: up to the old model and state more.

    The plan's notes are given as warnings.

    Args:
        plan: what to do.
        model: the model, or what torch.compile made of it; on the meta device only the structure changes and no promise
            is checked.
        optimizer: the optimizer that trains the model, any of torch's whose state has the parameters' shape.
        probe: token ids (batch, sequence) on which the promise is checked, or the model's inputs by name; default: two
            random sequences or images.

    Raises:
        PlanError: the plan is an estimate or does not fit the model, which may be sharded, or a weight is not finite;
            found before anything changes.
        PromiseError: the plan promised to keep the function and did not.
    """
    start = time.perf_counter()
    plan.refuse_estimate()
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps
    parameters = dict(model.named_parameters())
    _refuse_sharded(parameters)
    resolved = resolve(plan.edits, model)
    _check_optimizer(resolved, parameters, optimizer)
    has_data = not any(parameter.is_meta for parameter in parameters.values())
    count, allowed = count_parameters(model).total, tolerance(model)
    if has_data:
        for name, parameter in parameters.items():
            check_finite(name, parameter)
        probe = default_probe(plan, model) if probe is None else probe
        reference = probe_logits(model, probe, plan.vocabulary)
    undo = Undo()
    change: float | None = None
    try:
        surgery = _Surgery(plan.seed, model, resolved, optimizer, undo)
        surgery.operate()
        rebuild_tree(model, resolved, surgery.tensors, undo)
        surgery.join_groups()
        if has_data and probe is not None:
            change = relative_change(reference, probe_logits(model, probe, plan.vocabulary))
            check_promise(plan, change, allowed)
        for note in plan.notes:
            warnings.warn(note, stacklevel=3)  # inference_mode, too, is between this and the caller
    except BaseException:
        undo.everything()
        raise
    return Receipt(
        plan=plan,
        parameters_before=count,
        parameters_after=count_parameters(model).total,
        max_relative_change=change,
        tolerance=allowed,
        continuation=continuation(resolved),
        seconds=time.perf_counter() - start,
    )


def continuation(resolved: ResolvedPlan) -> dict[str, Rate]:
    """The rates of all parameters that AdamW can't go on with as before."""
    parameters = {name for name, _ in resolved.after.named_parameters()}
    rates = {name: origin.rate for name, origin in resolved.origins.items() if name in parameters}
    return {name: rate for name, rate in rates.items() if rate != Rate()}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise PlanError, naming the tensor, when it holds an infinity or a NaN."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise PlanError(
            f"{name} holds {bad} value(s) that are not finite; the model is broken and was not changed. Go back to an "
            "earlier checkpoint."
        )


def map_parameter(origin: Origin, old: Tensor, seed: int) -> Tensor:
    """The new tensor of `origin`, whose old one (or blend of old ones) is `old`."""
    for step in origin.steps:
        old = step.edit.map_parameter(old, seed, step.name)
    return old


def map_moment(origin: Origin, state: str, name: str, old: Tensor) -> Tensor:
    """The optimizer's state called `state` for the parameter `name`; states that are no tensor of its shape stay."""
    if tuple(old.shape) != origin.old_shape or (old.dim() == 0 and not origin.steps):
        return old
    order = moment_order(state, name)
    for step in origin.steps:
        old = step.edit.map_moment(old, order)
    return old


def check_moment(origin: Origin, state: str, name: str, tensor: Tensor) -> None:
    """Raise PlanError when the optimizer's state called `state` can't follow the change of the parameter `name`."""
    if not origin.steps:
        return
    if tuple(tensor.shape) == origin.old_shape:
        moment_order(state, name)
    elif tensor.numel() != 1:
        raise PlanError(
            f"The optimizer's state {state!r} of {name} has shape {list(tensor.shape)}, the parameter "
            f"{list(origin.old_shape)}; it can't follow. Give the optimizer that trains this model, or none."
        )


def blend(origin: Origin, tensor: Callable[[str], Tensor]) -> Tensor:
    """The weighted sum of the old tensors that `tensor(name)` gives, or what they are when joined."""
    sources = origin.sources
    if origin.joined is not None:
        return torch.cat([tensor(name) for _, name in sources], dim=origin.joined)
    if len(sources) == 1 and sources[0][0] == 1.0:
        return tensor(sources[0][1])
    total: Tensor | None = None
    for weight, name in sources:
        term = tensor(name) * weight
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def leading(tensor: Tensor, block: tuple[int, ...]) -> Tensor:
    """The leading block of a tensor, by its lengths along the axes, as a view."""
    return tensor[tuple(slice(length) for length in block)]


def _refuse_sharded(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise PlanError(
                f"{name} is distributed over several processes (DTensor). Edit the model before it is sharded, or its "
                "checkpoint."
            )


def _check_optimizer(resolved: ResolvedPlan, parameters: dict[str, nn.Parameter], optimizer: Optimizer | None) -> None:
    if optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not known & {id(parameter) for parameter in parameters.values()}:
        raise PlanError("The optimizer holds no parameter of this model. Give the one that trains it, or none.")
    for origin in resolved.origins.values():
        if origin.source is None or origin.source not in parameters:
            continue
        for state, tensor in optimizer.state.get(parameters[origin.source], {}).items():
            if isinstance(tensor, Tensor):
                check_moment(origin, state, origin.source, tensor)


class _Surgery:
    """Makes the new model's tensors and the optimizer's state for them.

    The first new parameter that comes from one old parameter is that parameter, with other data. The old tensor is kept
    only where it can't be had back, bit by bit, from the new one.
    """

    def __init__(
        self,
        seed: int,
        model: PreTrainedModel,
        resolved: ResolvedPlan,
        optimizer: Optimizer | None,
        undo: Undo,
    ) -> None:
        self.seed, self.model, self.resolved, self.optimizer, self.undo = seed, model, resolved, optimizer, undo
        self.old: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self.fresh = FreshValues(resolved, seed)
        self.tensors: dict[str, Tensor] = {}
        """The new model's parameters and persistent buffers by name."""
        self._relatives: list[tuple[nn.Parameter, str]] = []

    def operate(self) -> None:
        """Make all tensors. Those that need an old tensor which lives on in another come first."""
        heirs: dict[str, str] = {}
        for name, origin in self.resolved.origins.items():
            if origin.source is not None:
                heirs.setdefault(origin.source, name)
        # Where the old name lives on, it is the heir.
        heirs |= {source: source for source in heirs if self._origin_source(source) == source}
        inherit = set(heirs.values())
        for name, origin in self.resolved.origins.items():
            if name not in inherit:
                self.tensors[name] = self._new(name, origin)
        for name, origin in self.resolved.origins.items():
            if name in inherit:
                self.tensors[name] = self._inherited(name, origin)

    def _origin_source(self, name: str) -> str | None:
        origin = self.resolved.origins.get(name)
        return origin.source if origin else None

    def _new(self, name: str, origin: Origin) -> Tensor:
        """A tensor that no old one becomes: a copy, a blend, or a fresh one."""
        after = self.fresh.placeholder(name)
        relative = origin.sources[0][1] if origin.sources else self._relative_name(name)
        near = self.old[relative]
        if origin.sources:
            data = map_parameter(origin, blend(origin, lambda source: self.old[source].detach()), self.seed)
            if not origin.steps and origin.source is not None:
                data = data.clone()
            trainable = near.requires_grad
        else:
            data = self.fresh.value(name, origin).to(device=near.device)
            if after.is_floating_point():
                data = data.to(near.dtype)
            trainable = isinstance(after, nn.Parameter)
        if not isinstance(after, nn.Parameter):
            return data
        parameter = nn.Parameter(data, requires_grad=trainable and data.is_floating_point())
        if self.optimizer is not None:
            if origin.source is not None and not origin.fresh_moments:
                self._copy_state(name, origin, parameter)
            self._relatives.append((parameter, relative))
        return parameter

    def _inherited(self, name: str, origin: Origin) -> Tensor:
        """The old tensor itself, with new data where something happens to it."""
        source = str(origin.source)
        old = self.old[source]
        if origin.fresh_moments and self.optimizer is not None and old in self.optimizer.state:
            self._forget(old)
        if not origin.steps:
            return old
        data = map_parameter(origin, old.detach(), self.seed)
        if not isinstance(old, nn.Parameter):
            return data
        kept = None if _restores(origin, data, old.detach()) else old.detach()
        gradient = old.grad

        def put_back() -> None:
            _replace_data(old, _restored(origin, old.detach()).clone() if kept is None else kept)
            old.grad = gradient

        self.undo.add(put_back)
        old.grad = None
        _replace_data(old, data)
        self._map_state(source, origin, old)
        return old

    def _map_state(self, name: str, origin: Origin, parameter: nn.Parameter) -> None:
        state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != origin.old_shape or tensor.dim() == 0:
                continue
            moment = map_moment(origin, key, name, tensor)
            view = leading(moment, origin.old_shape)
            kept = None if view.shape == tensor.shape and torch.equal(view, tensor) else tensor

            def put_back(key: str = key, kept: Tensor | None = kept) -> None:
                state[key] = leading(state[key], origin.old_shape).clone() if kept is None else kept

            self.undo.add(put_back)
            state[key] = moment

    def _copy_state(self, name: str, origin: Origin, parameter: nn.Parameter) -> None:
        assert self.optimizer is not None
        old = self.old[str(origin.source)]
        state = self.optimizer.state.get(old)
        if not state:
            return
        copied: dict[str, Any] = {}
        for key, value in state.items():
            copied[key] = value
            if isinstance(value, Tensor):
                mapped = map_moment(origin, key, name, value)
                copied[key] = mapped.clone() if mapped is value else mapped
        self.optimizer.state[parameter] = copied
        self.undo.add(lambda: self.optimizer.state.pop(parameter, None))  # type: ignore[union-attr]

    def join_groups(self) -> None:
        """Put new parameters into the optimizer's groups and take those that are gone out of them."""
        if self.optimizer is None:
            return
        alive = {id(parameter): place for place, parameter in enumerate(self.model.parameters())}
        ours = {id(tensor): place for place, tensor in enumerate(self.old.values())}
        homes = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        for group in self.optimizer.param_groups:
            self._restore_list_later(group)
        for parameter, relative in self._relatives:
            home = homes.get(id(self.old.get(relative)))
            if home is not None and id(parameter) in alive:
                home["params"].append(parameter)
        for group in self.optimizer.param_groups:
            before = [ours[id(p)] for p in group["params"] if id(p) in ours]
            kept = [p for p in group["params"] if id(p) in alive or id(p) not in ours]
            if before == sorted(before) and all(id(p) in alive for p in kept):
                kept.sort(key=lambda p: alive[id(p)])  # as an optimizer built anew would have them
            for gone in group["params"]:
                if id(gone) in ours and id(gone) not in alive and gone in self.optimizer.state:
                    self._forget(gone)
            group["params"] = kept

    def _restore_list_later(self, group: dict[str, Any]) -> None:
        parameters = list(group["params"])

        def put_back() -> None:
            group["params"] = parameters

        self.undo.add(put_back)

    def _forget(self, parameter: Tensor) -> None:
        assert self.optimizer is not None
        optimizer, state = self.optimizer, self.optimizer.state.pop(parameter)

        def put_back() -> None:
            optimizer.state[parameter] = state

        self.undo.add(put_back)

    def _relative_name(self, name: str) -> str:
        """The old parameter whose place in the tree is nearest to that of the fresh one called `name`, one with as many
        axes (weight decay is often decided by those) if there is one."""
        dims = self.fresh.placeholder(name).dim()
        parts = name.split(".")

        def distance(candidate: str) -> tuple[bool, int]:
            shared = 0
            for one, other in zip(parts, candidate.split("."), strict=False):
                if one != other:
                    break
                shared += 1
            return self.old[candidate].dim() != dims, -shared

        return min((key for key, value in self.old.items() if isinstance(value, nn.Parameter)), key=distance)


def _back(origin: Origin, new: Tensor) -> Tensor | None:
    """The old tensor out of the new one; None where it can't be had."""
    back: Tensor | None = new
    for step in reversed(origin.steps):
        back = None if back is None else step.edit.restore_parameter(back, step.old_shape)
    return back


def _restored(origin: Origin, new: Tensor) -> Tensor:
    """As `_back`, where it was found that it can be had."""
    back = _back(origin, new)
    assert back is not None
    return back


def _restores(origin: Origin, new: Tensor, old: Tensor) -> bool:
    """Whether the old tensor can be had back, bit by bit, from the new one."""
    back = None if new.is_meta else _back(origin, new)
    return back is not None and torch.equal(back, old)


def _replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give `parameter` other data, of any shape.

    The node that accumulates its gradient lives as long as a graph that leads to it (a loss that was kept) and knows
    the shape. Only a change of data type or device makes the parameter forget it, so that it takes one on the way.
    """
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
