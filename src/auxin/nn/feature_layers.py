"""Layers of ReLU random features (`auxin.nn.random_features`; "Scalable Neural Network Kernels", arXiv 2310.13225):

* y = Phi(x) Y^T in the place of a linear layer and the activation behind it, with Phi(x) = m^-1/2 max(G x, c), random
  directions G that stay, and Y (outputs, m) that is trained. Y begins as the same map of the rows of the weight. There
  is no bias and no further activation: what it computes at first is not what the layer computed.
* An adapter behind a module, z -> z + v * (Phi(z) Y^T), with v of zeros at first, so that it is nothing.
* Bundling: y is linear in Phi(x), so that the next matrix merges exactly, W2 (Y Phi(x)) = (W2 Y) Phi(x). What is left
  are the features, which have nothing to train, and a linear layer on m numbers.

G is a buffer that checkpoints hold.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auxin.errors import PlanError
from auxin.nn.bricks import MAKINGS, Around, Brick, Making, Roles, Shapes, Tensors, brick
from auxin.nn.linear import linear_class, widths
from auxin.nn.low_rank import finite_weight, moment_of_product
from auxin.nn.made import take_over
from auxin.nn.random_features import drawn_directions, relu_features
from auxin.words.roles import ParameterRole
from auxin.words.widths import FEED_FORWARD, Stream

WEIGHT, FEATURES, DIRECTIONS, GATE = "weight", "weight_features", "directions", "gate"
_FIXED = (
    "the model has layers of random features, whose directions were drawn for one width. Change the size first, or "
    "take adapters off (remove_module with leaves = inner) and put them on again afterwards."
)


class ReluFeatureMaking(Making):
    """Y and G out of a weight; there is no way back.

    Args:
        transposed: whether the weight is (in, out), as of a Conv1D.
    """

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def shapes(self, old: Shapes, features: int, threshold: float = 0.0, orthogonal: bool = True) -> Shapes:  # type: ignore[override]
        """Those of `weight_features` (out, m) and `directions` (m, in).

        Raises:
            PlanError: the module is no linear layer, or there would be no feature.
        """
        if len(old.get(WEIGHT, ())) != 2:
            raise PlanError(
                "A layer of random features replaces a linear layer, whose weight is a matrix; this module has the "
                f"tensors { {name: list(shape) for name, shape in old.items()} }. Choose another layer."
            )
        if features < 1:
            raise PlanError(f"features = {features}, and there must be one at least. Give 1 or more.")
        first, second = old[WEIGHT]
        outputs, inputs = (second, first) if self.transposed else (first, second)
        return {FEATURES: (outputs, features), DIRECTIONS: (features, inputs)}

    def keeps(self, old: Shapes, **settings: Any) -> Collection[str]:
        """Nothing: the bias goes, as in the paper's layer."""
        return ()

    def values(  # type: ignore[override]
        self, old: Tensors, draw: torch.Generator, features: int, threshold: float = 0.0, orthogonal: bool = True
    ) -> dict[str, Tensor]:
        """Directions that are drawn, and the features of the weight's rows along them.

        Raises:
            PlanError: the weight holds other than finite floating-point numbers.
        """
        weight, dtype = finite_weight(old[WEIGHT])
        rows = weight.mT if self.transposed else weight
        directions = drawn_directions(features, rows.shape[1], draw, orthogonal).to(rows.device, dtype)
        return {FEATURES: relu_features(rows, directions.double(), threshold).to(dtype), DIRECTIONS: directions}


class _Featured(Brick):
    """What bricks share that compute features of what they read: the buffer `directions` (m, in)."""

    directions: Tensor
    threshold: float

    @property
    def weight(self) -> Tensor:
        """What is trained, else the directions; for whoever looks at a layer's weight without a call: for its type, or
        to initialise what was not loaded (T5)."""
        return cast(Tensor, getattr(self, FEATURES, self.directions))

    @property
    def bias(self) -> Tensor:
        """(0,), there being none; for whoever initialises that of any layer that was not loaded (SigLIP)."""
        return self.directions.new_empty(0)

    def _read(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., m)."""
        return relu_features(x, self.directions.to(x.dtype), self.threshold)

    def fixed_widths(self) -> Mapping[Stream, str]:
        """That of what it reads, and those of what may lie between it and the residual."""
        return dict.fromkeys(("residual", *FEED_FORWARD), _FIXED)


class ReluFeatureLayer(_Featured):
    """What both kinds of layers are: x -> Phi(x) Y^T. Parameter `weight_features` Y (out, m), buffer `directions` G.

    Args:
        in_features, out_features, device, dtype: as of `nn.Linear`; nothing is filled.
        features: m.
        threshold: c.
    """

    layer: ClassVar[type[nn.Module]]
    """The class that it replaces."""
    making: ClassVar[ReluFeatureMaking]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int,
        threshold: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
        self.weight_features = nn.Parameter(torch.empty(out_features, features, device=device, dtype=dtype))
        self.register_buffer(DIRECTIONS, torch.empty(features, in_features, device=device, dtype=dtype))

    @classmethod
    def replacing(cls, module: nn.Module, features: int, threshold: float = 0.0, orthogonal: bool = True) -> Self:
        """The layer for `module`, made of its weight where it has values; its bias goes.

        Args:
            module: an `nn.Linear` or `Conv1D` (as the class says), or a subclass that computes the same.
            features: m, 1 or more.
            threshold: c, 0 or below.
            orthogonal: whether blocks of the directions are orthogonal.

        Raises:
            PlanError: the module is of another class, or there would be no feature.
        """
        if linear_class(module) is not cls.layer:
            raise PlanError(
                f"{cls.__name__} replaces a {cls.layer.__name__}, received a {type(module).__name__}, which does "
                "something of its own. Choose another layer, or take off what was put around this one."
            )
        weight, settings = module.get_parameter(WEIGHT), {"features": features, "orthogonal": orthogonal}
        cls.making.shapes({WEIGHT: tuple(weight.shape)}, features)
        new = cls(*widths(module), features, threshold, weight.device, weight.dtype)
        take_over(new, module, cls.making, threshold=threshold, **settings)
        return new.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(self._read(x), self.weight_features)

    def roles(self, replaced: Roles) -> Roles:
        """Y writes what the weight wrote."""
        if WEIGHT not in replaced:
            return {}
        return {FEATURES: replaced[WEIGHT].beside(1 if self.making.transposed else 0, 0)}

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """Y, where the layer adds to the residual stream."""
        return {FEATURES: factor} if plain else {}

    def extra_repr(self) -> str:
        features = len(self.directions)
        widths = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{widths}, features={features}, threshold={self.threshold:g}"


@brick("relu_feature_linear")
class ReluFeatureLinear(ReluFeatureLayer):
    """In the place of an `nn.Linear`."""

    layer = nn.Linear
    making = ReluFeatureMaking()


@brick("relu_feature_conv1d")
class ReluFeatureConv1D(ReluFeatureLayer):
    """In the place of a `Conv1D` (GPT-2's linear layer)."""

    layer = Conv1D
    making = ReluFeatureMaking(transposed=True)


class KeptDirections(Making):
    """The directions of a layer of features, whose Y is used up."""

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        """None.

        Raises:
            PlanError: it is no layer of features.
        """
        if DIRECTIONS not in old:
            raise PlanError("Features alone are left of a layer of random features; this one is none.")
        return {}

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        """None."""
        return {}


@brick("relu_features")
class ReluFeatures(_Featured):
    """Phi(x) alone, (..., in) -> (..., m): what is left of a layer of features when the matrix behind it took up Y.

    Args:
        directions: G (m, in).
        threshold: c.
    """

    making = KeptDirections()

    def __init__(self, directions: Tensor, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer(DIRECTIONS, directions)

    @classmethod
    def replacing(cls, module: nn.Module) -> Self:
        """The features of `module`.

        Raises:
            PlanError: it is no layer of features.
        """
        if not isinstance(module, ReluFeatureLayer):
            raise PlanError(
                f"Features alone are left of a layer of random features, received a {type(module).__name__}. Replace "
                "it by such a layer first."
            )
        return cls(module.directions, module.threshold).train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., m)."""
        return self._read(x)

    def extra_repr(self) -> str:
        features, inputs = self.directions.shape
        return f"in_features={inputs}, features={features}, threshold={self.threshold:g}"


class Bundling(Making):
    """The matrix W2 Y of a linear layer that reads a layer of features, in a module that holds both.

    Settings: `layer` and `reader`, their paths in that module, and `transposed`, whether the reader's weight is (in,
    out). Moments follow as those of a product do (`moment_of_product`).
    """

    def shapes(self, old: Shapes, layer: str, reader: str, transposed: bool = False) -> Shapes:  # type: ignore[override]
        """That of the reader's weight, (out, m) or (m, out).

        Raises:
            PlanError: one of them is something else, or they do not fit.
        """
        features, weight = old.get(f"{layer}.{FEATURES}"), old.get(f"{reader}.{WEIGHT}")
        if features is None or weight is None or weight[0 if transposed else 1] != features[0]:
            raise PlanError(f"{reader} is no linear layer that reads {layer}, a layer of random features.")
        outputs = weight[1 if transposed else 0]
        return {f"{reader}.{WEIGHT}": (features[1], outputs) if transposed else (outputs, features[1])}

    def values(  # type: ignore[override]
        self, old: Tensors, draw: torch.Generator, layer: str, reader: str, transposed: bool = False
    ) -> dict[str, Tensor]:
        """The product, computed in float64."""
        weight = old[f"{reader}.{WEIGHT}"]
        product = _turned(weight, transposed).double() @ old[f"{layer}.{FEATURES}"].double()
        return {f"{reader}.{WEIGHT}": _turned(product, transposed).to(weight.dtype).contiguous()}

    def moments(  # type: ignore[override]
        self, old: Tensors, moments: Tensors, order: int, layer: str, reader: str, transposed: bool = False
    ) -> dict[str, Tensor] | None:
        """As much as the moments of both tell."""
        first, second = f"{layer}.{FEATURES}", f"{reader}.{WEIGHT}"
        if first not in moments or second not in moments:
            return None
        weight, of_weight = (_turned(tensors[second], transposed) for tensors in (old, moments))
        moment = moment_of_product(weight, old[first], of_weight, moments[first], order)
        return {second: _turned(moment, transposed).to(moments[second].dtype).contiguous()}


MAKINGS.add("bundled_features", Bundling())


class ReluAdapter(nn.Module):
    """z -> z + v * (Phi(z) Y^T): parameters `weight_features` Y (width, m) and `gate` v (width,), buffer `directions` G
    (m, width).

    Args:
        width: of z.
        features: m.
        threshold: c.
        device, dtype: of all; on the meta device nothing is filled.
    """

    directions: Tensor

    def __init__(
        self,
        width: int,
        features: int,
        threshold: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.weight_features = nn.Parameter(torch.empty(width, features, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.register_buffer(DIRECTIONS, torch.empty(features, width, device=device, dtype=dtype))
        if not self.directions.is_meta:
            nn.init.normal_(self.weight_features, std=0.02)
            self.directions.copy_(drawn_directions(features, width, orthogonal=True))

    def forward(self, z: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        features = relu_features(z, self.directions.to(z.dtype), self.threshold)
        return z + self.gate * F.linear(features, self.weight_features)

    def extra_repr(self) -> str:
        features, width = self.directions.shape
        return f"width={width}, features={features}, threshold={self.threshold:g}"


@brick("feature_adapter")
class FeatureAdapter(Around):
    """A module with an adapter behind it, `adapter`, for what it gives, or gives first.

    Args:
        inner: the module.
        width: of what it gives.
        features: m.
        threshold: c, 0 or below, so that nothing comes of nothing.
    """

    plain_form = (
        "take it off (the edit remove_module with leaves = inner), which leaves the module as it is without it; it is "
        "no linear map, so that it can't be merged"
    )

    def __init__(self, inner: nn.Module, width: int, features: int, threshold: float = 0.0) -> None:
        super().__init__(inner)
        if features < 1 or threshold > 0:
            raise PlanError(
                f"features = {features} must be 1 or more, and threshold = {threshold:g} 0 or below. Give such numbers."
            )
        example = next(inner.parameters())
        self.adapter = ReluAdapter(width, features, threshold, example.device, example.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module."""
        given = self.inner(*args, **kwargs)
        return (self.adapter(given[0]), *given[1:]) if isinstance(given, tuple) else self.adapter(given)

    def roles(self, replaced: Roles) -> Roles:
        """Gate and Y write what the module adds to the residual."""
        for role in replaced.values():
            for axis, (segments, how) in enumerate(zip(role.axes, role.access, strict=True)):
                if how == "writes" and any(segment.stream == "residual" for segment in segments):
                    own: dict[str, ParameterRole] = {GATE: role.vector(axis, "scale"), FEATURES: role.beside(axis, 0)}
                    return {f"adapter.{name}": of for name, of in own.items()}
        return {}

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """The module's: of nothing the adapter makes nothing, and where c is 0 of a multiple a multiple."""
        if factor < 0 or (factor > 0 and self.adapter.threshold < 0):
            raise PlanError(
                "has an adapter of random features, which is not linear. Change the model before it gets adapters."
            )
        return super().scaled(factor, plain)

    def fixed_widths(self) -> Mapping[Stream, str]:
        """The residual's."""
        return {"residual": _FIXED}


def _turned(weight: Tensor, transposed: bool) -> Tensor:
    """A weight as (out, in), or that back in its own order."""
    return weight.mT if transposed else weight
