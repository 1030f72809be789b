"""Sequence-AltUp: a layer that runs on every k-th token, the others predicted and corrected.

The tokens x_0, x_1, ... lie in groups of k; a(i) = k floor(i / k) is the anchor of token i. A layer L, norms and
residual sums included, does

    predict   yh_i = a1 x_i + a2 x_a(i)                  for every token i
    compute   (y_0, y_k, y_2k, ..) = L(x_0, x_k, x_2k, ..)
    correct   x'_i = yh_i + b (y_a(i) - yh_a(i))

so that what is linear in the tokens costs 1/k and attention 1/k^2. (a1 - 1, a2, b - 1) is what is stored: three
numbers per layer, zero at first, so that weight decay pulls to "every token gets what L adds to its anchor". The sum is
computed as (yh_i - b yh_a) + b y_a: at b = 1 the bracket of an anchor is exactly zero and x'_a is L's output to the
last bit.

As a(i) <= i it is causal wherever L is. Positions of anchors stay 0, k, 2k. Groups are counted in each sequence from
its first visible token (see `auxin.nn.token_groups`), so that padding changes nothing.

Decoding keeps keys and values of anchors only, and the current anchor; the other steps skip L. Two baselines have no
parameters: "skip" lets tokens that are no anchors pass, "pool" gives L the mean of each group and all its tokens the
result, which is not causal.

Source: arXiv 2301.13310, Sequence-AltUp and the baselines that it is compared with. How decoders go on with a cache and
what becomes of masks is not in the paper.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from auxin.errors import ConfigError, PlanError
from auxin.nn.bricks import Brick, Roles, brick
from auxin.nn.extension import extended
from auxin.nn.strided import (
    BIASES,
    CACHES,
    argument_names,
    mask_of,
    strided_arguments,
)
from auxin.nn.strided_cache import StridedLayer, StridedSlidingLayer, strided_cache
from auxin.nn.token_groups import Chunk, taken, texts, visible_tokens
from auxin.words.roles import ParameterRole

Mode = Literal["altup", "skip", "pool"]
"""What becomes of tokens that are no anchors: predicted and corrected; passed on as they are (stride-and-skip); or
averaged with their group (average pooling)."""


class SequenceAltUp(nn.Module):
    """Predict and correct along the sequence: 3 parameters, none in the modes "skip" and "pool".

    Args:
        stride: k, 1 or more.
        mode: see `Mode`.
        device, dtype: of the parameters.

    Parameters: `deviations` (a1 - 1, a2, b - 1), zero at first.
    """

    deviations: nn.Parameter | None

    def __init__(
        self,
        stride: int,
        mode: Mode = "altup",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.mode = stride, mode
        deviations = nn.Parameter(torch.zeros(3, device=device, dtype=dtype)) if mode == "altup" else None
        self.register_parameter("deviations", deviations)

    def forward(self, x: Tensor, anchors: Tensor, outputs: Tensor, offset: int | Tensor = 0) -> Tensor:
        """`correct`. Call the module: whoever brings a module's tensors when it is called (offloading to a disk, say)
        has to see it."""
        return self.correct(x, anchors, outputs, offset)

    def correct(self, x: Tensor, anchors: Tensor, outputs: Tensor, offset: int | Tensor = 0) -> Tensor:
        """The new tokens (batch, sequence, d), in the type of `x`.

        Args:
            x: the old tokens (batch, sequence, d).
            anchors: those among them that the layer saw, one per group, (batch, groups, d). Of a group that began
                earlier, its anchor of then.
            outputs: what the layer made of them, (batch, groups, d).
            offset: the place of the first token in the first group; (batch,) where sequences differ.
        """
        if self.mode == "pool":
            return outputs.repeat_interleave(self.stride, dim=1)[:, : x.shape[1]].contiguous()
        grouped = self._grouped(x, offset, anchors.shape[1])
        anchors, outputs = anchors.unsqueeze(2), outputs.unsqueeze(2)
        if self.mode == "skip":
            result = torch.cat([outputs, grouped[:, :, 1:]], dim=2)
        else:
            # In the type of the tokens at least float32: what lies near 1 would be rounded away.
            a1, a2, b = self._coefficients(torch.promote_types(x.dtype, torch.float32))
            grouped, anchors, outputs = grouped.to(a1.dtype), anchors.to(a1.dtype), outputs.to(a1.dtype)
            predicted = a1 * grouped + a2 * anchors
            of_anchors = a1 * anchors + a2 * anchors
            result = ((predicted - b * of_anchors) + b * outputs).to(x.dtype)
        result = result.flatten(1, 2)
        if isinstance(offset, Tensor):
            return taken(result, torch.arange(x.shape[1], device=x.device) + offset[:, None], 1)
        # Products of what is not contiguous are rounded in other ways, and not always in the same.
        return result[:, offset : offset + x.shape[1]].contiguous()

    def means(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """The mean of each group, (batch, groups, d); the last group may be shorter.

        Args:
            x: tokens (batch, sequence, d).
            visible: which of them count, (batch or 1, sequence) boolean; None: all. A group without any is zero.
        """
        if visible is None:
            visible = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device)
        groups = -(-x.shape[1] // self.stride)
        weights = self._grouped(visible.unsqueeze(-1).to(x.dtype), 0, groups)
        sums = (self._grouped(x, 0, groups) * weights).sum(2)
        return sums / weights.sum(2).clamp(min=1)

    def _grouped(self, x: Tensor, offset: int | Tensor, groups: int) -> Tensor:
        """(batch, groups, k, d); where groups are not whole, filled with something."""
        if isinstance(offset, Tensor):
            places = torch.arange(groups * self.stride, device=x.device) - offset[:, None]
            x = taken(x, places.clamp(0, x.shape[1] - 1), 1)
        else:
            x = nn.functional.pad(x, (0, 0, offset, groups * self.stride - offset - x.shape[1]))
        return x.unflatten(1, (-1, self.stride))

    def _coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        assert self.deviations is not None
        a1, a2, b = self.deviations.to(dtype).unbind()
        return 1 + a1, a2, 1 + b

    def extra_repr(self) -> str:
        return f"stride={self.stride}" + ("" if self.mode == "altup" else f", mode={self.mode}")


@brick("sequence_altup_layer")
class SequenceAltUpLayer(Brick):
    """A layer of any transformer that runs on every k-th token only.

    It takes and gives hidden states of all tokens, (batch, sequence, d), and whatever else the layer takes, from which
    it picks what belongs to anchors (see `auxin.nn.strided`). Position biases that T5's layers hand on go out as they
    came in.
    """

    sequence_altup: SequenceAltUp
    argument_names: tuple[str, ...]

    @classmethod
    def replacing(cls, module: nn.Module, stride: int, mode: Mode = "altup") -> Self:
        """`module`, a layer whose first argument and result (or the first of them) are hidden states, so extended.

        Args:
            module: the layer, also on the meta device.
            stride: k. 1 changes nothing but what a1, a2 and b do.
            mode: see `Mode`.

        Raises:
            ConfigError: the stride is less than 1, the layer works on streams, or pooling would let a causal layer see
                tokens to come.
        """
        if stride < 1:
            raise ConfigError(f"sequence_altup_layer: stride = {stride}. Give 1 or more.")
        if isinstance(module, Brick) and module.residual_blocks() is not None:
            raise ConfigError(
                "sequence_altup_layer: the layer has a residual stream of several blocks (alternating updates), which "
                "take no stride. Stride first."
            )
        if mode == "pool" and is_causal(module):
            raise ConfigError(
                "sequence_altup_layer: mode = pool mixes tokens with later ones, and the layer is causal. Ask for "
                "altup or skip."
            )
        layer = extended(module, cls)
        like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
        layer.sequence_altup = SequenceAltUp(stride, mode, like.device, like.dtype)
        # Compilers would trace through the signature again and again.
        layer.argument_names = argument_names(module)
        return layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (batch, sequence, d), then whatever the layer takes. As the layer.

        Raises:
            ConfigError: in training, a sequence shorter than the stride; an argument or a cache of a kind for which it
                is not known what belongs to anchors.
        """
        arguments = self._named(args, kwargs)
        update = self.sequence_altup
        cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
        self._check(hidden_states, arguments, cache)
        state = None if cache is None else strided_cache(cache, self, update.stride)
        chunk = self._chunk(hidden_states, mask_of(arguments), state)
        if update.mode == "pool":
            return self._pooled(hidden_states, arguments, chunk, super().forward)
        anchors: list[Tensor] = []
        outputs: list[Tensor] = []
        result: Any = None
        if chunk.groups:
            # Every product would copy what is not contiguous.
            anchors.append(chunk.anchors(hidden_states, 1).contiguous())
            window = state.sliding_window if isinstance(state, StridedSlidingLayer) else None
            given = strided_arguments(arguments, chunk, flash=_is_flash(self), window=window)
            result = super().forward(anchors[0], **given)
            outputs.append(result[0] if isinstance(result, tuple) else result)
        if chunk.continues:
            # In a first call the group before has padding alone, which may get anything.
            earlier = None if state is None else state.current
            anchor, output = earlier if earlier is not None else (anchors[0][:, :1], outputs[0][:, :1])
            anchors.insert(0, anchor)
            outputs.insert(0, output)
        seen, made = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (anchors, outputs))
        new = update(hidden_states, seen, made, chunk.offset)
        if state is not None:
            result = _remembered(state, result)
            state.advance(seen, made)
        return self._with_first(result, new, arguments)

    def _chunk(self, hidden_states: Tensor, mask: Any, state: StridedLayer | None) -> Chunk:
        """The tokens of this call, and where the texts of their sequences begin.

        Raises:
            ConfigError: the text is shorter than the stride, in training.
        """
        batch, length, _ = hidden_states.shape
        stride = self.sequence_altup.stride
        if state is not None:
            chunk = state.begin(batch, length, mask)
        else:
            chunk = Chunk.of(texts(mask, stride, batch, length), stride, 0, length)
        # Without gradients it is a text that is being written, which may begin like that.
        if self.training and torch.is_grad_enabled() and chunk.total < stride:
            raise ConfigError(
                f"stride = {stride} is longer than the sequence of {length} tokens, of which the layer would see one. "
                f"Train on sequences of {stride} tokens or more, or choose a smaller stride."
            )
        return chunk

    def roles(self, replaced: Roles) -> Roles:
        """That of the three numbers, which run along no stream."""
        role = ParameterRole("deviations", ((),), (None,), "mixing")
        return {**super().roles(replaced), "sequence_altup.deviations": role}

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """As the layer. Where that adds nothing, tokens pass as they are iff nothing is predicted nor corrected.

        Raises:
            PlanError: in the mode "pool", which gives all tokens of a group the same.
        """
        factors = super().scaled(factor, plain)
        if factor == 0 and self.sequence_altup.mode == "pool":
            raise PlanError(
                "all tokens of a group get the same (mode = pool), so that no copy of it is an identity block. Grow "
                "the model first and pool then."
            )
        if factor == 0 and self.sequence_altup.mode == "altup":
            factors["sequence_altup.deviations"] = 0.0
        return factors

    def _pooled(self, hidden_states: Tensor, arguments: dict[str, Any], chunk: Chunk, layer: Any) -> Any:
        visible = visible_tokens(mask_of(arguments))
        if chunk.starts is not None:
            # The padding that is put last has groups, too: as many as there are with any shift.
            chunk = replace(chunk, shifts=tuple(range(chunk.stride)))
            order = chunk.order()
            hidden_states = taken(hidden_states, order, 1)
            visible = None if visible is None else taken(visible, order, 1)
        means = self.sequence_altup.means(hidden_states, visible)
        result = layer(means, **strided_arguments(arguments, chunk, pooled=True, flash=_is_flash(self)))
        outputs = result[0] if isinstance(result, tuple) else result
        new = self.sequence_altup(hidden_states, means, outputs)
        new = new if chunk.starts is None else taken(new, order.argsort(), 1)
        return self._with_first(result, new, arguments)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.argument_names):
            raise ConfigError(
                f"A strided layer (Sequence-AltUp) knows the names of {len(self.argument_names)} of {len(args)} "
                f"arguments of {type(self).__name__}. Pass them by name."
            )
        return dict(zip(self.argument_names, args, strict=False)) | kwargs

    def _check(self, hidden_states: Tensor, arguments: dict[str, Any], cache: Any) -> None:
        if hidden_states.dim() != 3:
            raise ConfigError(
                f"A strided layer (Sequence-AltUp) takes hidden states (batch, sequence, width), given "
                f"{tuple(hidden_states.shape)}."
            )
        if "position_bias" in self.argument_names and arguments.get("position_bias") is None:
            raise ConfigError(
                "A strided layer (Sequence-AltUp) got no position_bias and would make one of anchors for all layers. "
                "Leave the first layer, which makes it, without a stride."
            )
        if self.sequence_altup.mode == "pool" and cache is not None:
            raise ConfigError("mode = pool is not causal and can't use a cache. Give use_cache = False.")
        if _is_flash(self) and (window := _window(self)) is not None:
            raise ConfigError(
                f"Flash attention counts the window of {window} tokens in what it is given, and a strided layer "
                "gives it anchors. Load the model with attn_implementation = sdpa."
            )

    def _with_first(self, result: Any, new: Tensor, arguments: dict[str, Any]) -> Any:
        """`result` with `new` as its hidden states and the position biases that came in."""
        if not isinstance(result, tuple):
            return new
        names = [name for name in BIASES if name in self.argument_names]
        given = [arguments.get(name) for name in names]
        given += [None] * (len(result) - 1 - len(given))
        rest = zip(result[1:], given, strict=False)
        return (new, *(old if passed is None else passed for old, passed in rest))


def is_causal(layer: nn.Module) -> bool:
    """Whether an attention in `layer` looks at earlier tokens only."""
    return any(getattr(module, "is_causal", False) is True for module in layer.modules())


def _is_flash(layer: nn.Module) -> bool:
    configs = (getattr(module, "config", None) for module in layer.modules())
    return any("flash" in str(getattr(config, "_attn_implementation", "")) for config in configs if config is not None)


def _window(layer: nn.Module) -> int | None:
    """How many tokens an attention in `layer` looks back; None: to the first one."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        if isinstance(window, int) and config is not None:
            return window
    return None


def _remembered(state: StridedLayer, result: Any) -> Any:
    """`result`, or where the layer was skipped one of the same form, with nothing in it."""
    if result is not None:
        state.results = len(result) if isinstance(result, tuple) else None
        return result
    return None if state.results is None else (None,) * state.results
