"""Groups of k tokens along the sequences of a batch. The first token of a group is its anchor.

Groups are counted in each sequence from its first visible token. Counted from the first column, a group could begin in
the padding on the left. Its anchor would be a masked token, whose row of the mask hides everything; eager attention
gives such a row the mean of all tokens, later ones included, and the group's visible tokens would be told of it. Also
what a text becomes would depend on how much padding stands before it.

With s the first visible token of a sequence and r = s mod k, anchors are its columns r, r + k, r + 2k, ..., those
before s in padding. Slot j of a cache is column r + j k in every sequence, so that a cache has one slot for k tokens,
whatever the padding of each sequence. Columns before r belong to no group; they are padding.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.utils import is_tracing

from auxin.errors import ConfigError


class Texts(NamedTuple):
    """Where the text of each sequence of a batch begins, as far as its mask was seen."""

    starts: Tensor
    """(batch,): the first visible token; 0 where there was none yet."""
    waiting: Tensor
    """(batch,) boolean: whether there was none yet."""
    shifts: tuple[int, ...]
    """The remainders of the starts by the stride: all that there are, or that there could be."""
    is_open: bool
    """Whether later masks can tell more: a text has not begun, or has padding behind it."""


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
    starts: Tensor | None = None
    """(batch,): the first visible token of each sequence; None: groups are counted from the first column in all."""
    shifts: tuple[int, ...] = (0,)
    """The remainders of `starts` by the stride that there are, or could be."""
    dropped: int = 0
    """Slots of anchors that no token sees any more."""

    @classmethod
    def of(cls, texts: Texts | None, stride: int, seen: int, length: int, first_key: int = 0) -> Self:
        """The tokens of a call of which `texts` is known."""
        if texts is None or not any(texts.shifts):
            return cls(stride, seen, length, first_key, dropped=-(-first_key // stride))
        dropped = max(-(-(first_key - max(texts.shifts)) // stride), 0)
        return cls(stride, seen, length, first_key, texts.starts, texts.shifts, dropped)

    @property
    def total(self) -> int:
        """Tokens up to the last one of this call."""
        return self.seen + self.length

    @property
    def groups(self) -> int:
        """Anchors of this call in the sequence that has most."""
        return max(self._before(self.total, shift) - self._before(self.seen, shift) for shift in self.shifts)

    @property
    def slots(self) -> int:
        """Anchors of this call and the calls before that tokens of this call see, in the sequence that has most."""
        return max(self._before(self.total, shift) for shift in self.shifts) - self.dropped

    @property
    def offset(self) -> int | Tensor:
        """Tokens before the first one of this call in the first of its groups.

        The first group is the one that began in an earlier call, if there is one. In sequences with starts, (batch,),
        it always is, and the offset 1 to k; at k it has no token of this call.
        """
        if self.starts is None:
            return self.seen % self.stride
        return self.stride - (self.starts - self.seen) % self.stride

    @property
    def continues(self) -> bool:
        """Whether the first group is one that began in an earlier call."""
        return self.starts is not None or self.seen % self.stride > 0

    def anchors(self, x: Tensor, axis: int) -> Tensor:
        """Those entries of `x` along `axis`, which holds the tokens of this call, that belong to anchors.

        Args:
            x: with starts, its first axis is the batch, or of size 1.
            axis: counted from the front or the back.
        """
        if self.starts is None:
            return every(x, axis, -self.seen % self.stride, self.stride)
        return taken(x, self.anchor_places(), axis)

    def anchor_places(self) -> Tensor:
        """With starts, the places of anchors among the tokens of this call, (batch, groups).

        Where a sequence has fewer than others, the last one is some token that is none: in a first call one of the
        padding before its text.
        """
        assert self.starts is not None
        steps = self.stride * torch.arange(self.groups, device=self.starts.device)
        places = ((self.starts - self.seen) % self.stride)[:, None] + steps
        return places % self.length if self.seen == 0 else places.clamp(max=self.length - 1)

    def key_tokens(self) -> tuple[Tensor, Tensor]:
        """With starts, the token of each slot (batch, slots), and which slots hold one that a token may see.

        A first call has padding for the slots that would be behind its last token.
        """
        assert self.starts is not None
        slots = torch.arange(self.dropped, self.dropped + self.slots, device=self.starts.device)
        tokens = (self.starts % self.stride)[:, None] + self.stride * slots
        if self.seen == 0:
            tokens = tokens % self.total
        return tokens, (tokens >= self.first_key) & (tokens < self.total)

    def new_slots(self) -> Tensor:
        """With starts, the slots of the anchors of this call, (batch, groups); those of none are the ones behind."""
        assert self.starts is not None
        before = -((self.starts % self.stride - self.seen) // self.stride) - self.dropped
        return before[:, None] + torch.arange(self.groups, device=self.starts.device)

    def order(self) -> Tensor:
        """With starts, in a first call: the tokens with each sequence's first r put last, (batch, sequence). In this
        order groups are counted from the first column."""
        assert self.starts is not None
        columns = torch.arange(self.length, device=self.starts.device)
        return (columns + (self.starts % self.stride)[:, None]) % self.length

    def _before(self, tokens: int, shift: int) -> int:
        """Anchors among the first `tokens` of a sequence whose groups are shifted."""
        return -(-(tokens - shift) // self.stride)


def every(x: Tensor, axis: int, first: int, step: int) -> Tensor:
    """Every `step`-th entry of `x` along `axis`."""
    index = [slice(None)] * x.dim()
    index[axis] = slice(first, None, step)
    return x[tuple(index)]


def taken(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """The entries of `x` along `axis` that `index` (batch, entries) names for each sequence; the first axis of `x` is
    the batch, or of size 1."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    return torch.take_along_dim(x, index.view(shape), axis)


def visible_keys(mask: Tensor) -> Tensor:
    """Which entries of a mask let a token be seen, boolean of its shape.

    Args:
        mask: boolean; of numbers that are above 0 where a token is seen and 0 elsewhere, (batch, keys), or larger as in
            DeBERTa's layers; or added to scores, (batch, heads or 1, queries or 1, keys), with large negative numbers
            where it is not.
    """
    if mask.dtype == torch.bool:
        return mask
    if mask.dim() == 2 or not mask.is_floating_point():
        return mask > 0
    # What is added to scores hides by negative numbers; it may hold positive ones too, biases by distance.
    is_added = (mask < 0).any() | ~(mask > 0).any()
    return torch.where(is_added, mask > torch.finfo(mask.dtype).min / 2, mask > 0)


def visible_tokens(mask: Tensor | None) -> Tensor | None:
    """Which tokens any other may see, (batch, keys) boolean; None: all.

    Args:
        mask: see `visible_keys`.
    """
    return None if mask is None or mask.shape[-1] == 1 else _seen_by_any(visible_keys(mask))


def texts(
    mask: Any, stride: int, batch: int, tokens: int, first_key: int = 0, before: Texts | None = None
) -> Texts | None:
    """Where the texts of a batch begin; None: all with the first token.

    Args:
        mask: of the tokens of this call and the calls before; see `visible_keys`. None: all are visible. What is no
            tensor says nothing.
        stride: k.
        batch: sequences.
        tokens: of this call and the calls before.
        first_key: the first token that masks with queries have a column for.
        before: what earlier masks said.

    Raises:
        ConfigError: a visible token would have an anchor that is hidden, or is of another text of the same sequence.
            (While a graph is traced, or on shapes alone, there are no values to look at.)
    """
    if not isinstance(mask, Tensor):
        return before
    first_key = 0 if mask.dim() == 2 else first_key
    if mask.shape[-1] != tokens - first_key:
        return before
    seen = visible_keys(mask)
    visible = _seen_by_any(seen).expand(batch, -1)
    waiting, starts = ~visible.any(-1), visible.int().argmax(-1) + first_key
    if before is not None:
        starts, waiting = torch.where(before.waiting, starts, before.starts), before.waiting & waiting
    elif first_key > 0:  # a later call, and none was needed before: all texts began with the first token
        starts, waiting = torch.zeros_like(starts), torch.zeros_like(waiting)
    starts = starts.masked_fill(waiting, 0)
    if is_tracing(mask) or mask.is_meta:
        return Texts(starts, waiting, tuple(range(stride)), False)
    columns = torch.arange(first_key, tokens, device=mask.device)
    places = (columns - starts[:, None]) % stride
    # Those out of a window were looked at before.
    anchors = (columns - places - first_key).clamp(min=0)
    hidden = (visible & (columns - places >= first_key) & ~visible.gather(1, anchors)).any(-1)
    apart = torch.zeros_like(waiting)
    if mask.dim() == 4 and first_key == 0 and mask.shape[-1] == mask.shape[-2]:
        neighbours = visible[:, 1:] & visible[:, :-1] & (places[:, 1:] > 0)
        apart = (neighbours & ~seen.any(1).diagonal(-1, -2, -1)).any(-1)
    # Values are asked for once.
    facts = torch.stack([starts % stride, waiting, hidden, apart, ~visible[:, -1]]).tolist()
    for row, (is_hidden, is_apart) in enumerate(zip(facts[2], facts[3], strict=True)):
        if is_hidden:
            raise ConfigError(
                f"attention_mask: in sequence {row} hidden tokens lie between visible ones, and one of them would be "
                f"the anchor of visible ones: groups of {stride} (Sequence-AltUp) are counted from the first visible "
                "token. Pad on one side, and to write on, on the left; hide nothing within a text. (Without an "
                "attention_mask, generate() hides whatever equals pad_token_id: give it one.)"
            )
        if is_apart:
            raise ConfigError(
                f"attention_mask: in sequence {row} tokens do not see the ones right before them, as where several "
                f"texts are packed into one sequence. Groups of {stride} tokens (Sequence-AltUp) would go across. Give "
                "each text a sequence of its own, or begin them at multiples of the stride."
            )
    return Texts(starts, waiting, tuple(sorted(set(facts[0]))), any(facts[1]) or any(facts[4]))


def _seen_by_any(seen: Tensor) -> Tensor:
    return seen if seen.dim() == 2 else seen.flatten(1, -2).any(1)
