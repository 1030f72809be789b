"""The parts of a model's layers: what adds to the residual stream, of what kind it is, whose tokens pass through it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, kept_tokens
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.sublayers import Kind, kinds
from auxin.report.forest import Series
from auxin.words.anatomy import LayerStack

WHOLE = "whole layer"
KINDS = {"feed-forward": "feed-forward part"}
"""What findings call a part of a layer, where its kind is no noun."""
SERIES = {
    "attention": Series("attention", "#2F8AC9", "circle"),
    "cross-attention": Series("cross-attention", "#009E73", "triangle"),
    "feed-forward": Series("feed-forward", "#D55E00", "square"),
    WHOLE: Series(WHOLE, "#7d8590", "diamond"),
}
"""What the parts of layers, and whole layers, look like in pictures."""


def part_in_words(kind: str, layer: str) -> str:
    """A part of the layer at a path, as findings call it."""
    return f"the {KINDS.get(kind, kind)} of {layer}"


@dataclass(frozen=True)
class StackParts:
    """The layers of one stack."""

    model: PreTrainedModel
    """What it belongs to."""
    runner: nn.Module
    """The innermost model that runs it: a whole model of one stack, an encoder, a decoder, a tower."""
    stack: LayerStack
    """Its anatomy; `outputs` are whole parts, each a module of a layer, in the order in which they are run."""
    kinds: tuple[Kind, ...]
    """Of each part."""
    layers: dict[str, nn.Module]
    """By path, from the first to the last."""

    @property
    def added(self) -> Sequence[str]:
        """For each part the module of a layer whose output is added to the residual stream."""
        return self.stack.output_norms if self.stack.norm_position == "after_output" else self.stack.outputs

    @property
    def without_parts(self) -> "StackParts":
        """The same layers, of which no parts are known."""
        stack = replace(self.stack, outputs=(), output_norms=(), norm_position="before")
        return replace(self, stack=stack)

    def kept(self, batch: Batch) -> Tensor | None:
        """Which of its tokens are none of padding, (samples, tokens); None: all of them. See `kept_tokens`."""
        if "input_ids" in batch and getattr(self.runner, "main_input_name", "input_ids") != "input_ids":
            return None  # of a model's towers, the mask is about the one that reads text
        return kept_tokens(self.model, batch, decoder="cross-attention" in self.kinds)


def stack_parts(model: PreTrainedModel) -> list[StackParts]:
    """The layers of all stacks of `model`.

    Raises:
        PlanError: the architecture is not known.
    """
    return [_stack_parts(model, stack) for stack in anatomy(model).stacks]


def refuse_blocks(model: PreTrainedModel) -> None:
    """PlanError for a model whose residual stream has several blocks."""
    if anatomy(model).residual_blocks != "one":
        raise PlanError(
            "The model's residual stream has several blocks (AltUp), of which each layer sees one. Measure the model "
            "before that edit."
        )


def refuse_maps(model: PreTrainedModel) -> None:
    """PlanError for a model whose layers give maps, in which no hidden states of tokens lie."""
    if stack := next((stack for stack in anatomy(model).stacks if stack.maps), None):
        raise PlanError(
            f"The layers of {stack.path} give maps of channels, and this is measured on the hidden states of tokens. "
            "Ask for trajectory or importance."
        )


def _stack_parts(model: PreTrainedModel, stack: LayerStack) -> StackParts:
    modules = model.get_submodule(stack.path)
    parameters = {name for layer in modules.children() for name, _ in layer.named_parameters()}
    stack = replace(stack, outputs=stack.parts(parameters))
    return StackParts(
        model,
        _runner(model, stack.path),
        stack,
        tuple(kinds(model, stack, stack.outputs)),
        {f"{stack.path}.{name}": layer for name, layer in modules.named_children()},
    )


def _runner(model: PreTrainedModel, path: str) -> nn.Module:
    names = path.split(".")
    around = (model.get_submodule(".".join(names[:end])) for end in range(len(names), 0, -1))
    return next((module for module in around if isinstance(module, PreTrainedModel)), model)
