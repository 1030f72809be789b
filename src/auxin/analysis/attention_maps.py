"""The attention maps of a model while it runs, one attention at a time.

An attention's map is what its module gives beside its result. transformers drops it at once where nobody asks the model
for it, and so it is read where it arises: of a long text, the maps of all layers together are larger than the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.attention_shares import rounding
from auxin.models.eager import asked_for_maps, eager_attention

Read = Callable[[str, str, Tensor], None]
"""Called with the path of a layer, the path of an attention within it, and its map."""


@contextlib.contextmanager
def read_maps(model: PreTrainedModel, layers: Mapping[str, nn.Module], read: Read) -> Iterator[None]:
    """Within the context, `model` computes attention maps and `read` is told of each, in the order in which they arise.

    Afterwards its attention is implemented as before.

    Args:
        model: in evaluation mode.
        layers: of it, by path.
        read: gets (samples, heads, queries, keys), not negative; must not change it, nor keep it.
    """
    reader = _Reader(read)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager_attention(model))
        stack.enter_context(
            asked_for_maps(module for layer in layers.values() for name, module in layer.named_modules() if name)
        )
        for layer_path, layer in layers.items():
            for name, module in layer.named_modules():
                if not name:
                    continue
                hook = partial(reader.hear, layer_path, f"{layer_path}.{name}")
                stack.callback(module.register_forward_hook(hook).remove)
        yield


class _Reader:
    """Hears what modules give, from the inside out: what holds an attention gives the same map again."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._last = ""

    def hear(self, layer: str, path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._last.startswith(f"{path}."):
            return
        found = _map_in(output)
        if found is not None:
            self._last = path
            self._read(layer, path, found)


def _map_in(output: Any) -> Tensor | None:
    """The last tensor beside a module's result that can be a map: T5 has its position bias before it."""
    if not isinstance(output, tuple):
        return None
    return next((item for item in reversed(output[1:]) if _is_map(item)), None)


def _is_map(item: Any) -> bool:
    """Whether it is of four axes and its rows are weights of one sum, or of less where some of it goes to no token."""
    if not isinstance(item, Tensor) or item.dim() != 4 or not item.is_floating_point():
        return False
    # Not the other way round: a row that is all padding may be no number.
    return not bool((item < 0).any() or (item.sum(dim=-1) > 1 + rounding(item.dtype)).any())
