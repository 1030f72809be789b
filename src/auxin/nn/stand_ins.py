"""What stands in the place of a module that was removed: it returns what its place must return.

A feed-forward part gives a tensor. Attention gives a tuple (hidden states, weights), T5's one of three, in which the
position bias of the first layer goes through; whoever called it takes the tuple apart, and a bare tensor would be taken
apart along the batch. Attention also notes in the cache how many tokens it has seen, and the model reads from there
where the next token stands. A stand-in does all that and nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from auxin.errors import PlanError
from auxin.nn.bricks import Brick, brick
from auxin.nn.calls import forward_arguments

HIDDEN = "hidden"
"""In `returns`: the hidden states."""
NOTHING = "nothing"
"""In `returns`: None."""
MEMORY = ("key_value_states", "encoder_hidden_states")
"""What attention calls the states of another stack that it looks at; None where it looks at its own."""


class StandIn(Brick):
    """What all stand-ins are. It has no parameters; its first argument are hidden states, (..., batch, tokens, units).

    Args:
        module: what it stands for, which tells how it is called and which layers of the cache are its own; None: a
            module that takes hidden states alone.
        returns: what it returns: empty (default) for the hidden states as a bare tensor; otherwise a tuple with, for
            each entry, the hidden states ("hidden"), None ("nothing") or the argument of that name, handed on.
            `auxin.models.places.what_is_returned` finds it for a module of a model.

    Raises:
        PlanError: what comes first in `returns` is not "hidden".
    """

    def __init__(self, module: nn.Module | None = None, returns: Sequence[str] = ()) -> None:
        super().__init__()
        if returns and returns[0] != HIDDEN:
            raise PlanError(
                f"{type(self).__name__}: returns {list(returns)} must begin with {HIDDEN!r}: a stand-in gives hidden "
                "states first. Leave it empty for a bare tensor."
            )
        self.returns = tuple(returns)
        """See above."""
        known = module.arguments if isinstance(module, StandIn) else None
        self.arguments: tuple[str, ...] = known or (("hidden_states",) if module is None else forward_arguments(module))
        """Names of what it takes by position."""
        layers = [] if module is None else _attention_layers(module)
        self.cache_layers: tuple[int, ...] = tuple(sorted(set(layers)))
        """The layers of the cache that it fills."""
        self.looks_twice: bool = len(layers) > len(self.cache_layers)
        """Whether it stands for both attentions of a decoder's layer, and not for one of them."""

    @classmethod
    def replacing(cls, module: nn.Module, returns: Sequence[str] = ()) -> Self:
        """The stand-in for `module`; see the class."""
        return cls(module, returns)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        """What `returns` says."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        hidden: Tensor = args[0] if args else kwargs[self.arguments[0]]
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, Cache):
                self._fill(cache, hidden, next((given[name] for name in MEMORY if given.get(name) is not None), None))
        result = self.in_place_of(hidden)
        if not self.returns:
            return result
        return (result, *(None if name == NOTHING else given.get(name) for name in self.returns[1:]))

    def in_place_of(self, hidden_states: Tensor) -> Tensor:
        """The hidden states that it gives for those that it got."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"returns={list(self.returns)}" if self.returns else ""

    def _fill(self, cache: Cache, hidden: Tensor, memory: Tensor | None) -> None:
        """Let `cache` know that the tokens of `hidden`, and of the memory looked at, were seen."""
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        for layer in self.cache_layers:
            if memory is None or self.looks_twice:
                _hold_places(own, layer, hidden, hidden.shape[-2])
            if memory is not None and isinstance(cache, EncoderDecoderCache) and not cache.is_updated.get(layer):
                _hold_places(cache.cross_attention_cache, layer, hidden, memory.shape[-2])
                cache.is_updated[layer] = True


@brick("identity")
class Identity(StandIn):
    """Gives back its input."""

    def in_place_of(self, hidden_states: Tensor) -> Tensor:
        """The same tensor."""
        return hidden_states

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """Impossible."""
        raise PlanError(
            "what was removed there left its input, which no parameter scales. Grow the model first and remove modules "
            "then."
        )


@brick("zeros")
class Zeros(StandIn):
    """Gives zeros of its input's shape: a branch beside a residual stream that adds nothing."""

    def in_place_of(self, hidden_states: Tensor) -> Tensor:
        """Zeros like `hidden_states`."""
        return torch.zeros_like(hidden_states)


def _attention_layers(module: nn.Module) -> list[int]:
    """The numbers of the layers whose attentions lie in `module`, once for each of these.

    Layers and modules around an attention know their number, too; only the innermost that know it count.
    """
    found: dict[str, list[int]] = {}
    for name, inner in module.named_modules():
        number = getattr(inner, "layer_idx", getattr(inner, "layer_id", None))
        own = [number] if isinstance(number, int) else []
        if isinstance(inner, StandIn):
            own = [*inner.cache_layers] * (1 + inner.looks_twice)
        if own:
            found = {path: layers for path, layers in found.items() if path and not name.startswith(f"{path}.")}
            found[name] = own
    return [number for layers in found.values() for number in layers]


def _hold_places(cache: Cache, number: int, hidden: Tensor, tokens: int) -> None:
    """Put `tokens` keys and values of zeros, as narrow as may be, into a layer of `cache`.

    They can't be empty: an empty layer has seen nothing. Where a layer has its final shape from the start (it was
    allocated before the first token) they get that.
    """
    layer = cache.layers[number] if number < len(cache.layers) else None
    if layer is not None and not isinstance(layer, CacheLayerMixin):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
        return

    def places(states: Tensor | None) -> Tensor:
        heads, width = (states.shape[1], states.shape[3]) if states is not None and states.dim() == 4 else (1, 1)
        return hidden.new_zeros(()).expand(hidden.shape[-3], heads, tokens, width)

    cache.update(places(getattr(layer, "keys", None)), places(getattr(layer, "values", None)), number)
