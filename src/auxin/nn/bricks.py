"""Bricks: the modules that an edit may put into a model. Each says what it is, so that no room knows it by name.

A brick that **replaces** a module has a class method `replacing(module, **settings)`, which builds it for that module
(also on the meta device, where modules have shapes and no values). One that **wraps** a module is called as
`Class(inner, **settings)` and keeps the module as its attribute `inner`. Parameters that brick and replaced module call
by the same name are the same; where the others come from is told by the brick's `Making`, or by fills of the edit. A
brick with non-persistent buffers has a method `reset_buffers()` that fills them from its settings, in the type that its
parameters ask for.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from auxin.errors import PlanError
from auxin.words.registry import Registry
from auxin.words.roles import ParameterRole, ResidualBlocks

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


class Brick(nn.Module):
    """What all bricks say of themselves."""

    making: ClassVar[Making | None] = None
    """Where its tensors come from; None: those that are new come from fills of the edit, or as its class fills them."""
    plain_form: ClassVar[str | None] = None
    """How to get a checkpoint without the brick, in words that follow "Brick NAME: "; None: it can't be had."""

    def roles(self, replaced: Roles) -> Roles:
        """The roles of those of its parameters that the replaced module has not.

        Args:
            replaced: the roles of the module that it replaces or wraps.
        """
        return {}

    def scaled(self, factor: float) -> dict[str, float]:
        """By which factors some of its parameters are multiplied so that its result is multiplied by `factor`; with a
        factor of 0, so that it adds nothing to what comes in. An identity block is made by it.

        Raises:
            PlanError: no factors do that.
        """
        return {}

    def residual_blocks(self) -> ResidualBlocks | None:
        """Into how many blocks it divides the residual stream; None: it leaves the stream as it is."""
        return None


BRICKS: Registry[type[nn.Module]] = Registry("brick", "auxin.nn", error=PlanError)
"""Every brick by name. Entry points of the group "auxin.bricks" name modules of other packages that define some."""

BrickClass = TypeVar("BrickClass", bound=type[nn.Module])


MAKINGS: Registry[Making] = Registry("making", "auxin.nn", error=PlanError)
"""The makings that serve without a brick, by name: for modules whose class follows from the config. Entry points of the
group "auxin.makings" name modules of other packages that define some."""


def brick(name: str) -> Callable[[BrickClass], BrickClass]:
    """Class decorator: register the class under `name`."""

    def register(cls: BrickClass) -> BrickClass:
        BRICKS.add(name, cls)
        return cls

    return register


def find_brick(name: str) -> type[nn.Module]:
    """The brick called `name`; PlanError when there is none."""
    return BRICKS.find(name)
