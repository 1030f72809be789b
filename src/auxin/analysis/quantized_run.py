"""A model run in which the tensors that integer arithmetic holds are told and may be changed, without a line of its
code; `auxin.analysis.quantized_sites` says which they are."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from auxin.analysis.quantized_pass import Pass
from auxin.analysis.quantized_sites import Change, Structure
from auxin.analysis.quantized_weights import Weights
from auxin.models.anatomy import anatomy
from auxin.models.eager import asked_for_maps, eager_attention
from auxin.models.sublayers import sublayers


class Follower:
    """Runs a model with every tensor in question told.

    Args:
        model: of a known architecture, in evaluation mode while it is run.
        weights: which of its parameters are quantized.

    Raises:
        PlanError: the architecture is not known.
    """

    def __init__(self, model: PreTrainedModel, weights: Weights) -> None:
        self._model, self._weights = model, weights
        self._structure: Structure | None = None
        self._parts = {one.output: one.path for one in sublayers(model)}
        stacks = anatomy(model).stacks
        self._layers = {
            f"{stack.path}.{name}": layer
            for stack in stacks
            for name, layer in model.get_submodule(stack.path).named_children()
        }

    def run(self, inputs: dict[str, Any], change: Change) -> Any:
        """What the model gives for `inputs`, with what `change` makes of the tensors.

        Raises:
            PlanError: attention is computed in one kernel, into which nobody sees.
        """
        below = (module for layer in self._layers.values() for name, module in layer.named_modules() if name)
        with eager_attention(self._model), asked_for_maps(below), _without_fast_path(), torch.no_grad():
            if self._structure is None:
                structure = Structure()
                self._run(inputs, lambda site, x: x, structure, tracing=True)
                self._structure = structure
            return self._run(inputs, change, self._structure, tracing=False)

    def _run(self, inputs: dict[str, Any], change: Change, structure: Structure, tracing: bool) -> Any:
        pass_ = Pass(self._weights, self._parts, set(self._layers), change, structure, tracing)
        with contextlib.ExitStack() as stack:
            for path, module in self._model.named_modules():
                enter, leave = partial(pass_.enter, path), partial(pass_.leave, path)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            pass_.begin(inputs)
            stack.enter_context(pass_)
            return self._model(**inputs)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """PyTorch's own attention module computes itself step by step."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
