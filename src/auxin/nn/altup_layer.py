"""A layer of any transformer with alternating updates around it (see `auxin.nn.altup_updates`)."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from torch import Tensor, nn

from auxin.errors import ConfigError
from auxin.nn.altup_controls import PassBy
from auxin.nn.altup_updates import AltUp, DynamicAltUp
from auxin.nn.bricks import Brick, Roles, brick
from auxin.nn.extension import extended
from auxin.nn.wide_stream import WIDE, as_streams
from auxin.words.anatomy import ResidualBlocks
from auxin.words.roles import ParameterRole
from auxin.words.widths import Stream

Coefficients = Literal["static", "dynamic", "none"]
"""Of mixing and gains: the same for all tokens (the paper), computed from each token (Gemma 3n), or none: the other
blocks pass by (a control)."""


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
            fixed["residual"] = WIDE
        elif isinstance(self.altup, DynamicAltUp):
            fixed["residual"] = _DYNAMIC
        return fixed


_DYNAMIC = (
    "mixing and gains of this model's residual stream (altup) are computed from it (coefficients = dynamic), by layers "
    "that are as wide as it was. Widen first, then apply altup; or apply it with static coefficients."
)
