"""The part of a cache that belongs to a layer which runs on every k-th token: keys and values of anchors alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from auxin.errors import ConfigError
from auxin.nn.token_groups import Chunk, Texts, taken, texts


class StridedLayer(DynamicLayer):
    """The part of a cache that belongs to a strided layer: keys and values of anchors, and the last anchor itself.

    To whoever asks for its length it has seen all tokens, so that masks and positions come out as for other layers.
    Where sequences are padded, each has its anchors at tokens of its own (see `auxin.nn.token_groups`); a slot that one
    of them has no anchor for yet holds nothing that counts, until there is one.

    Args:
        stride: k.
    """

    is_croppable = False

    def __init__(self, stride: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stride = stride
        self.tokens = 0
        """Tokens that the layer has seen."""
        self.texts: Texts | None = None
        """Where the text of each sequence begins; None: with the first token."""
        self.chunk: Chunk | None = None
        """The tokens of the call that is going on, or of the last one."""
        self.dropped = 0
        """Slots that are kept no more."""
        self.current: tuple[Tensor, Tensor] | None = None
        """The last anchor of each sequence and what the layer made of it, (batch, 1, d) each."""
        self.results: int | None = None
        """How many things the layer gives; None: a tensor and no tuple."""

    @property
    def first_key(self) -> int:
        """The first token seen that the next one still sees."""
        return 0

    def begin(self, batch: int, length: int, mask: Any) -> Chunk:
        """The next `length` tokens of `batch` sequences, with the mask that the layer got; `advance` ends the call.

        Raises:
            ConfigError: what `auxin.nn.token_groups.texts` refuses.
        """
        # A step of one token adds to texts that have begun and have no padding behind them; no mask says more.
        if self.tokens == 0 or length > 1 or (self.texts is not None and self.texts.is_open):
            self.texts = texts(mask, self.stride, batch, self.tokens + length, self.first_key, self.texts)
        chunk = Chunk.of(self.texts, self.stride, self.tokens, length, self.first_key)
        self.chunk = replace(chunk, dropped=max(chunk.dropped, self.dropped))
        return self.chunk

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values of anchors, (batch, heads, anchors, dim), into their slots, and give those of all slots
        that tokens of this call see."""
        chunk = self.chunk
        assert chunk is not None
        if self.keys is not None and self.values is not None and self.is_initialized:
            cut = chunk.dropped - self.dropped
            self.keys, self.values = self.keys[:, :, cut:], self.values[:, :, cut:]
        self.dropped = chunk.dropped
        if chunk.starts is None or chunk.seen == 0:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = _placed(self.keys, key_states, chunk), _placed(self.values, value_states, chunk)
        return self.keys, self.values

    def advance(self, anchors: Tensor, outputs: Tensor) -> None:
        """Note that the tokens of this call were seen; the current anchors are among those of its groups, (batch,
        groups, d)."""
        chunk = self.chunk
        assert chunk is not None
        self.tokens = chunk.total
        if isinstance(offset := chunk.offset, Tensor):
            current = ((offset + chunk.length - 1) // chunk.stride)[:, None]
            self.current = taken(anchors, current, 1), taken(outputs, current, 1)
        else:
            self.current = anchors[:, -1:], outputs[:, -1:]

    def get_seq_length(self) -> int:
        """All tokens seen, not only anchors."""
        return self.tokens

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens, self.dropped, self.texts, self.chunk = 0, 0, None, None
        self.current, self.results = None, None

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
        if self.current is not None:
            anchor, output = self.current
            self.current = change(anchor), change(output)
        if self.texts is not None:
            self.texts = self.texts._replace(starts=change(self.texts.starts), waiting=change(self.texts.waiting))


class StridedSlidingLayer(StridedLayer):
    """The same for a layer that sees a window: of the anchors before, it keeps and shows those within. Masks come out
    of the same sizes as for other layers with the window.

    Args:
        sliding_window: tokens that a token sees, itself included.
        stride: k.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, stride: int, **kwargs: Any) -> None:
        super().__init__(stride, **kwargs)
        self.sliding_window = sliding_window

    @property
    def first_key(self) -> int:
        """The first token seen that the next one still sees."""
        return max(self.tokens - self.sliding_window + 1, 0)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Columns of a mask, and the token that the first of them is for."""
        # Earlier versions of transformers give the positions of the queries.
        queries = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.tokens - self.first_key + queries, self.first_key


def strided_cache(cache: Any, layer: nn.Module, stride: int) -> StridedLayer:
    """The part of `cache` that belongs to `layer`; put there if the cache is new.

    Args:
        cache: a DynamicCache, or an EncoderDecoderCache with one.
        layer: has, somewhere inside, the attribute layer_idx (GPT-Neo: layer_id).
        stride: the layer's.

    Raises:
        ConfigError: the cache is of another kind, or was filled by a layer that is not strided.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    numbers = (getattr(module, name, None) for name in ("layer_idx", "layer_id") for module in layer.modules())
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
            new = StridedLayer(stride) if window is None else StridedSlidingLayer(window, stride)
            cache.layers[number] = new
            return new
        kind = f"{type(cache).__name__} with {'tokens in ' if known else ''}a {type(found).__name__}"
    else:
        kind = type(cache).__name__ + (" that is offloaded" if getattr(cache, "offloading", False) else "")
    raise ConfigError(
        f"A strided layer (Sequence-AltUp) can't use a {kind} as its cache. Give an empty DynamicCache, as generate() "
        "makes one by default, or use_cache = False."
    )


def _placed(kept: Tensor, new: Tensor, chunk: Chunk) -> Tensor:
    """`kept` (batch, heads, slots, dim) with `new` (batch, heads, anchors, dim) in the slots of this call."""
    # What is no anchor goes behind the last slot, which is cut off.
    behind = chunk.slots
    slots = chunk.new_slots().clamp(max=behind)[:, None, :, None]
    room = nn.functional.pad(kept, (0, 0, 0, behind + 1 - kept.shape[2]))
    return room.scatter(2, slots.expand_as(new), new)[:, :, :behind]
