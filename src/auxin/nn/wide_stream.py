"""A residual stream of K blocks before, between and behind the layers: how it comes from an embedding, what makes one
block or all of it the last hidden state, and the tables, norms and linear layers that are K blocks wide.

Between layers it is a tensor (K, batch, sequence, d); side by side its blocks are (batch, sequence, K d).
"""

import copy
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from auxin.errors import ConfigError
from auxin.nn.bricks import Brick, Roles, brick
from auxin.nn.extension import extended

Collapse = Literal["mean", "sum", "concatenate"]
"""What leaves the last layer: the blocks' mean or their sum (Recycled-AltUp), or all of them (AltUp)."""
WIDE = (
    "embedding and head hold several blocks of this model's residual stream (altup), which can't be widened one by "
    "one. Widen first, then apply altup; or apply it recycled."
)
"""Why the width of such a residual stream is fixed."""


def as_streams(hidden_states: Tensor, blocks: int, split: bool, hidden_size: int | None = None) -> Tensor:
    """Streams (K, batch, sequence, d) of what came from an embedding; streams as they are.

    Args:
        hidden_states: (batch, sequence, d), or with `split` (batch, sequence, K d), or streams.
        blocks: K.
        split: whether the last axis holds the blocks.
        hidden_size: d; None: whatever fits.
    """
    if hidden_states.dim() == 4:
        return hidden_states
    if not split:
        return hidden_states.expand(blocks, *hidden_states.shape)
    width = hidden_states.shape[-1]
    if width % blocks or hidden_size not in (None, width // blocks):
        wanted = f"{blocks} blocks" if hidden_size is None else f"{blocks} x {hidden_size} = {blocks * hidden_size}"
        raise ConfigError(
            f"The embeddings are {width} wide and should be {wanted}. Give all blocks side by side, or token ids."
        )
    return hidden_states.unflatten(-1, (blocks, -1)).movedim(-2, 0)


def collapsed(streams: Tensor, collapse: Collapse) -> Tensor:
    """What leaves the last layer; see `Collapse`. What is no stream stays as it is.

    The mean is computed from the differences to the first block, so that of equal blocks it is that block to the last
    bit, also for K that is no power of two.
    """
    if streams.dim() != 4:
        return streams
    if collapse == "concatenate":
        return streams.movedim(0, -2).flatten(-2)
    if collapse == "sum":
        return streams.sum(0)
    return streams[0] + (streams[1:] - streams[:1]).sum(0) / len(streams)


def block_distance(streams: Tensor) -> float:
    """How different the blocks are: the root mean square of what they deviate from their mean by, relative to that of
    the blocks. 0: the width is not used.

    Args:
        streams: (K, batch, sequence, d).
    """
    wide = streams.detach().to(torch.promote_types(streams.dtype, torch.float32))
    deviations = wide - wide.mean(0, keepdim=True)
    return (deviations.square().mean().sqrt() / wide.square().mean().sqrt()).item()


@brick("collapsed_input")
class CollapsedInput(Brick):
    """A norm after the last layer that first makes one block of the streams: their mean, or their sum."""

    collapse: Collapse

    @classmethod
    def replacing(cls, module: nn.Module, collapse: Collapse = "mean") -> Self:
        """`module`, so extended."""
        return extended(module, cls, collapse=collapse)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Streams (K, batch, sequence, d), or one block; as the norm."""
        return super().forward(collapsed(hidden_states, self.collapse), *args, **kwargs)


@brick("collapsed_output")
class CollapsedOutput(Brick):
    """A stack of layers without a norm behind it (BERT's encoder), with one block or all of them as its last hidden
    state, and not streams."""

    collapse: Collapse

    @classmethod
    def replacing(cls, module: nn.Module, collapse: Collapse = "mean") -> Self:
        """`module`, so extended."""
        return extended(module, cls, collapse=collapse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stack, its last hidden state (batch, sequence, d or K d)."""
        result = super().forward(*args, **kwargs)
        result.last_hidden_state = collapsed(result.last_hidden_state, self.collapse)
        if result.get("hidden_states"):  # whose last one DeBERTa takes
            result.hidden_states = (*result.hidden_states[:-1], result.last_hidden_state)
        return result


@brick("block_norm")
class BlockNorm(Brick):
    """The norm after the last layer of a stream that stays wide: (K, batch, sequence, d) -> (batch, sequence, K d).

    Args:
        width: K d.
        blocks: K.
        kind: "rms" or "layer".
        over: "blocks" (each block has statistics of its own) or "all" (the K d entries have one).
        eps: epsilon.
        gain, bias: whether there are such parameters.
        gain_offset: what is added to the stored gain (Gemma: 1).
        scale: a constant factor of the result.
        device, dtype: of the parameters.

    Parameters: `weight` (K d,) and `bias` (K d,) where the norm that it stands for has them. Computed in float32 at
    least.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        kind: Literal["rms", "layer"],
        over: Literal["blocks", "all"] = "blocks",
        eps: float = 1e-6,
        gain: bool = True,
        bias: bool = False,
        gain_offset: float = 0.0,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks, self.kind, self.over, self.eps = blocks, kind, over, eps
        self.gain_offset, self.scale = gain_offset, scale
        weight = torch.full((width,), 1.0 - gain_offset, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight) if gain else None
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if bias else None

    @classmethod
    def replacing(cls, module: nn.Module, hidden_size: int, blocks: int, **settings: Any) -> Self:
        """The norm for K blocks in the place of `module`, one for one block of `hidden_size`."""
        weight = getattr(module, "weight", None)
        bias = getattr(module, "bias", None)
        device, dtype = (None, None) if weight is None else (weight.device, weight.dtype)
        return cls(
            blocks * hidden_size,
            blocks,
            gain=weight is not None,
            bias=bias is not None,
            device=device,
            dtype=dtype,
            **settings,
        )

    def forward(self, streams: Tensor) -> Tensor:
        """(K, batch, sequence, d) -> (batch, sequence, K d), in the type of the streams."""
        x = streams.movedim(0, -2).to(torch.promote_types(streams.dtype, torch.float32))
        axes = -1 if self.over == "blocks" else (-2, -1)
        if self.kind == "layer":
            x = x - x.mean(axes, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + self.eps)
        x = x.flatten(-2).to(streams.dtype)
        if self.weight is not None:
            x = x * (self.weight + self.gain_offset)
        if self.bias is not None:
            x = x + self.bias
        return x if self.scale == 1 else x * self.scale

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, kind={self.kind}, over={self.over}, eps={self.eps:g}"


@brick("parallel_embeddings")
class ParallelEmbeddings(Brick):
    """An embedding module (BERT's, ViT's: tables, positions and all) with K - 1 like ones beside it, their results side
    by side: (batch, sequence, K d)."""

    others: nn.ModuleList

    @classmethod
    def replacing(cls, module: nn.Module, blocks: int) -> Self:
        """`module`, so extended; the others are copies of it in shape."""
        new = extended(module, cls)
        new.others = nn.ModuleList(copy.deepcopy(module) for _ in range(blocks - 1))
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the embedding, K times."""
        first = super().forward(*args, **kwargs)
        return torch.cat([first, *(other(*args, **kwargs) for other in self.others)], dim=-1)

    def roles(self, replaced: Roles) -> Roles:
        """Those of the embedding, for each of the others."""
        numbers = range(len(self.others))
        others = {f"others.{number}.{name}": role for number in numbers for name, role in replaced.items()}
        return {**super().roles(replaced), **others}


@brick("wide_embedding")
class WideEmbedding(Brick):
    """A table of K blocks; a name for edits to call it by. What stands in the model is of the class that stood there:
    a plain nn.Embedding, or one that scales what it looks up (Gemma)."""

    @classmethod
    def replacing(cls, module: nn.Module, blocks: int) -> nn.Embedding:
        """A table `blocks` times as wide as `module`, an nn.Embedding."""
        if not isinstance(module, nn.Embedding):
            raise ConfigError(f"wide_embedding: {type(module).__name__} is no nn.Embedding.")
        new = copy.copy(module)
        new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
        new.embedding_dim = blocks * module.embedding_dim
        new.weight = nn.Parameter(module.weight.new_empty(module.num_embeddings, new.embedding_dim))
        return new


@brick("wide_linear")
class WideLinear(Brick):
    """A linear layer that reads K blocks; a name for edits to call it by. What stands in the model is a plain
    nn.Linear."""

    @classmethod
    def replacing(cls, module: nn.Module, blocks: int) -> nn.Linear:
        """A layer that reads `blocks` times as many features as `module`, an nn.Linear."""
        if type(module) is not nn.Linear:
            raise ConfigError(f"wide_linear: {type(module).__name__} is no plain nn.Linear.")
        return nn.Linear(
            blocks * module.in_features,
            module.out_features,
            module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
