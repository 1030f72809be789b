"""What the layers of a model gave in one run, so that others that differ from it later begin where they differ."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from auxin.errors import PlanError
from auxin.nn.calls import computing


class LayerOutputs:
    """Remembers what each layer gave. Embeddings, masks and rotary angles are computed anew in every run.

    Args:
        layers: of a model, by their paths.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self.outputs: dict[str, Any] = {}
        """By path, in the order in which the layers ran."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within the context, what every layer gives is remembered, and what was remembered before forgotten.

        Raises:
            PlanError: while the model runs, where it runs one layer several times.
        """
        self.outputs = {}
        with contextlib.ExitStack() as stack:
            for path, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(partial(self._note, path)).remove)
            yield

    @contextlib.contextmanager
    def given_before(self, layer: str, samples: int = 0, copies: int = 1) -> Iterator[None]:
        """Within the context, the layers that ran before `layer` compute nothing and give what they gave.

        Args:
            layer: a path.
            samples: how many there were, along the first axis.
            copies: how often the inputs of that run come, one copy after the other; what has an entry for each sample
                is given as often.
        """
        with contextlib.ExitStack() as stack:
            for path, output in self.outputs.items():
                if path == layer:
                    break
                stack.enter_context(computing(self._layers[path], partial(_given, output, samples, copies)))
            yield

    def _note(self, path: str, module: nn.Module, arguments: Any, output: Any) -> None:
        if path in self.outputs:
            raise PlanError(
                f"{path} runs several times for one batch, so that no single run of it can be told apart. Share no "
                "layers."
            )
        self.outputs[path] = output


def repeated(value: Any, samples: int, copies: int) -> Any:
    """`value` for `copies` of the samples, one copy after the other: tensors with an entry for each of them along the
    first axis are repeated along it, in lists and tuples too; others stay."""
    if isinstance(value, Tensor):
        whole = value.dim() > 0 and len(value) == samples
        return value.repeat(copies, *[1] * (value.dim() - 1)) if whole else value
    if isinstance(value, list | tuple):
        return type(value)(repeated(item, samples, copies) for item in value)
    return value


def _given(output: Any, samples: int, copies: int, *arguments: Any, **named: Any) -> Any:
    return output if copies == 1 else repeated(output, samples, copies)
