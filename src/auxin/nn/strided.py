"""What a layer takes, for every k-th token only: its arguments, and a cache of its keys and values.

Tokens lie in groups of k, counted from the first one that the cache saw; the first token of a group is its anchor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from auxin.errors import ConfigError
from auxin.nn.calls import forward_arguments

CACHES = ("past_key_values", "layer_past")
"""What layers call the argument that holds the cache."""
BIASES = ("position_bias", "encoder_decoder_position_bias")
"""What T5's layers hand on to each other: they take these and give them back behind their hidden states."""
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_WHOLE = ("encoder_hidden_states", "head_mask", *CACHES)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one call, among those of the calls before."""

    stride: int
    """k: tokens of a group."""
    seen: int
    """Tokens before the first one of this call."""
    length: int
    """Tokens of this call."""
    first_key: int = 0
    """The first token that masks have a column for: those before are out of a sliding window."""

    @property
    def total(self) -> int:
        """Tokens up to the last one of this call."""
        return self.seen + self.length

    @property
    def offset(self) -> int:
        """The place of the first token in its group, 0 to k - 1."""
        return self.seen % self.stride

    @property
    def first(self) -> int:
        """The first token of this call that is an anchor; `length` or more where there is none."""
        return -self.seen % self.stride

    def anchors(self, x: Tensor, axis: int) -> Tensor:
        """Those entries of `x` along `axis`, which holds the tokens of this call, that belong to anchors."""
        return _every(x, axis, self.first, self.stride)


class StridedLayer(DynamicLayer):
    """The part of a cache that belongs to a strided layer: keys and values of anchors, and the last anchor itself.

    To whoever asks for its length it has seen all tokens, so that masks and positions come out as for other layers.
    """

    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens = 0
        """Tokens that the layer has seen."""
        self.anchor: Tensor | None = None
        """The last anchor's input, (batch, 1, d)."""
        self.output: Tensor | None = None
        """What the layer made of it, (batch, 1, d)."""
        self.results: int | None = None
        """How many things the layer gives; None: a tensor and no tuple."""

    def advance(self, tokens: int, anchors: Tensor, outputs: Tensor) -> None:
        """Note that `tokens` more were seen, the last anchors of (batch, anchors, d) being the current ones."""
        self.tokens += tokens
        self.anchor, self.output = anchors[:, -1:], outputs[:, -1:]

    def get_seq_length(self) -> int:
        """All tokens seen, not only anchors."""
        return self.tokens

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens, self.anchor, self.output, self.results = 0, None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Impossible: the anchor before the last one is not kept."""
        if tokens_to_remove != 0:
            raise ConfigError(
                "A cache of strided layers (Sequence-AltUp) can't be cropped: it keeps the current anchor only. "
                "Generate without an assistant model or prompt lookup."
            )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As other layers do; the anchor too."""
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As other layers do; the anchor too."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As other layers do; the anchor too."""
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.anchor is not None and self.output is not None:
            self.anchor, self.output = change(self.anchor), change(self.output)


class StridedSlidingLayer(StridedLayer):
    """The same for a layer that sees a window: of the anchors before, it keeps and shows those within. Masks come out
    of the same sizes as for other layers with the window.

    Args:
        sliding_window: tokens that a token sees, itself included.
        stride: k.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, stride: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sliding_window, self.stride = sliding_window, stride

    @property
    def first_key(self) -> int:
        """The first token seen that the next one still sees."""
        return max(self.tokens - self.sliding_window + 1, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values of anchors to those within the window, (batch, heads, anchors, dim), and give all."""
        if self.keys is not None and self.values is not None and self.is_initialized:
            kept = -(-self.tokens // self.stride) - -(-self.first_key // self.stride)
            start = max(self.keys.shape[-2] - kept, 0)
            self.keys, self.values = self.keys[:, :, start:], self.values[:, :, start:]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns of a mask, and the token that the first of them is for."""
        # Earlier versions of transformers give the positions of the queries.
        queries = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.tokens - self.first_key + queries, self.first_key


def strided_cache(cache: Any, layer: nn.Module, stride: int) -> StridedLayer:
    """The part of `cache` that belongs to `layer`; put there if the cache is new.

    Args:
        cache: a DynamicCache, or an EncoderDecoderCache with one.
        layer: has, somewhere inside, the attribute layer_idx.
        stride: the layer's.

    Raises:
        ConfigError: the cache is of another kind, or was filled by a layer that is not strided.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    numbers = (getattr(module, "layer_idx", None) for module in layer.modules())
    number = next((number for number in numbers if isinstance(number, int)), None)
    if isinstance(cache, Cache) and number is not None and not cache.offloading:
        while cache.layer_class_to_replicate is DynamicLayer and len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
        found = cache.layers[number]
        if isinstance(found, StridedLayer):
            return found
        known = isinstance(found, DynamicLayer) and type(found) in (DynamicLayer, DynamicSlidingWindowLayer)
        if isinstance(found, DynamicLayer) and known and found.get_seq_length() == 0:
            window = found.sliding_window if isinstance(found, DynamicSlidingWindowLayer) else None
            new = StridedLayer() if window is None else StridedSlidingLayer(window, stride)
            cache.layers[number] = new
            return new
        kind = f"{type(cache).__name__} with {'tokens in ' if known else ''}a {type(found).__name__}"
    else:
        kind = type(cache).__name__ + (" that is offloaded" if getattr(cache, "offloading", False) else "")
    raise ConfigError(
        f"A strided layer (Sequence-AltUp) can't use a {kind} as its cache. Give an empty DynamicCache, as generate() "
        "makes one by default, or use_cache = False."
    )


def argument_names(layer: nn.Module) -> tuple[str, ...]:
    """The names of what `layer` takes by position after its hidden states; empty where that is not known."""
    return forward_arguments(layer)[1:]


def strided_arguments(
    arguments: Mapping[str, Any], chunk: Chunk, pooled: bool = False, flash: bool = False
) -> dict[str, Any]:
    """The arguments of a layer for the anchors of `chunk`.

    Positions of anchors stay what they are: 0, k, 2k.

    Args:
        arguments: by name, for all tokens. Known are attention_mask (additive or boolean, (batch, heads or 1, queries
            or 1, keys), or (batch, keys)), position_embeddings (tensors (batch or 1, sequence, dim)), position_ids
            (batch or 1, sequence), position_bias (batch or 1, heads, queries, keys), encoder_hidden_states,
            encoder_attention_mask and encoder_decoder_position_bias (whose keys are the encoder's tokens).
        chunk: which tokens these are.
        pooled: whether an anchor stands for its whole group, which is then masked only if all of it is.
        flash: whether attention takes position_ids that are not consecutive for sequences packed into one.

    Raises:
        ConfigError: an argument that belongs to tokens and is not known, or has another size than these.
    """
    return {name: _strided(name, value, chunk, pooled, flash) for name, value in arguments.items()}


def visible_tokens(mask: Tensor | None) -> Tensor | None:
    """Which tokens any other may see, (batch, keys) boolean; None: all.

    Args:
        mask: see `strided_arguments`.
    """
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > 0 if mask.dim() == 2 else mask > torch.finfo(mask.dtype).min / 2
    seen = seen if mask.dim() == 2 else seen.flatten(1, 2).any(1)
    return seen if seen.shape[-1] > 1 else None


def _strided(name: str, value: Any, chunk: Chunk, pooled: bool, flash: bool) -> Any:
    if value is None or name in _WHOLE:
        return value
    if name in _PACKED or isinstance(value, BlockMask):
        raise ConfigError(
            f"A strided layer (Sequence-AltUp) can't tell which tokens {name} means. Load the model with "
            "attn_implementation = sdpa, and give a mask of numbers."
        )
    if name == "position_embeddings":
        parts = [_queries(name, part, chunk) for part in (value if isinstance(value, tuple) else [value])]
        return tuple(parts) if isinstance(value, tuple) else parts[0]
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if name == "attention_mask":
        if pooled:
            return _pooled_mask(name, value, chunk)
        return _keys(name, value if value.dim() == 2 else _queries(name, value, chunk), chunk)
    if name == "position_bias":
        return _keys(name, _queries(name, value, chunk), chunk)
    if name in ("encoder_attention_mask", "encoder_decoder_position_bias"):
        return value if value.dim() == 2 else _queries(name, value, chunk)
    if name == "position_ids" and flash:
        if value.shape[0] == 1 and bool((value.diff(dim=-1) != 1).any()):
            raise ConfigError(
                "position_ids: flash attention takes these for sequences packed into one, whose anchors are not known. "
                "Load the model with attn_implementation = sdpa."
            )
        # Nor would it understand those of anchors. Rotations by position are computed before.
        return None
    if name in ("position_ids", "cache_position"):
        return chunk.anchors(value, -1)
    if chunk.length > 1 and chunk.length in value.shape:
        raise ConfigError(
            f"A strided layer (Sequence-AltUp) does not know the argument {name} of shape {tuple(value.shape)}, and so "
            "not which part of it belongs to anchors. Leave it out, or use layers that don't take it."
        )
    return value


def _every(x: Tensor, axis: int, first: int, step: int) -> Tensor:
    index = [slice(None)] * x.dim()
    index[axis] = slice(first, None, step)
    return x[tuple(index)]


def _queries(name: str, x: Tensor, chunk: Chunk) -> Tensor:
    """The rows (the axis before the last) of anchors; one row that is for all stays."""
    if x.shape[-2] == chunk.length:
        return chunk.anchors(x, -2)
    return _one_for_all(name, x, -2, chunk.length)


def _keys(name: str, x: Tensor, chunk: Chunk) -> Tensor:
    """The columns (the last axis) of anchors, of this call and the calls before; one that is for all stays."""
    first = 0 if x.dim() == 2 else chunk.first_key
    if x.shape[-1] == chunk.total - first:
        return _every(x, -1, -first % chunk.stride, chunk.stride)
    return _one_for_all(name, x, -1, chunk.total - first)


def _one_for_all(name: str, x: Tensor, axis: int, tokens: int) -> Tensor:
    if x.shape[axis] != 1:
        raise ConfigError(
            f"{name} has the shape {tuple(x.shape)}; a strided layer (Sequence-AltUp) expects {tokens} entries on its "
            f"axis {axis}, one for each token."
        )
    return x


def _pooled_mask(name: str, mask: Tensor, chunk: Chunk) -> Tensor:
    """The mask for groups: a group sees what any of its tokens sees, and is seen if any of them is."""
    for axis in (-1,) if mask.dim() == 2 else (-1, -2):
        if mask.shape[axis] != chunk.length:
            _one_for_all(name, mask, axis, chunk.length)
    bottom: float = 0 if mask.dtype == torch.bool or mask.dim() == 2 else torch.finfo(mask.dtype).min
    behind = -mask.shape[-1] % chunk.stride
    mask = nn.functional.pad(mask, (0, behind), value=bottom).unflatten(-1, (-1, chunk.stride)).amax(-1)
    if mask.dim() == 2:
        return mask
    behind = -mask.shape[-2] % chunk.stride
    return nn.functional.pad(mask, (0, 0, 0, behind), value=bottom).unflatten(-2, (-1, chunk.stride)).amax(-2)
