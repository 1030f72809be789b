"""A linear layer that a dense one guides while it learns ("Building on Efficient Foundations", Wei et al. 2024, arXiv
2406.16450, section 3.2):

    y = a W x + (1 - a) P x + b,

where P is a product with fewer parameters (`auxin.nn.low_rank`, `auxin.nn.block_products`), W a whole matrix, and a,
the strength, falls from 1 to 0 in the course of a training, after which W goes. At a = 1 the layer is W x + b, whatever
P is.

With `skip`, a training step computes W with the probability a alone, and P alone otherwise, which halves what W costs
in a training over which a falls like half a cosine.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, Self, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from auxin.errors import PlanError
from auxin.nn.bricks import Brick, Making, Roles, Shapes, Tensors, brick, find_brick, wide_type
from auxin.nn.linear import linear_class, with_bias
from auxin.words.roles import ParameterRole
from auxin.words.widths import Stream

Kept = Literal["kept"]
KEPT: Kept = "kept"
"""What a product is made of that a guide leaves: of the product that was guided."""
PRODUCT, WEIGHT, STRENGTH = "product", "weight", "strength"
Value = TypeVar("Value")
Product = TypeVar("Product", bound=Brick)


def kept(old: Mapping[str, Value]) -> dict[str, Value]:
    """Of what there is for the tensors of a guide that of its product, by the product's names.

    Raises:
        PlanError: it is no guide.
    """
    found = {name.removeprefix(f"{PRODUCT}."): value for name, value in old.items() if name.startswith(f"{PRODUCT}.")}
    if not found:
        raise PlanError("start = kept is for a layer with a guide, whose product stays; this one has none.")
    return found


def kept_product(guide: nn.Module, cls: type[Product]) -> Product:
    """The product of `guide`, with its bias; the module that is left when the guide goes.

    Raises:
        PlanError: it is no guide, or one of another product.
    """
    product = guide.product if isinstance(guide, Guided) else guide
    if type(product) is not cls or product is guide:
        raise PlanError(f"start = kept is for a guide of a {cls.__name__}, received a {type(guide).__name__}.")
    assert isinstance(guide, Guided)
    product.register_parameter("bias", guide.bias)
    return product.train(guide.training)


class GuidedMaking(Making):
    """The product's tensors out of the weight, and the weight out of both."""

    def shapes(self, old: Shapes, product: str, guide: str = "weight", skip: bool = False, **settings: Any) -> Shapes:  # type: ignore[override]
        """Those of the product, below `product.`, and of the weight where the product makes it."""
        made = {f"{PRODUCT}.{name}": shape for name, shape in _making(product).shapes(old, **settings).items()}
        return made | ({WEIGHT: old[WEIGHT]} if guide == "product" else {})

    def values(  # type: ignore[override]
        self,
        old: Tensors,
        draw: torch.Generator,
        product: str,
        guide: str = "weight",
        skip: bool = False,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """As the product's."""
        making = _making(product)
        factors = making.values(old, draw, **settings)
        made = {f"{PRODUCT}.{name}": value for name, value in factors.items()}
        return made | ((making.back(factors, **settings) or {}) if guide == "product" else {})

    def moments(  # type: ignore[override]
        self,
        old: Tensors,
        moments: Tensors,
        order: int,
        product: str,
        guide: str = "weight",
        skip: bool = False,
        **settings: Any,
    ) -> dict[str, Tensor] | None:
        """As the product's; those of the weight stay, also where the product makes it, by which it moves little."""
        found = _making(product).moments(old, moments, order, **settings)
        if found is None:
            return None
        made = {f"{PRODUCT}.{name}": value for name, value in found.items()}
        return made | ({WEIGHT: moments[WEIGHT]} if guide == "product" else {})

    def back(  # type: ignore[override]
        self, new: Tensors, product: str, guide: str = "weight", skip: bool = False, **settings: Any
    ) -> dict[str, Tensor]:
        """a W + (1 - a) P: what the layer is at its strength."""
        whole = (_making(product).back(kept(new), **settings) or {})[WEIGHT]
        strength = new[STRENGTH].double()
        return {WEIGHT: (strength * new[WEIGHT].double() + (1 - strength) * whole.double()).to(new[WEIGHT].dtype)}

    def moments_back(  # type: ignore[override]
        self,
        new: Tensors,
        moments: Tensors,
        order: int,
        product: str,
        guide: str = "weight",
        skip: bool = False,
        **settings: Any,
    ) -> dict[str, Tensor] | None:
        """Those of W by a to the power of the order: the gradient of W is a times that of the merged matrix. Exact for
        a strength that stood still; one that has fallen was larger when they were made. At 0, where W learns nothing,
        as the product's."""
        strength = float(new[STRENGTH])
        if strength == 0:
            has_some = any(name.startswith(PRODUCT) for name in moments)
            return _making(product).moments_back(kept(new), kept(moments), order, **settings) if has_some else None
        if WEIGHT not in moments:
            return None
        moment = moments[WEIGHT].double() / strength**order
        return {WEIGHT: moment.to(moments[WEIGHT].dtype)}

    def keeps(self, old: Shapes, **settings: Any) -> set[str]:
        """Bias and weight."""
        return {"bias", WEIGHT}


def _making(product: str) -> Making:
    making = find_brick(product).making
    if making is None or isinstance(making, GuidedMaking):
        raise PlanError(f"product: {product!r} is no product of factors. Give low_rank_linear, for example.")
    return making


@brick("guided")
class Guided(Brick):
    """See the module.

    Parameters `weight` W and `bias` of the layer that it replaces, and below `product` those of P; the buffer
    `strength` a (), saved with the model, in float32 at least.

    Compiled code mixes both whatever a is, and with `skip` makes up for chance in what it gives, not in what it takes;
    where a is 0 it leaves W out. It is compiled anew when `set_strength` comes to 0, and for no other strength.

    Args:
        module: the layer that it replaces.
        product: P, without a bias.
        skip: whether training steps leave W out by chance.
    """

    making = GuidedMaking()
    plain_form = (
        "train with the hook GuideFade until the guides are at 0, then take them off: method structured-ffn with "
        "finish = true; or merge them back (merge_module) into dense layers"
    )
    temporary = "guides of an earlier change"
    wide = (STRENGTH,)
    weight: nn.Parameter
    bias: nn.Parameter | None
    strength: Tensor

    def __init__(self, module: nn.Module, product: Brick, skip: bool) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, module.weight)
        self.register_parameter("bias", cast(nn.Parameter | None, module.bias))
        self.product = product
        product.register_parameter("bias", None)
        self.skip, self.transposed = skip, cast(Any, product.making).transposed
        dtype = wide_type(self.weight.dtype)
        self.register_buffer(STRENGTH, torch.ones((), device=self.weight.device, dtype=dtype))
        self._faded = False  # what is known without a look at values: that W does not count

    @classmethod
    def replacing(
        cls, module: nn.Module, product: str, guide: str = "weight", skip: bool = False, **settings: Any
    ) -> Self:
        """The guided layer for `module`, filled from it where it has values.

        Args:
            module: what `product` can replace.
            product: the brick that the product is ("low_rank_linear", ...).
            guide: what W begins as: "weight", the replaced one's, or "product", P itself.
            skip: whether training steps leave W out by chance.
            settings: the product's.

        Raises:
            PlanError: the module is no linear layer, which alone has a whole matrix, or the product can't replace it.
        """
        if linear_class(module) is None:
            raise PlanError(
                f"a guide is the whole matrix of a linear layer, received a {type(module).__name__}. Choose another "
                "layer, or merge back what is there (merge_module) first."
            )
        if guide not in ("weight", PRODUCT):
            raise PlanError(f"guide: {guide!r} is none. Give weight or product.")
        making = _making(product)
        made = cast(Any, find_brick(product)).replacing(module, **settings)
        new = cls(module, made, skip)
        if guide == PRODUCT and not new.weight.is_meta:
            whole = making.back(dict(made.named_parameters()), **settings)
            new.weight = nn.Parameter((whole or {})[WEIGHT])
        return new.train(module.training)

    def set_strength(self, strength: float) -> None:
        """Let W count `strength`, 1 (alone) to 0 (not at all)."""
        self.strength.fill_(strength)
        self._faded = strength == 0

    def reset_buffers(self) -> None:
        """As at the start. A new tensor: one that was loaded may be kept."""
        self.strength, self._faded = torch.ones_like(self.strength), False

    def filled(self) -> None:
        """Whether W counts is looked at again."""
        self._faded = not self.shapes_alone and float(self.strength) == 0

    def overwritten_with(self, other: nn.Module) -> None:
        """As `filled`."""
        self.filled()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.filled()

    @property
    def shapes_alone(self) -> bool:
        """Whether nothing is known of it but shapes."""
        return self.weight.is_meta or isinstance(self.weight, FakeTensor)

    def idle(self) -> Collection[str]:
        """The product where W counts alone, W where it does not count at all."""
        strength = self._known_strength()
        if strength == 1:
            return [f"{PRODUCT}.{name}" for name, _ in self.product.named_parameters()]
        return [WEIGHT] if strength == 0 else []

    def _known_strength(self) -> float:
        """a; on shapes alone 0 or some number at which all counts."""
        if self.shapes_alone:
            return 0.0 if self._faded else 0.5
        return float(self.strength)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.compiler.is_compiling():
            return self._compiled(x)
        strength = self._known_strength()
        if self.training and self.skip and 0 < strength < 1 and torch.rand(()) >= strength:
            strength = 0.0
        if strength == 0:
            return with_bias(self.product(x), self.bias)
        if strength == 1:
            return F.linear(x, self._matrix, self.bias)
        output = strength * F.linear(x, self._matrix) + (1 - strength) * self.product(x)
        return with_bias(output, self.bias)

    def _compiled(self, x: Tensor) -> Tensor:
        """`forward` without a look at the strength's value, at which a graph would break."""
        product = self.product(x)
        if self._faded:
            return with_bias(product, self.bias)
        whole, strength = F.linear(x, self._matrix), self.strength
        if self.training and self.skip:
            strength = torch.where(torch.rand_like(strength) < strength, strength, 0.0)
        # Beside short types a tensor without axes would be rounded to these.
        wide = wide_type(whole.dtype)
        output = (strength * whole.to(wide) + (1 - strength) * product.to(wide)).to(whole.dtype)
        return with_bias(output, self.bias)

    @property
    def _matrix(self) -> Tensor:
        return self.weight.mT if self.transposed else self.weight

    def roles(self, replaced: Roles) -> Roles:
        """Those of the product's factors, below it."""
        return {
            f"{PRODUCT}.{name}": ParameterRole(
                role.pattern.removesuffix(name) + f"{PRODUCT}.{name}", role.axes, role.access, role.kind
            )
            for name, role in self.product.roles(replaced).items()
        }

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """The layer's own weight and bias, and the product."""
        return dict(plain) | {f"{PRODUCT}.{name}": value for name, value in self.product.scaled(factor, plain).items()}

    def fixed_widths(self) -> Mapping[Stream, str]:
        """All: a product has sizes of its own."""
        return dict.fromkeys(
            get_args(Stream),
            "layers have guides of an earlier change. Train with GuideFade until they are at 0 and take them off "
            "(structured-ffn with finish = true), or merge them back (merge_module) first.",
        )

    def extra_repr(self) -> str:
        return f"skip={self.skip}" if self.shapes_alone else f"strength={float(self.strength):.4g}, skip={self.skip}"
