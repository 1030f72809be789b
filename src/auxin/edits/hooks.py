"""What takes part in the training that follows an edit: the loop's hook, and the one that holds old entries back."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.errors import ConfigError, PlanError

Blocks = dict[str, tuple[int, ...]]
"""By a parameter's name the lengths of its leading block, one per axis."""


class Hook(Protocol):
    """Takes part in the training loop. Its methods are called in the order of the hooks given."""

    def attach(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Called once, before the first step, with the model on its device."""

    def before_step(self, step: int) -> None:
        """Called before the forward pass of optimizer step `step` (0-based, of this stage)."""

    def after_step(self, step: int) -> None:
        """Called right after the optimizer's update; not called when the guard left the update out."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed hook needs, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""


class OldRates:
    """Training hook: old entries move by `ratio` times what the optimizer moves them, weight decay included.

    With a ratio of 0 they are frozen, bit by bit; their moments go on being collected, so that they are right when the
    entries are set free. Costs a copy of the old entries during the step.

    Args:
        ratio: 0 (frozen) to 1 (as all others).
        blocks: the old entries: by a parameter's name the lengths of its leading block, one per axis.
        steps: optimizer steps of the stage for which this holds; None: all.

    Raises:
        ConfigError: ratio or steps out of range.
    """

    def __init__(self, ratio: float, blocks: Mapping[str, tuple[int, ...]], steps: int | None = None) -> None:
        if not 0 <= ratio <= 1:
            raise ConfigError(f"{type(self).__name__}: ratio must lie in 0..1, received {ratio}.")
        if steps is not None and steps < 0:
            raise ConfigError(f"{type(self).__name__}: steps must not be negative, received {steps}.")
        self.ratio, self.blocks, self.steps = ratio, dict(blocks), steps
        self._old: list[Tensor] = []
        self._before: list[Tensor] = []

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the old entries; PlanError when the model lacks a parameter or it is smaller than its block."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, block in self.blocks.items():
            shape = tuple(parameters[name].shape) if name in parameters else None
            if shape is None or len(shape) != len(block) or any(a > b for a, b in zip(block, shape, strict=True)):
                raise PlanError(
                    f"{type(self).__name__}: {name} has shape {shape} in the model (None: it does not exist), which "
                    f"holds no block of {block}. Give the hook of the growth that made this model."
                )
        self._old = [leading(parameters[name].detach(), block) for name, block in self.blocks.items()]

    def before_step(self, step: int) -> None:
        """Remember the old entries."""
        if self.ratio < 1 and (self.steps is None or step < self.steps):
            self._before = [entries.clone() for entries in self._old]

    def after_step(self, step: int) -> None:
        """Put the old entries back, or part of the way."""
        if self._before:
            for entries, before in zip(self._old, self._before, strict=True):
                entries.copy_(before if self.ratio == 0 else torch.lerp(before, entries, self.ratio))
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """Ratio and steps."""
        return {"ratio": self.ratio, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the hook that gave `state`."""
        self.ratio, self.steps = state["ratio"], state.get("steps")


def leading(tensor: Tensor, block: tuple[int, ...]) -> Tensor:
    """The leading block of a tensor, as a view."""
    return tensor[tuple(slice(length) for length in block)]
