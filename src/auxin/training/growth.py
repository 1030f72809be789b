"""Changing the size of a model that lies in pieces in several processes, and of its optimizer's state.

A tensor is made of old ones in the same way wherever they lie (`auxin.edits.carry`). Here each process gathers the old
one, makes the new one, and keeps its piece of that, before it goes on with the next. What is drawn depends on the
plan's seed and the tensor's name, so that all draw alike, and the result is, to the bit, what one process makes.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.accounting.parameters import count_parameters
from auxin.edits.carry import Carrier, OnDemand, carry, check_tensors
from auxin.edits.executor import Receipt, continuation
from auxin.edits.module_store import heirs_of, near_tensor
from auxin.edits.plan import Plan
from auxin.edits.probe import Probe, edited_outputs, probe_and_outputs, settings_kept
from auxin.edits.promise import measured_change, tolerance
from auxin.edits.purpose import refuse_other_model
from auxin.edits.renumbering import change_generation, check_kept_tokens, generation_changes
from auxin.edits.resolution import ResolvedPlan, resolve
from auxin.edits.structure import edited_skeleton, structural_edits
from auxin.edits.tensor_names import shapes_of, tensor_names
from auxin.edits.tree import Undo
from auxin.errors import PlanError
from auxin.nn.bricks import Brick, is_wide, wide_type
from auxin.training.strategies import cut_by_layers, fill, plain_class, reshard, whole

_CHOICES = ("_attn_implementation_internal", "_experts_implementation_internal")
"""What configs keep of how a model is computed, and don't write."""


@torch.inference_mode(False)
@settings_kept()
def apply_in_pieces(
    plan: Plan,
    model: PreTrainedModel,
    optimizer: Optimizer | None = None,
    probe: Probe | None = None,
    cut: Callable[[PreTrainedModel], None] | None = None,
) -> tuple[PreTrainedModel, Receipt]:
    """What `plan` makes of a model that lies in pieces (torch's FSDP2), in pieces, too. All processes call it together.

    No process ever has more than its pieces of the old and the new model and of their optimizer's state, and, whole,
    what one tensor is made of and becomes (all tensors of a brick, where they are made together). The result is, to the
    bit, what `auxin.apply` makes of the whole model.

    Args:
        plan: what to do.
        model: the model, which stays as it is; after this it should be let go.
        optimizer: trains it. Its groups and its state, which lies in pieces, become those of the new model.
        probe: as `auxin.apply`, the same in every process.
        cut: lays a model of the new shapes, on the meta device, in pieces by `fully_shard`; default: each layer and
            the rest, over the processes that the old one lies in, in the types of their weights: give it where the old
            one has a policy of mixed precision, or parameters that are not cut.

    Returns:
        The new model, with the hooks that `cut` has put on it and none that the old one had, and the receipt, in which
        nothing is told of parameters that the probe did not reach.

    Raises:
        PlanError: the plan is an estimate or does not fit the model, or a weight is not finite.
        PromiseError: the plan promised to keep the function and did not. The optimizer is as before.
    """
    start = time.perf_counter()
    plan.refuse_estimate()
    mesh = _mesh(model)
    refuse_other_model(plan, model.config)
    reshard(model)
    before = edited_skeleton(model.config, plain_class(model))
    if shapes_of(before) != shapes_of(model):
        raise PlanError("The model has other tensors than its config says, so that no plan can be made to fit it.")
    resolved = resolve(plan.located(), before)
    check_kept_tokens(plan, resolved)
    generation = generation_changes(plan, before)
    store = _Pieces(model, resolved, optimizer)
    check_tensors(resolved, store, tensor_names(model))
    allowed, count = tolerance(model), count_parameters(model).total
    probe, reference = probe_and_outputs(plan, model, probe)
    reshard(model)
    made = store.begin(cut or partial(cut_by_layers, mesh=mesh))
    store.follow(made)
    change_generation(made, generation, Undo())
    fresh = carry(resolved, plan.seed, store)
    for module in made.modules():
        if isinstance(module, Brick):
            module.filled()
    change = measured_change(plan, reference, edited_outputs(plan, made, probe), allowed)
    reshard(made)
    store.join_groups()
    receipt = Receipt(
        plan=plan,
        parameters_before=count,
        parameters_after=count_parameters(made).total,
        max_relative_change=change,
        tolerance=allowed,
        continuation=continuation(resolved),
        replayed=bool(structural_edits(made.config)),
        fresh_moments=fresh,
        seconds=time.perf_counter() - start,
    )
    for note in plan.notes:
        warnings.warn(note, stacklevel=4)  # two contexts are between this and the caller
    return made, receipt


def _mesh(model: nn.Module) -> DeviceMesh:
    """The processes that a model lies in.

    Raises:
        PlanError: it lies whole in this one.
    """
    for parameter in model.parameters() if isinstance(model, FSDPModule) else ():
        if isinstance(parameter, DTensor):
            return parameter.device_mesh
    raise PlanError("The model does not lie in pieces (torch's FSDP2). Use auxin.apply.")


class _Pieces:
    """A model in pieces and its optimizer's state as the place that tensors are carried from, and the new model as the
    one that they are carried to (`auxin.edits.carry.TensorStore`)."""

    def __init__(self, model: PreTrainedModel, resolved: ResolvedPlan, optimizer: Optimizer | None) -> None:
        self.model, self.resolved, self.optimizer = model, resolved, optimizer
        self.device = model.device
        self.old: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self.states_made: dict[Tensor, dict[str, Any]] = {}
        self.aliases = tensor_names(resolved.after)
        shapes = dict(resolved.after.named_parameters()) | dict(resolved.after.named_buffers())
        self.near = {
            name: near_tensor(name, origin, shapes[name], self.old) for name, origin in resolved.origins.items()
        }

    def begin(self, cut: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
        """The new model, in pieces of the right types that hold nothing yet."""
        made = copy.deepcopy(self.resolved.after)  # which tells, whole, how fresh tensors are drawn
        for name, shape in dict(made.named_parameters()).items():
            _put(made, self.aliases[name], self._placeholder(name, shape))
        derived = {path: self._derived(path, module) for path, module in made.named_modules()}
        cut(made)
        nn.Module.to_empty(made, device=self.device)
        for path, (buffers, as_before) in derived.items():
            module = made.get_submodule(path)
            module._buffers.update({key: buffer.to(self.device) for key, buffer in buffers.items()})
            reset = getattr(module, "reset_buffers", None)
            if reset is not None and not as_before:  # those of a skeleton are of its own type, float32 most often
                reset()
        self.made, self.new = made, dict(made.named_parameters())
        return made

    def _placeholder(self, name: str, shape: Tensor) -> nn.Parameter:
        near = self.old[self.near[name]]
        dtype = near.dtype if shape.is_floating_point() else shape.dtype
        empty = torch.empty(shape.shape, dtype=dtype, device="meta")
        trainable = self.resolved.origins[name].is_fresh or near.requires_grad
        return nn.Parameter(empty, requires_grad=trainable and empty.is_floating_point())

    def _derived(self, path: str, module: nn.Module) -> tuple[dict[str, Tensor], bool]:
        """The buffers of a module of the new model that no checkpoint holds, and whether they are those that it had
        before: as `auxin.edits.tree` has it."""
        new = {
            key: buffer
            for key, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta and key in module._non_persistent_buffers_set
        }
        old_path = self.resolved.modules.get(path)
        skeleton = None if old_path is None else self.resolved.before.get_submodule(old_path)
        if type(skeleton) is not type(module):
            return new, False
        was, now = skeleton._buffers, self.model.get_submodule(str(old_path))._buffers
        kept: dict[str, Tensor] = {}
        as_before = True
        for key, buffer in new.items():
            old, current = was.get(key), now.get(key)
            if current is not None and old is not None and torch.equal(old, buffer):
                kept[key] = current.clone()
            else:
                kept[key], as_before = buffer if current is None else buffer.to(current.dtype), False
        return kept, as_before

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        """A buffer of the new model, which each process has whole."""
        dtype = value.dtype
        if self.resolved.origins[name].is_fresh and value.is_floating_point():
            near = self.old[self.near[name]].dtype
            dtype = wide_type(near) if is_wide(self.resolved.after, name) else near
        return value.to(self.device, dtype, copy=True)

    def read(self, name: str) -> Tensor:
        """The old tensor called `name`, whole."""
        return whole(self.old[name].detach())

    def states(self, name: str) -> Mapping[str, Any]:
        """The optimizer's state of the parameter called `name`, each whole when it is asked for."""
        states = {} if self.optimizer is None else self.optimizer.state.get(self.old[name], {})
        return OnDemand(states, lambda key: whole(states[key]) if isinstance(states[key], Tensor) else states[key])

    def order(self) -> Iterable[str]:
        """As they come: nothing is overwritten."""
        return self.resolved.origins

    def write(self, name: str, carrier: Carrier) -> None:
        """Keep this process's piece of the new tensor called `name`, and of its state."""
        target = self.new.get(name)
        if target is None:
            _put(self.made, self.aliases[name], self._buffer(name, carrier.value(name)))
            return
        fill(target, carrier.value(name))
        if self.optimizer is None:
            return
        made: dict[str, Any] = {}
        for key, value in carrier.states(name).items():
            if isinstance(value, Tensor) and value.shape == target.shape and value.dim():
                made[key] = torch.zeros_like(target, dtype=value.dtype, requires_grad=False)
                fill(made[key], value)
            else:
                made[key] = copy.deepcopy(value)
        if made:
            self.states_made[target] = made

    def follow(self, made: PreTrainedModel) -> None:
        """Let the new model have what was set on the old one beside its config: the kind of attention, the loss, what
        is computed again, which modules are in training mode."""
        made.generation_config = copy.deepcopy(self.model.generation_config)
        made.name_or_path = self.model.name_or_path
        for key in ("_loss_function", "loss_type"):
            if key in vars(self.model):
                setattr(made, key, vars(self.model)[key])
        old = dict(self.model.named_modules())
        for path, module in made.named_modules():
            old_path = self.resolved.modules.get(path)
            before = None if old_path is None else old.get(old_path)
            module.training = self.model.training if before is None else before.training
            for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if before is not None and hasattr(before, key):
                    setattr(module, key, getattr(before, key))
            config, former = vars(module).get("config"), None if before is None else vars(before).get("config")
            for key in _CHOICES if config is not None and former is not None else ():
                if key in vars(former):
                    vars(config)[key] = vars(former)[key]

    def join_groups(self) -> None:
        """Give the optimizer the new parameters, each in the group of its relative, and their states."""
        if self.optimizer is None:
            return
        groups = self.optimizer.param_groups
        homes = {id(parameter): group for group in groups for parameter in group["params"]}
        places = {id(parameter): place for group in groups for place, parameter in enumerate(group["params"])}
        heirs = heirs_of(self.resolved)
        joined: dict[int, list[tuple[float, nn.Parameter]]] = {id(group): [] for group in groups}
        for name, parameter in self.new.items():
            near = self.near[name]
            old = id(self.old[near])
            if old in homes:
                # Where the old one stood that lives on in it; behind all of those what is new.
                joined[id(homes[old])].append((places[old] if heirs.get(near) == name else math.inf, parameter))
        known = {id(tensor) for tensor in self.old.values()}
        for group in groups:
            members, others = joined[id(group)], [p for p in group["params"] if id(p) not in known]
            before = [places[id(tensor)] for tensor in self.old.values() if homes.get(id(tensor)) is group]
            if before != sorted(before):  # not in the model's order, as an optimizer built anew would have them
                members.sort(key=lambda member: member[0])
            group["params"] = others + [parameter for _, parameter in members]
        for tensor in self.old.values():
            self.optimizer.state.pop(tensor, None)
        self.optimizer.state.update(self.states_made)


def _put(model: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Put a parameter or a buffer at all of its places."""
    for name in names:
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, tensor)
