"""Bricks: the modules that an edit may put into a model. Each says what it is, so that no room knows it by name.

A brick that **replaces** a module has a class method `replacing(module, **settings)`, which builds it for that module
(also on the meta device, where modules have shapes and no values). One that **wraps** a module is called as
`Class(inner, **settings)` and keeps the module as its attribute `inner` (`Around`). Parameters that brick and replaced
module call by the same name are the same; where the others come from is told by the brick's `Making`, or by fills of
the edit. A brick with non-persistent buffers has a method `reset_buffers()` that fills them from its settings, in the
type that its parameters ask for.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from auxin.errors import PlanError
from auxin.nn.shared_rows import Processes
from auxin.words.anatomy import ResidualBlocks
from auxin.words.registry import Registry
from auxin.words.roles import ParameterRole
from auxin.words.widths import Stream

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, Tensor]
Roles = Mapping[str, ParameterRole]
"""Shapes, tensors and roles of a module by their names in it ("weight", "inner.bias")."""


class Making:
    """How a brick's tensors come from those of the module that it replaces: pure functions of tensors.

    They run on a model in memory and on one that streams from a disk. `old` holds all parameters and persistent buffers
    of the replaced module, by their names in it. Results have the type and device of what they are made of.
    """

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        """Shapes of the tensors that are made. The brick's others keep the value that the replaced module has under
        their name; the module's others are used up.

        Raises:
            PlanError: it can't be made of a module of these shapes; the message says why and what would do.
        """
        raise NotImplementedError

    def keeps(self, old: Shapes, **settings: Any) -> Collection[str]:
        """Names of the replaced module's tensors that the brick has, too, as they are; more names than it has do no
        harm. Default: all that are not made, as of a brick that adds something."""
        return old.keys() - self.shapes(old, **settings).keys()

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        """The tensors that are made; whatever is random comes from `draw`, a generator on the CPU."""
        raise NotImplementedError

    def moments(self, old: Tensors, moments: Tensors, order: int, **settings: Any) -> dict[str, Tensor] | None:
        """The optimizer's moments of what is made, or of a part of it; those left out start anew, None: all do.

        Args:
            old: the replaced module's values.
            moments: its moments; those of parameters that the optimizer has not seen are missing.
            order: whether they are linear (1) or quadratic (2) in the gradient.
            settings: the brick's.
        """
        return None

    def back(self, new: Tensors, **settings: Any) -> dict[str, Tensor] | None:
        """The replaced module's tensors out of the brick's, those that are not kept under their name: what merging and
        taking back the edit use. None: there is no way back."""
        return None

    def moments_back(self, new: Tensors, moments: Tensors, order: int, **settings: Any) -> dict[str, Tensor] | None:
        """As `moments`, on the way back."""
        return None


class NothingMade(Making):
    """That of bricks without tensors of their own: the module that they replace is all there."""

    def shapes(self, old: Shapes, **settings: Any) -> Shapes:
        """None."""
        return {}

    def values(self, old: Tensors, draw: torch.Generator, **settings: Any) -> dict[str, Tensor]:
        """None."""
        return {}

    def back(self, new: Tensors, **settings: Any) -> dict[str, Tensor]:
        """None."""
        return {}


class Brick(nn.Module):
    """What all bricks say of themselves.

    A brick may extend a module that is one already (`auxin.nn.extension`): what it answers then comes on top of what
    `super()` answers. Buffers that no checkpoint holds are filled by a method `reset_buffers()`, where a brick has one.
    """

    brick_name: ClassVar[str] = ""
    """What it is registered as."""
    making: ClassVar[Making | None] = None
    """Where its tensors come from; None: those that are new come from fills of the edit, or as its class fills them."""
    plain_form: ClassVar[str | None] = None
    """How to get a checkpoint without the brick, in words that follow "Brick NAME: "; None: it can't be had."""
    temporary: ClassVar[str | None] = None
    """What the module has that it wraps only for a while, in words that follow "have "; it is taken off again as
    `plain_form` says, with whatever was put on it by then. None: it stays."""
    wide: ClassVar[Collection[str]] = ()
    """The names of those of its buffers that are in float32 at least, whatever type the model is cast to or loaded in:
    they move in steps that a shorter type does not have."""
    in_float: ClassVar[Collection[str]] = ()
    """The names of those of its matrices that make gates: where others are quantized, these are not."""
    pre_merges: ClassVar[bool] = False
    """Whether it is a product in the place of a linear layer, and can multiply by the whole matrix for few tokens at
    once (`merge_below`)."""

    @property
    def wrapped(self) -> nn.Module | None:
        """The module that it is put around; None: it stands in its place."""
        return self._modules.get("inner")

    def merge_below(self, tokens: int) -> None:
        """Multiply by the whole matrix where there are fewer than `tokens` tokens at once; where it `pre_merges`."""
        raise NotImplementedError

    def roles(self, replaced: Roles) -> Roles:
        """The roles of those of its parameters that the replaced module has not, by their names in it; those that it
        does not have in this form may be among them.

        `ParameterRole.vector` and `.beside` make them of those of `replaced`; their patterns do not matter. A factor
        of units, before or after the module, writes these and has the kind "scale".

        Args:
            replaced: the roles of the module that it replaces or wraps, by their names in that, no matter what is
                wrapped in there; also of those that it leaves out. Empty for modules that the architecture's anatomy
                does not know.
        """
        return {}

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """By which factors some of its parameters are multiplied so that what it adds to the residual stream is
        multiplied by `factor`; with a factor of 0 that is nothing, as in an identity block.

        Args:
            factor: the factor.
            plain: the factors that do it to the module that it replaces or wraps, by their names in that; empty where
                that adds nothing.

        Returns:
            Factors by names in the brick. Default: those of `plain`, which is right where the result of the brick is a
            multiple of the module's.

        Raises:
            PlanError: no factors do that; the message, which follows the brick's path, says why and what would do.
        """
        prefix = "" if self.wrapped is None else "inner."
        return {f"{prefix}{name}": value for name, value in plain.items()}

    def residual_blocks(self) -> ResidualBlocks | None:
        """Into how many blocks it divides the residual stream; None: it leaves the stream as it is."""
        return None

    def fixed_widths(self) -> Mapping[Stream, str]:
        """The streams whose width can't change as long as it is there, and why, in a sentence or two that follow
        "WIDTH = 64: " and say what to do instead. Default: none; its parameters change as their roles say."""
        return {}

    def idle(self) -> Collection[str]:
        """Names in it of parameters that at present have no part in what it computes, whatever it is given. Default:
        none."""
        return ()

    def forward_flops(self, counted: float, *args: Any, **kwargs: Any) -> float:
        """FLOPs of one call of `forward`, with all that is inside, where shapes can't tell: products that torch has no
        name for, or such as only a share of the tokens needs. A multiply-add is two.

        Args:
            counted: the FLOPs of the matrix products and the attention that torch saw during the call.
            args, kwargs: what `forward` was called with; tensors have shapes and no values.
        """
        return counted

    def shared_rows(self) -> Collection[str]:
        """Names in it of the parameters whose rows several processes can share, so that each computes with its own
        (tensor parallelism). Default: none; each process then computes the same with all of it.

        Raises:
            ConfigError: it is set in a way that leaves no sums for that; the message says what would do.
        """
        return ()

    def share(self, processes: Processes) -> None:
        """Compute with `processes` from now on: those parameters then hold this one's rows, as DTensors."""
        raise NotImplementedError

    def overwritten_with(self, other: nn.Module) -> None:
        """Its tensors were overwritten in place with those of `other`, a module of the same class: what it keeps beside
        them has to follow."""

    def filled(self) -> None:
        """Its buffers have got their values, those of a checkpoint or by `reset_buffers`: what it keeps beside them has
        to follow."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name in self.wide if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if new.dtype != (dtype := wide_type(new.dtype)):  # a cast must not round it
                self._buffers[name] = new.to(dtype) if old.is_meta else old.to(new.device, dtype)
        return self


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of a `Brick.wide` buffer in a model of type `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def is_wide(model: nn.Module, name: str) -> bool:
    """Whether the tensor called `name` is a `Brick.wide` buffer."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    return isinstance(module, Brick) and key in module.wide


BRICKS: Registry[type[Brick]] = Registry("brick", "auxin.nn", error=PlanError)
"""Every brick by name. Entry points of the group "auxin.bricks" name modules of other packages that define some."""

BrickClass = TypeVar("BrickClass", bound=type[Brick])


MAKINGS: Registry[Making] = Registry("making", "auxin.nn", error=PlanError)
"""The makings that serve without a brick, by name: for modules whose class follows from the config. Entry points of the
group "auxin.makings" name modules of other packages that define some."""


class Around(Brick):
    """A brick that is put around a module, its `inner`.

    Tensors and numbers that others read of the inner module (a weight's type, say) are found here too; its modules and
    methods are not, or whoever asks what can be done with a module (PEFT, to merge adapters) would take this for it.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner" or name.startswith("_"):  # what others note about a module is about that one alone
                raise
            value = getattr(self.inner, name)
            if callable(value):  # a module or a method
                raise
            return value


def brick(name: str) -> Callable[[BrickClass], BrickClass]:
    """Class decorator: register the class, a `Brick`, under `name`; TypeError when it is none."""

    def register(cls: BrickClass) -> BrickClass:
        if not issubclass(cls, Brick):
            raise TypeError(f"{cls.__name__} is no auxin.nn.bricks.Brick and can't say what it is; make it a subclass")
        BRICKS.add(name, cls)
        cls.brick_name = name
        return cls

    return register


def find_brick(name: str) -> type[Brick]:
    """The brick called `name`; PlanError when there is none."""
    return BRICKS.find(name)
