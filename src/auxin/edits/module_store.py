"""A model in memory, and its optimizer, as the place where tensors are carried from and to."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.edits.carry import Carrier
from auxin.edits.origin import Origin
from auxin.edits.resolution import ResolvedPlan
from auxin.edits.tree import Undo
from auxin.errors import PlanError
from auxin.nn.bricks import is_wide, wide_type


class ModuleStore:
    """The tensors of `model` and the state of `optimizer`, changed in place and with a way back.

    The first new parameter that comes from one old parameter is that parameter, with other data. The old tensor is kept
    only where it can't be had back, bit by bit, from the new one.
    """

    def __init__(self, model: PreTrainedModel, resolved: ResolvedPlan, optimizer: Optimizer | None, undo: Undo) -> None:
        self.model, self.resolved, self.optimizer, self.undo = model, resolved, optimizer, undo
        self.old: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self.tensors: dict[str, Tensor] = {}
        """The new model's parameters and persistent buffers by name, those that are made already."""
        self._heirs = heirs_of(resolved)
        self._relatives: list[tuple[nn.Parameter, str]] = []

    def read(self, name: str) -> Tensor:
        """The old tensor called `name`."""
        return self.old[name].detach()

    def states(self, name: str) -> Mapping[str, Any]:
        """The optimizer's state of the parameter called `name`; empty without one."""
        return {} if self.optimizer is None else self.optimizer.state.get(self.old[name], {})

    def order(self) -> Iterable[str]:
        """Those that old tensors live on in come last."""
        inherit = set(self._heirs.values())
        names = list(self.resolved.origins)
        return [name for name in names if name not in inherit] + [name for name in names if name in inherit]

    def write(self, name: str, carrier: Carrier) -> None:
        """Make the new tensor called `name` and the optimizer's state for it."""
        origin = carrier.origin(name)
        inherited = origin.kept is not None and self._heirs[origin.kept] == name
        self.tensors[name] = self._inherited(origin, name, carrier) if inherited else self._new(name, origin, carrier)

    def check(self) -> None:
        """PlanError when the optimizer trains another model."""
        if self.optimizer is None:
            return
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if not known & {id(parameter) for parameter in self.model.parameters()}:
            raise PlanError("The optimizer holds no parameter of this model. Give the one that trains it, or none.")

    def _new(self, name: str, origin: Origin, carrier: Carrier) -> Tensor:
        """A tensor that no old one becomes: a copy, a blend, one of a brick's, or a fresh one."""
        after = carrier.fresh.placeholder(name)
        relative = near_tensor(name, origin, after, self.old)
        near = self.old[relative]
        data = carrier.value(name)
        if origin.is_fresh:
            dtype = wide_type(near.dtype) if is_wide(self.resolved.after, name) else near.dtype
            data = data.to(device=near.device, dtype=dtype if after.is_floating_point() else None)
            trainable = isinstance(after, nn.Parameter)
        else:
            # What a brick's tensors were made of, or are made together with, may share their memory.
            data = data.clone(memory_format=torch.contiguous_format) if not origin.steps else data.contiguous()
            trainable = near.requires_grad
        if not isinstance(after, nn.Parameter):
            return data
        parameter = nn.Parameter(data, requires_grad=trainable and data.is_floating_point())
        if self.optimizer is not None:
            self._give_states(name, parameter, carrier)
            self._relatives.append((parameter, relative))
        return parameter

    def _give_states(self, name: str, parameter: nn.Parameter, carrier: Carrier) -> None:
        assert self.optimizer is not None
        states = carrier.states(name)
        if not states:
            return
        optimizer = self.optimizer
        self.undo.add(lambda: optimizer.state.pop(parameter, None))
        optimizer.state[parameter] = {key: v.clone() if isinstance(v, Tensor) else v for key, v in states.items()}

    def _inherited(self, origin: Origin, name: str, carrier: Carrier) -> Tensor:
        """The old tensor itself, with new data where something happens to it."""
        old = self.old[str(origin.kept)]
        if origin.fresh_moments and self.optimizer is not None and old in self.optimizer.state:
            self._forget(old)
        if not origin.steps:
            return old
        data = carrier.value(name)
        if not isinstance(old, nn.Parameter):
            return data
        kept, gradient = [old.detach()], old.grad
        restores = _restores(origin, data, kept[0])

        def put_back() -> None:
            _replace_data(old, kept[0] if kept else _restored(origin, old.detach()).clone())
            old.grad = gradient

        self.undo.add(put_back)
        old.grad = None
        _replace_data(old, data)
        if restores:  # from what is in place by now
            kept.clear()
        self._change_states(old, origin, carrier.states(name))
        return old

    def _change_states(self, parameter: nn.Parameter, origin: Origin, states: Mapping[str, Any]) -> None:
        """Put the mapped `states` in the place of the old ones."""
        state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        for key in states:
            tensor = state[key]  # before the next moment is made, or the last one's old tensor would stay as long
            moment = states[key]
            if moment is tensor:
                continue
            view = leading(moment, origin.source_shape)
            kept = None if view.shape == tensor.shape and torch.equal(view, tensor) else tensor

            def put_back(key: str = key, kept: Tensor | None = kept) -> None:
                state[key] = leading(state[key], origin.source_shape).clone() if kept is None else kept

            self.undo.add(put_back)
            state[key] = moment

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
        members = group["params"]
        parameters = list(members)

        def put_back() -> None:
            members[:] = parameters
            group["params"] = members

        self.undo.add(put_back)

    def _forget(self, parameter: Tensor) -> None:
        assert self.optimizer is not None
        optimizer, state = self.optimizer, self.optimizer.state[parameter]

        def put_back() -> None:
            optimizer.state[parameter] = state

        self.undo.add(put_back)
        del optimizer.state[parameter]


def heirs_of(resolved: ResolvedPlan) -> dict[str, str]:
    """The new tensor that each old one lives on in; where its name lives on, that is the one."""
    heirs: dict[str, str] = {}
    for name, origin in resolved.origins.items():
        if origin.kept is not None:
            heirs.setdefault(origin.kept, name)
    origins = resolved.origins
    return heirs | {old: old for old in heirs if old in origins and origins[old].kept == old}


def near_tensor(name: str, origin: Origin, placeholder: Tensor, old: Mapping[str, Tensor]) -> str:
    """The old tensor that a new one is nearest to: what it comes from, or else the parameter whose place in the tree is
    nearest, one with as many axes (weight decay is often decided by those) if there is one.

    Args:
        name: of the new tensor.
        origin: where it comes from.
        placeholder: of its shape.
        old: the old parameters and buffers, by name.
    """
    if origin.relative is not None:
        return origin.relative
    parts = name.split(".")

    def distance(candidate: str) -> tuple[bool, int]:
        shared = 0
        for one, other in zip(parts, candidate.split("."), strict=False):
            if one != other:
                break
            shared += 1
        return old[candidate].dim() != placeholder.dim(), -shared

    return min((key for key, value in old.items() if isinstance(value, nn.Parameter)), key=distance)


def leading(tensor: Tensor, block: tuple[int, ...]) -> Tensor:
    """The leading block of a tensor, by its lengths along the axes, as a view."""
    return tensor[tuple(slice(length) for length in block)]


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
