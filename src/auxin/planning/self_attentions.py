"""The attentions of a model that read their own stack and hand queries and keys to a function, so that another one can
be put in its place, and those of them that a user chooses."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.sublayers import kinds, nearest_output
from auxin.nn.attention_functions import calls_a_function
from auxin.nn.bricks import Brick
from auxin.planning.depth import chosen_stacks, depth, refuse_unknown_layers
from auxin.words.anatomy import LayerStack
from auxin.words.paths import dotted


@dataclass(frozen=True)
class SelfAttention:
    """One of them."""

    path: str
    """Of its module: "model.layers.3.self_attn"."""
    module: nn.Module
    output: str
    """Of the module that reads its heads: "model.layers.3.self_attn.o_proj"."""
    stack: LayerStack
    causal: bool
    """Whether its queries see no later tokens."""


def self_attentions(
    model: PreTrainedModel, part: str | None, layers: Sequence[int] | None, asked_by: str
) -> dict[str, SelfAttention]:
    """Those of the layers that are chosen, by path, stack by stack; weights are not looked at.

    Args:
        model: of a known architecture.
        part: whose layers: a part of the stack's path, or its tower; None: those of all stacks.
        layers: their numbers, from 0; None: all.
        asked_by: the brick that they are to become, for messages; an attention that is one already may be another.

    Raises:
        PlanError: the architecture is not known, there is no such part, no such layer or no such attention, or one is
            another brick already.
    """
    found = []
    for stack in chosen_stacks(anatomy(model, complete=False, part=part), part):
        of_stack = _of_stack(model, stack, layers)
        if not of_stack and layers is not None:
            raise PlanError(f"layers = {list(layers)}: none of {stack.path} has an attention. Name other layers.")
        found += of_stack
    if not found:
        raise PlanError(
            f"{asked_by}: of this {type(model).__name__} no attention that reads its own stack is known to hand its "
            "queries and keys to an attention function of transformers, so that no other can be put in its place. "
            "Leave it out for this architecture."
        )
    for one in found:
        if isinstance(one.module, Brick) and one.module.brick_name != asked_by:
            raise PlanError(
                f"{one.path} is {one.module.brick_name} already, and one function can be put in the place of an "
                "attention's own. Merge that brick back first (merge_module), or name other layers."
            )
    return {one.path: one for one in found}


def _of_stack(model: PreTrainedModel, stack: LayerStack, chosen: Sequence[int] | None) -> list[SelfAttention]:
    count = depth(model, stack)
    refuse_unknown_layers(chosen or (), stack, count)
    outputs = stack.parts({name for name, _ in model.get_submodule(f"{stack.path}.0").named_parameters()})
    kind_of = dict(zip(outputs, kinds(model, stack, outputs), strict=True))
    found = []
    for number in sorted(set(chosen)) if chosen is not None else range(count):
        layer = f"{stack.path}.{number}"
        for name, module in model.get_submodule(layer).named_modules():
            output = nearest_output(name, outputs) if name and calls_a_function(module) else None
            if output is not None and kind_of[output] == "attention":
                causal = bool(getattr(module, "is_causal", False)) or stack.causal
                found.append(SelfAttention(dotted(layer, name), module, dotted(layer, output), stack, causal))
    return found
