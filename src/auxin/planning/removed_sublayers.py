"""Taking whole sublayers or layers out of a model: the edits that leave nothing of them.

What a sublayer adds becomes zero, so that the stream passes it by; the function is that of the model in which the
sublayer's output is masked, to the bit. With it goes everything that works for it alone: the norm in front of it where
no other part reads that norm, the matrices in front of its last one, the norm behind it. A layer of which nothing is
left and that has no norm behind its sums is dropped, so that the config says it; what is left of others is said by
stand-ins that are put there again when the model is loaded.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.edits.kinds.edit import ArrangeLayers, Edit, RemoveModule
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.places import refuse_broken, running_on_shapes, what_is_returned
from auxin.models.sublayers import Sublayer, add_nothing, refuse_run_again, refuse_shared, sublayers
from auxin.planning.depth import arrange, arranged, counts_for_the_cache, depth, refuse_kept_layers
from auxin.words.paths import encloses


def without_sublayers(model: PreTrainedModel, gone: Iterable[str]) -> list[Edit]:
    """The edits that take sublayers out of `model`.

    Args:
        model: the model, on any device; weights are not looked at.
        gone: the sublayers, by their paths (`auxin.models.sublayers`).

    Raises:
        PlanError: no sublayers are named, one of them is none of the model's or shared between layers, nothing would
            be left of a stack, or something that stays needs what one of them makes (T5's first attention has the
            position bias of all).
    """
    known = {sublayer.path: sublayer for sublayer in sublayers(model)}
    paths = list(dict.fromkeys(gone))
    if not paths:
        raise PlanError("There is nothing to remove. Name a sublayer.")
    if unknown := next((path for path in paths if path not in known), None):
        raise PlanError(f"The model has no sublayer {unknown!r}. It has {', '.join(list(known)[:4])}, ...")
    refuse_shared(model, [known[path].output for path in paths])
    dropped = _dropped(model, known.values(), paths)
    edits: list[Edit] = [ArrangeLayers(layers=path, order=list(order)) for path, order in dropped.items()]
    left = [known[path] for path in paths if not _is_dropped(known[path], dropped)]
    for module, leaves, returns in _emptied(model, left):
        edits.append(RemoveModule(module=moved(module, dropped) or "", leaves=leaves, returns=returns))
    return edits


def without_layers(model: PreTrainedModel, gone: Iterable[str]) -> list[Edit]:
    """The edits that leave out whole layers of `model`, which pass on what they get.

    Args:
        model: the model, on any device; weights are not looked at.
        gone: paths of layers.

    Raises:
        PlanError: no layers are named, one of them is none of the model's, nothing would be left of a stack, the first
            layer holds what all need, or no config can say it.
    """
    paths = set(gone)
    edits: list[Edit] = []
    body = anatomy(model)
    for stack in body.stacks:
        have = [f"{stack.path}.{number}" for number in range(depth(model, stack))]
        order = [number for number, path in enumerate(have) if path not in paths]
        if not order:
            raise PlanError(f"{stack.path}: nothing would be left of its layers. Leave one.")
        if len(order) < len(have):
            edits += arrange(model, body, stack, order)
        paths -= set(have)
    if paths:
        raise PlanError(f"The model has no layer {min(paths)!r}.")
    if not edits:
        raise PlanError("There is nothing to remove. Name a layer.")
    return edits


def layers_to_leave_out(model: PreTrainedModel) -> dict[str, str]:
    """The layers of `model` that `without_layers` may leave out: the stack of each, by its path.

    Raises:
        PlanError: the architecture is not known, layers share their parameters, or no value of the config counts the
            layers of one stack.
    """
    refuse_run_again(model)
    stacks = [stack for stack in anatomy(model).stacks if not counts_for_the_cache(model, stack)]
    for stack in stacks:
        if not stack.length_field:
            refuse_kept_layers(stack)
    return {f"{stack.path}.{number}": stack.path for stack in stacks for number in range(depth(model, stack))}


def refusals(model: PreTrainedModel) -> dict[str, str]:
    """The sublayers that can't be taken out alone, and why, by their paths.

    Attentions of first layers are tried. What a layer makes for those above it, its attention makes in the first one
    alone (T5); what adds to the stream within itself (BLOOM) does so in every layer.
    """
    known = sublayers(model)
    found: dict[str, str] = {}
    for sublayer in known:
        if sublayer.number or sublayer.kind == "feed-forward":
            continue
        try:
            if sublayer.path == sublayer.output:
                _emptied(model, [sublayer])
            else:
                what_is_returned(model, [sublayer.path])
        except PlanError as error:
            same = [one for one in known if (one.stack, one.kind) == (sublayer.stack, sublayer.kind)]
            for one in same if sublayer.path == sublayer.output else [sublayer]:
                found[one.path] = str(error)
    return found


def parameters_of_sublayers(model: PreTrainedModel, paths: Iterable[str]) -> dict[str, set[str]]:
    """The names of the parameters that have no share in the result of `model` any more when one sublayer alone is gone:
    its own, and those of a norm that it alone reads.

    Args:
        model: the model, on any device; weights are not looked at.
        paths: of sublayers.
    """
    outputs = {sublayer.path: sublayer.output for sublayer in sublayers(model)}
    found: dict[str, set[str]] = {}
    with running_on_shapes(model) as (fake, inputs):
        before = _used(fake, inputs)
        for path in paths:
            masked = fake.get_submodule(outputs[path]).register_forward_hook(add_nothing)
            found[path] = before - _used(fake, inputs)
            masked.remove()
    return found


def _dropped(model: PreTrainedModel, known: Collection[Sublayer], gone: Collection[str]) -> dict[str, list[int]]:
    """For each stack that loses whole layers, the old numbers of those that stay."""
    orders: dict[str, list[int]] = {}
    for stack in dict.fromkeys(sublayer.stack for sublayer in known):
        of_stack = [sublayer for sublayer in known if sublayer.stack == stack]
        if all(sublayer.path in gone for sublayer in of_stack):
            raise PlanError(f"{stack.path}: nothing would be left of its layers. Leave one of their parts.")
        if stack.norm_position == "after_residual" or counts_for_the_cache(model, stack):
            continue
        emptied = {s.number for s in of_stack} - {s.number for s in of_stack if s.path not in gone}
        if not emptied:
            continue
        order = [number for number in range(depth(model, stack)) if number not in emptied]
        try:
            refuse_kept_layers(stack)
            arranged(model, ArrangeLayers(layers=stack.path, order=list(order)))
        except PlanError:
            continue  # stand-ins do as well; the config goes on counting the layer
        orders[stack.path] = order
    return orders


def _is_dropped(sublayer: Sublayer, orders: dict[str, list[int]]) -> bool:
    return sublayer.number not in orders.get(sublayer.stack.path, [sublayer.number])


def moved(module: str, orders: Mapping[str, Sequence[int]]) -> str | None:
    """Where a module of a layer is when layers are left out; None: it is in one of these.

    Args:
        module: its path before.
        orders: by the path of a stack the old numbers of the layers that stay.
    """
    for path, order in orders.items():
        if encloses(path, module):
            number, _, rest = module.removeprefix(f"{path}.").partition(".")
            return f"{path}.{order.index(int(number))}.{rest}" if int(number) in order else None
    return module


def _emptied(model: PreTrainedModel, gone: Collection[Sublayer]) -> list[tuple[str, Any, list[str]]]:
    """What a model without `gone` does without: modules, what stays in their places, and what is returned there."""
    if not gone:
        return []
    bare, idle = _idle_modules(model, gone)
    tuples = [path for path in (*(s.path for s in gone), *idle) if not bare[path]]
    returns = {**{path: list[str]() for path in bare}, **what_is_returned(model, tuples)}
    found: list[tuple[str, Any, list[str]]] = [(s.path, "zeros", returns[s.path]) for s in gone]
    # What nobody reads may be anything: its input costs least, where that is all that is returned.
    found += [(path, "identity" if bare[path] else "zeros", returns[path]) for path in idle]
    refuse_broken(model, found)
    order = {name: number for number, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(found, key=lambda one: order[one[0]])


def _idle_modules(model: PreTrainedModel, gone: Collection[Sublayer]) -> tuple[dict[str, bool], list[str]]:
    """Whether each module of the layers returns a bare tensor; and the outermost ones that have parameters none of
    which has a share in the result any more, beside and outside of `gone` themselves."""
    bare: dict[str, bool] = {}

    def note(path: str, module: nn.Module, arguments: Any, result: Any) -> None:
        bare[path] = isinstance(result, Tensor)

    with running_on_shapes(model) as (fake, inputs):
        layers = {sublayer.layer for sublayer in gone}
        within = [name for name, _ in fake.named_modules() if any(encloses(path, name) for path in layers)]
        for path in within:
            fake.get_submodule(path).register_forward_hook(partial(note, path))
        before = _used(fake, inputs)
        for sublayer in gone:
            fake.get_submodule(sublayer.output).register_forward_hook(add_nothing)
        after = _used(fake, inputs)
    removed = [sublayer.path for sublayer in gone]
    idle: list[str] = []
    for path in within:
        own = {name for name in before if encloses(path, name)}
        inside = any(encloses(other, path) for other in (*idle, *removed))
        around = any(encloses(path, other) for other in removed)
        if path in bare and own and not own & after and not inside and not around:
            idle.append(path)
    return bare, idle


def _used(model: PreTrainedModel, inputs: dict[str, Tensor]) -> set[str]:
    """The parameters that have a share in what `model` gives."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    with torch.enable_grad():
        results = list(_differentiable(model(**inputs)))
        torch.autograd.backward([result.sum() for result in results])
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def _differentiable(output: Any) -> Iterator[Tensor]:
    for value in output.values():
        if isinstance(value, Tensor) and value.requires_grad:
            yield value
