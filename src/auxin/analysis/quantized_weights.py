"""Which parameters of a model are quantized, and the model with those that are, for a while.

The weights of all linear layers, convolutions and experts, of embeddings and of norms have a grid each; an expert's
matrix, which lies in one tensor with the others, has its own. The output head and gates stay as they are: routers,
matrices of a single row, and what bricks say of their own. So do biases and norms' offsets.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel

from auxin.analysis.quantizers import WeightRanges, rounded_weight
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import Brick
from auxin.words.roles import ParameterRole

WeightKind = Literal["matrix", "embedding", "gain", "bias", "full"]
"""What a parameter is to a run: a weight of products, an embedding, a norm's gain, something that is added or stays
as it is, or the weight of a product in floating point."""
_WEIGHTS = ("matrix", "embedding", "gain")


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    entry: str
    name: str
    role: ParameterRole
    kind: WeightKind


class Weights:
    """The parameters of a model, and what they are to integers.

    Args:
        model: of a known architecture.
        ranges: how far the grids of weights reach.

    Raises:
        PlanError: the architecture is not known, or a weight that gets a grid holds what none covers.
    """

    def __init__(self, model: PreTrainedModel, ranges: WeightRanges = "min-max") -> None:
        body, names = anatomy(model), {id(tensor): name for name, tensor in model.named_parameters()}
        head = model.get_output_embeddings()
        self._ranges = ranges
        self._bits: int | None = None
        self._made: dict[tuple[int, int | None, int], nn.Parameter] = {}
        self.heads = {path for path, module in model.named_modules() if module is head}
        """The paths of the output head."""
        self._places = []
        told: dict[int, str] = {}  # by which a tensor is called wherever it is
        for path, module in model.named_modules():
            for entry, tensor in module._parameters.items():
                if tensor is None:
                    continue
                role = body.role(names[id(tensor)])
                kind = _kind(role, tensor)
                in_float = isinstance(module, Brick) and entry in module.in_float
                if (path in self.heads and kind != "bias") or in_float:
                    kind = "full"
                if isinstance(module, ParametrizationList):
                    kind = "bias"  # what is computed of it is the weight
                name = f"{path}.{entry}" if path else entry
                name = name if path in self.heads else told.setdefault(id(tensor), name)
                self._places.append(_Place(module, entry, name, role, kind))
                if kind in _WEIGHTS and not tensor.isfinite().all():
                    raise PlanError(
                        f"{name} holds entries that are not finite, which no grid covers. Look at how the model was "
                        "saved, or take an earlier checkpoint."
                    )
        self._kinds = {place.name: place.kind for place in self._places}

    def tensors(self) -> Iterator[tuple[str, Tensor, WeightKind]]:
        """The parameters as they are now: a name, the tensor, what it is. The head comes first: where it is tied, its
        tensor is an embedding's."""
        for place in sorted(self._places, key=lambda place: place.kind != "full"):
            tensor = place.module._parameters[place.entry]
            assert tensor is not None
            yield place.name, tensor, place.kind

    def quantized(self) -> dict[str, WeightKind]:
        """The names of those that get a grid."""
        return {name: kind for name, kind in self._kinds.items() if kind in _WEIGHTS}

    def linear_layers(self) -> list[nn.Linear]:
        """The linear layers whose weights get a grid."""
        places = [place for place in self._places if place.kind in _WEIGHTS and place.entry == "weight"]
        return [place.module for place in places if isinstance(place.module, nn.Linear)]

    def is_full(self, name: str) -> bool:
        """Whether products with the parameter `name` are computed in floating point."""
        return self._kinds.get(name) == "full"

    def rounded_as_computed(self, weight: Tensor) -> Tensor:
        """A weight that a model computes of its parameters, as products read it."""
        return rounded_weight(weight, ranges=self._ranges) if self._bits == 8 else weight

    @contextlib.contextmanager
    def rounded(self, bits: int, group: int | None = None) -> Iterator[None]:
        """Within the context, the model has quantized weights; afterwards the very parameters that it had. The
        quantized ones are kept for another time.

        Args:
            bits: 8: every weight on one grid. 4: matrices on one for each output, the others as they are.
            group: with 4 bits, how many inputs of an output share a grid; None: all of them.
        """
        wanted = _WEIGHTS if bits == 8 else ("matrix",)
        before = [(place, place.module._parameters[place.entry]) for place in self._places if place.kind in wanted]
        try:
            self._bits = bits
            for place, tensor in before:
                assert tensor is not None
                key = bits, group, id(tensor)
                if key not in self._made:
                    rounded = self._rounded(place, tensor, bits, group)
                    self._made[key] = nn.Parameter(rounded, requires_grad=False)
                place.module._parameters[place.entry] = self._made[key]
            yield
        finally:
            self._bits = None
            for place, tensor in before:
                place.module._parameters[place.entry] = tensor

    def _rounded(self, place: _Place, tensor: Tensor, bits: int, group: int | None) -> Tensor:
        experts = len(tensor) if tensor.dim() == 3 and _is_along(place.role, 0, "expert") else 1
        if bits == 8:
            return rounded_weight(tensor, bits, self._ranges, rows=experts)
        there, back = _outputs_first(place.role, tensor)
        moved = there(tensor)
        return back(rounded_weight(moved.contiguous(), bits, rows=moved[..., 0].numel(), group=group))


def _kind(role: ParameterRole, tensor: Tensor) -> WeightKind:
    if role.kind == "head":
        return "full" if tensor.dim() > 1 else "bias"
    if role.kind in ("gain", "query_gain", "key_gain"):
        return "gain"
    if role.kind == "embedding" and not role.pattern.endswith("bias"):
        if role.pattern.endswith("bias_table") or role.along("query"):
            return "matrix"
        return "embedding" if tensor.dim() < 4 else "matrix"
    if role.kind not in ("matrix", "scale") or tensor.dim() < 2:
        return "bias"
    if len(role.axes) == 2 and _is_router(role, tensor):
        return "full"
    return "matrix"


def _is_router(role: ParameterRole, tensor: Tensor) -> bool:
    return any(
        _is_along(role, axis, "expert") or (tensor.shape[axis] == 1 and role.access[axis] != "reads") for axis in (0, 1)
    )


def _is_along(role: ParameterRole, axis: int, stream: str) -> bool:
    return any(segment.stream == stream for segment in role.axes[axis])


def _outputs_first(
    role: ParameterRole, tensor: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What brings a matrix into the order (.., outputs, inputs), and what brings it back."""
    if tensor.dim() > 3:  # a convolution: outputs first, all else is inputs
        return (lambda x: x.flatten(1)), (lambda x: x.view(tensor.shape))
    last = role.access[-1] == "writes" or (tensor.dim() == 2 and role.access[0] == "reads")
    if last:
        return (lambda x: x.mT), (lambda x: x.mT)
    return (lambda x: x), (lambda x: x)
