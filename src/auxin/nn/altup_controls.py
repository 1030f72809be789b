"""Controls of alternating updates: what tells a wider stream from the larger table and head that come with it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from auxin.nn.altup_updates import PredictCorrect
from auxin.nn.bricks import Brick, brick
from auxin.nn.extension import extended
from auxin.nn.wide_stream import WIDE
from auxin.words.widths import Stream


class PassBy(PredictCorrect):
    """The control: the layer's output takes the place of the active block, the others stay as they are.

    Args:
        blocks: K.
        active: the block a that the layer sees.
    """

    mixing: ClassVar[tuple[str, ...]] = ()

    def __init__(self, blocks: int, active: int) -> None:
        super().__init__()
        self.blocks, self.active = blocks, active

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """What `correct` needs, the streams, and what the layer sees, (..., d)."""
        return streams, streams[self.active]

    def correct(self, streams: Tensor, output: Tensor) -> Tensor:
        """The streams (K, ..., d) with the layer's output (..., d) in the place of the active block."""
        return torch.cat([streams[: self.active], output[None], streams[self.active + 1 :]])

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, active={self.active}"


@brick("summed_input")
class SummedInput(Brick):
    """A first layer behind a table of K blocks that adds them up: the control with more table and no wider stream."""

    blocks: int

    @classmethod
    def replacing(cls, module: nn.Module, blocks: int) -> Self:
        """`module`, a layer, so extended."""
        return extended(module, cls, blocks=blocks)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(batch, sequence, K d) instead of (batch, sequence, d); as the layer."""
        return super().forward(hidden_states.unflatten(-1, (self.blocks, -1)).sum(-2), *args, **kwargs)

    def fixed_widths(self) -> Mapping[Stream, str]:
        """The residual's: the table has its blocks."""
        return {**super().fixed_widths(), "residual": WIDE}


@brick("repeated_output")
class RepeatedOutput(Brick):
    """A norm before a head that is a table of K blocks: its result K times side by side, which by such a head is read
    as by one block, the sum of them all."""

    blocks: int

    @classmethod
    def replacing(cls, module: nn.Module, blocks: int) -> Self:
        """`module`, a norm, so extended."""
        return extended(module, cls, blocks=blocks)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the norm, (batch, sequence, K d) instead of (batch, sequence, d)."""
        return super().forward(*args, **kwargs).repeat(1, 1, self.blocks)
