"""Alternating updates (AltUp): a residual stream of K blocks through layers that see one of them each.

Streams are tensors X of shape (K, ..., d). A layer L, norms and residual sums included, with active block a, does

    predict   xh_i = sum_j p_ij x_j                for every block i
    compute   y    = L(x_a)                        the block as it was, not xh_a
    correct   x'_i = xh_i + g_i (y - xh_a)

with p = I + C and g = 1 + c; C (K, K) and c (K,) are what is stored, so that weight decay pulls to the identity, where
every block simply gets what the layer adds. The sum is computed as M X + g y with M = p - g p_a: row i of M is
e_i - e_a at the identity, and blocks that are equal cancel to exactly zero, so that x' is y to the last bit. In the
order in which the equations are written, the rounding of y - x_a and of the sum would stay.

Gemma 3n's form feeds xh_a to the layer and computes C and c from the active block (before and after the layer).

Source: arXiv 2301.13310, algorithm 1. The form whose coefficients depend on the data: Gemma 3n as transformers
publishes it (`Gemma3nTextAltUp`).
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from auxin.errors import ConfigError
from auxin.nn.bricks import Brick, Roles, brick
from auxin.nn.extension import extended
from auxin.words.anatomy import ResidualBlocks
from auxin.words.roles import ParameterRole
from auxin.words.widths import Stream

Coefficients = Literal["static", "dynamic", "none"]
"""Of mixing and gains: the same for all tokens (the paper), computed from each token (Gemma 3n), or none: the other
blocks pass by (a control)."""
Collapse = Literal["mean", "sum", "concatenate"]
"""What leaves the last layer: the blocks' mean or their sum (Recycled-AltUp), or all of them (AltUp)."""


class PredictCorrect(nn.Module):
    """What all ways of mixing blocks share."""

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """What `correct` needs, and what the layer sees, (..., d)."""
        raise NotImplementedError

    def correct(self, state: Tensor, output: Tensor) -> Tensor:
        """The new streams (K, ..., d), from what `predict` gave and the layer's output (..., d)."""
        raise NotImplementedError

    def forward(self, streams: Tensor, output: Tensor | None = None) -> Any:
        """`predict`, or with the layer's output `correct`. Call the module: whoever brings a module's tensors when it
        is called (offloading to a disk, say) has to see it."""
        return self.predict(streams) if output is None else self.correct(streams, output)


class AltUp(PredictCorrect):
    """Predict and correct with coefficients that all tokens share: K K + K parameters.

    Args:
        blocks: K.
        active: the block a that the layer sees.
        device, dtype: of the parameters.

    Parameters: `prediction` C (K, K) and `correction` c (K,), deviations from the identity; zero at first.
    """

    mixing: ClassVar[tuple[str, ...]] = ("prediction",)
    """The parameters which, at zero, mix no blocks in the prediction."""

    def __init__(
        self,
        blocks: int,
        active: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks, self.active = blocks, active
        self.prediction = nn.Parameter(torch.zeros(blocks, blocks, device=device, dtype=dtype))
        self.correction = nn.Parameter(torch.zeros(blocks, device=device, dtype=dtype))

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """What `correct` needs, here the streams as they are, and what the layer sees, (..., d)."""
        return streams, streams[self.active]

    def correct(self, streams: Tensor, output: Tensor) -> Tensor:
        """The new streams (K, ..., d), from the old ones and the layer's output (..., d)."""
        mixing, gains = self._coefficients(torch.promote_types(streams.dtype, torch.float32))
        if _products_are_whole(streams):
            flat = streams.reshape(self.blocks, -1).to(mixing.dtype)
            mixed = torch.addr(mixing @ flat, gains, output.reshape(-1).to(mixing.dtype))
            return mixed.to(streams.dtype).view(streams.shape)
        # The blocks are added up first, for theirs is the sum that cancels. Compiled, it is one kernel.
        old, new = streams.to(mixing.dtype).unbind(0), output.to(mixing.dtype)
        rows = []
        for i in range(self.blocks):
            row = mixing[i, 0] * old[0]
            for j in range(1, self.blocks):
                row = torch.addcmul(row, mixing[i, j], old[j])
            rows.append(torch.addcmul(row, gains[i], new))
        return torch.stack(rows).to(streams.dtype)

    def _coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """M (K, K) and g (K,). In the type of the streams at least float32: what lies near 1 would be rounded away."""
        deviations, gains = self.prediction.to(dtype), 1 + self.correction.to(dtype)
        identity = torch.eye(self.blocks, device=deviations.device, dtype=dtype)
        return identity + deviations - torch.outer(gains, identity[self.active] + deviations[self.active]), gains

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, active={self.active}"


class DynamicAltUp(PredictCorrect):
    """Predict and correct with coefficients computed from each token, as in Gemma 3n: K^3 + K^2 + d (K + 1) parameters.

    m(x) = tanh(W_r RMSNorm(x) / d), K numbers; C = W_p m(x_a) as a K x K matrix; the layer sees xh_a = (x + C x)_a;
    c = W_c m(y). With W_p and W_c at zero, as at first here, the coefficients are the identity. What Gemma 3n does
    beside that, per-layer inputs and a scale on them, is no part of it.

    Args:
        blocks: K.
        active: the block a that the layer sees.
        hidden_size: d.
        eps: of the router's norm.
        clip: bound of the entries of W_p and W_c wherever they are used; None: none. (Gemma 3n clips at 120, in
            training alone.)
        device, dtype: of the parameters.
    """

    mixing: ClassVar[tuple[str, ...]] = ("prediction.weight",)

    def __init__(
        self,
        blocks: int,
        active: int,
        hidden_size: int,
        eps: float = 1e-6,
        clip: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks, self.active, self.eps, self.clip = blocks, active, eps, clip
        self.router_norm = nn.RMSNorm(hidden_size, eps=eps, device=device, dtype=dtype)
        self.router = nn.Linear(hidden_size, blocks, bias=False, device=device, dtype=dtype)
        self.prediction = _Clipped(blocks, blocks**2, clip, device, dtype)
        self.correction = _Clipped(blocks, blocks, clip, device, dtype)
        nn.init.zeros_(self.prediction.weight)
        nn.init.zeros_(self.correction.weight)

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted streams (K, ..., d), and what the layer sees, (..., d)."""
        deviations = self._projected(self.prediction, streams[self.active]).unflatten(-1, (self.blocks, self.blocks))
        # Block by block in memory, as the layer without streams would see it: a product's last bit depends on that.
        predicted = (streams + torch.einsum("...ij,j...d->i...d", deviations, streams)).contiguous()
        return predicted, predicted[self.active]

    def correct(self, predicted: Tensor, output: Tensor) -> Tensor:
        """The new streams (K, ..., d), from the predicted ones and the layer's output (..., d)."""
        gains = self._projected(self.correction, output).movedim(-1, 0).unsqueeze(-1)
        gains = 1 + gains.to(torch.promote_types(predicted.dtype, torch.float32))
        return ((predicted - gains * predicted[self.active]) + gains * output).to(predicted.dtype)

    def _projected(self, projection: nn.Module, x: Tensor) -> Tensor:
        modalities = self.router(self.router_norm(x) / x.shape[-1])
        modalities = torch.tanh(modalities.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        return cast(Tensor, projection(modalities))

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, active={self.active}, eps={self.eps:g}, clip={self.clip}"


class _Clipped(nn.Linear):
    """An `nn.Linear` without bias whose weight's entries are bounded by `clip` where it is used; None: by nothing."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        clip: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight if self.clip is None else self.weight.clamp(-self.clip, self.clip))


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


@brick("altup_layer")
class AltUpLayer(Brick):
    """A layer of any transformer, with alternating updates around what it computes.

    It takes streams (K, batch, sequence, d) and gives them. What is no stream yet, (batch, sequence, width), becomes
    one: replicated K times, or, if the embedding is K blocks wide, split. So the first layer needs to know of nothing,
    and layers can be copied, inserted and reordered. Everything else that a layer takes and gives goes through. What
    transformers collects as the layers' hidden states are streams, as in its Gemma 3n.
    """

    altup: AltUp | DynamicAltUp | PassBy
    split: bool
    hidden_size: int | None

    @classmethod
    def replacing(
        cls,
        module: nn.Module,
        blocks: int,
        active: int,
        split: bool = False,
        coefficients: Coefficients = "static",
        hidden_size: int | None = None,
    ) -> Self:
        """`module`, a layer whose first argument and result (or the first of them) are hidden states, so extended.

        Args:
            module: the layer, also on the meta device.
            blocks: K.
            active: the block that it computes on.
            split: whether what comes from the embedding is K d wide.
            coefficients: see `Coefficients`.
            hidden_size: d; needed for dynamic coefficients. Where it is known, embeddings of another width are refused.

        Raises:
            ConfigError: the numbers are out of range.
        """
        if blocks < 2 or not 0 <= active < blocks:
            raise ConfigError(f"altup_layer: block {active} of {blocks}. Give 2 blocks or more and one of them.")
        layer = extended(module, cls, split=split, hidden_size=hidden_size)
        like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
        if coefficients == "static":
            layer.altup = AltUp(blocks, active, like.device, like.dtype)
        elif coefficients == "none":
            layer.altup = PassBy(blocks, active)
        elif hidden_size is None:
            raise ConfigError("altup_layer: dynamic coefficients need hidden_size.")
        else:
            layer.altup = DynamicAltUp(blocks, active, hidden_size, device=like.device, dtype=like.dtype)
        return layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Streams, or what becomes streams; then whatever the layer takes. As the layer, its first result streams."""
        streams = as_streams(hidden_states, self.altup.blocks, self.split, self.hidden_size)
        state, seen = self.altup(streams)
        result = super().forward(seen, *args, **kwargs)
        if isinstance(result, tuple):
            return (self.altup(state, result[0]), *result[1:])
        return self.altup(state, result)

    def roles(self, replaced: Roles) -> Roles:
        """Those of mixing and gains: small tensors along no stream. (What computes dynamic ones reads the residual,
        whose width can't change then.)"""
        mixing = {
            f"altup.{name}": ParameterRole(name, ((),) * parameter.dim(), (None,) * parameter.dim(), "mixing")
            for name, parameter in self.altup.named_parameters()
        }
        return {**super().roles(replaced), **mixing}

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """As the layer. Where that adds nothing, x' = xh + g (x_a - xh_a): streams pass as they are iff nothing is
        mixed in the prediction, and the correction may be anything."""
        still = dict.fromkeys((f"altup.{name}" for name in self.altup.mixing), 0.0) if factor == 0 else {}
        return {**super().scaled(factor, plain), **still}

    def residual_blocks(self) -> ResidualBlocks:
        """Several; "wide" where the embedding has them."""
        return "wide" if self.split else "recycled"

    def fixed_widths(self) -> Mapping[Stream, str]:
        """The residual's, where embedding and head have its blocks, or coefficients are computed from it."""
        fixed = dict(super().fixed_widths())
        if self.split:
            fixed["residual"] = _WIDE
        elif isinstance(self.altup, DynamicAltUp):
            fixed["residual"] = _DYNAMIC
        return fixed


_WIDE = (
    "embedding and head hold several blocks of this model's residual stream (altup), which can't be widened one by "
    "one. Widen first, then apply altup; or apply it recycled."
)
_DYNAMIC = (
    "mixing and gains of this model's residual stream (altup) are computed from it (coefficients = dynamic), by layers "
    "that are as wide as it was. Widen first, then apply altup; or apply it with static coefficients."
)


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
        return {**super().fixed_widths(), "residual": _WIDE}


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


def _products_are_whole(x: Tensor) -> bool:
    """Whether eager products of matrices keep float32's digits. Under autocast, or with TF32 or bfloat16 for products,
    they would round the stream, which sums keep whole; and compilers fuse sums, but no products."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    backend = torch.backends.cuda if x.device.type == "cuda" else torch.backends.mkldnn
    settings = (backend.matmul.fp32_precision, torch.backends.fp32_precision)  # type: ignore[attr-defined]
    return all(setting in ("ieee", "none") for setting in settings)


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
