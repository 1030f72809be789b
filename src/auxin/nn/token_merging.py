"""A layer that sees fewer tokens: the most alike are averaged before it, and each gets what its group became.

With c the first tokens, which are left alone (a class token, registers), and r of the others fewer

    match     the others are dealt into A and B in turn; each of A finds the nearest of B by the cosine of hidden states
    merge     the r of A that are nearest to theirs join it, so that groups grow around tokens of B
    compute   y = L(means of the groups), with log(size of the group) added to the attention that a group gets
    copy      every token gets what its group became

This is the bipartite soft matching of ToMe (Bolya et al. 2023, arXiv 2210.09461) with its proportional attention. Where
more are to go than A holds, what is left is dealt again.

Tokens of a group are the same from here on, and so are merged first by a later layer that merges as many or more: its
groups are those of ToMe, which merges for good. That all tokens are there behind a layer is from Bolya and Hoffman
(2023, arXiv 2303.17604): means over tokens weigh groups by their size, layers that read a map of an image find one, and
no layer has to know what an earlier one did. Other than in ToMe the tokens are matched before the layer and not between
its attention and its feed-forward part, so that attention is cheaper, too, and by hidden states and not by keys, which
are not there yet.

Tokens that are the same can be merged without a change, but for rounding: a softmax over a key that comes n times is
one over that key with log(n) added. With r = 0 the layer runs as it is, to the last bit.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxin.errors import ConfigError, PlanError
from auxin.nn.autocast import without_autocast
from auxin.nn.bricks import Brick, brick
from auxin.nn.calls import forward_arguments
from auxin.nn.extension import extended

MASK = "attention_mask"
"""The argument of a layer that is added to the scores of its attention."""


class TokenMerging(nn.Module):
    """Which tokens are merged, and their means; no parameters.

    Args:
        merged: r, how many tokens fewer are left, 0 or more.
        kept: c, how many of the first tokens are left alone.
    """

    def __init__(self, merged: int, kept: int = 1) -> None:
        super().__init__()
        self.merged, self.kept = merged, kept

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The groups of `tokens` (batch, sequence, d): their means (batch, sequence - r, d), how many tokens they have,
        (batch, sequence - r), float32 at least, and the group of every token, (batch, sequence).

        Raises:
            ConfigError: so many can't be merged, since one at least stays beside the first ones.
        """
        batch, length, _ = tokens.shape
        if self.merged >= length - self.kept:
            raise ConfigError(
                f"A layer merges {self.merged} of {length - self.kept} tokens (and leaves {self.kept} alone), so that "
                "none would be left. Give larger images, or merge fewer."
            )
        with without_autocast():  # by which near ones would be as near as those that are the same
            groups = self._groups(tokens.detach()[:, self.kept :])
        first = torch.arange(self.kept, device=tokens.device).expand(batch, -1)
        groups = torch.cat([first, groups + self.kept], dim=1)
        means, sizes = _means(tokens, groups, length - self.merged)
        return means, sizes, groups

    def _groups(self, tokens: Tensor) -> Tensor:
        """The number of the group of every token, (batch, sequence)."""
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        batch, count, _ = tokens.shape
        groups, means, left = torch.arange(count, device=tokens.device).expand(batch, -1), tokens, self.merged
        while left:
            fewer = min(left, (means.shape[1] + 1) // 2, means.shape[1] - 1)
            groups = _joined(means, fewer).gather(1, groups)
            left -= fewer
            if left:
                means, _ = _means(tokens, groups, means.shape[1] - fewer)
        return groups

    def extra_repr(self) -> str:
        return f"merged={self.merged}, kept={self.kept}"


def _joined(means: Tensor, fewer: int) -> Tensor:
    """The number, of (sequence - fewer), that each of `means` (batch, sequence, d) gets where `fewer` of those at even
    places join the nearest at an odd one: the even ones that stay come first."""
    batch, count, _ = means.shape
    unit = F.normalize(means, dim=-1)
    nearest, partners = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=2)
    order = nearest.argsort(dim=1, descending=True, stable=True)
    joins = torch.zeros_like(nearest, dtype=torch.bool).scatter(1, order[:, :fewer], True)
    stay = nearest.shape[1] - fewer
    numbers = torch.empty(batch, count, dtype=torch.long, device=means.device)
    numbers[:, ::2] = torch.where(joins, stay + partners, (~joins).cumsum(dim=1) - 1)
    numbers[:, 1::2] = stay + torch.arange(count // 2, device=means.device)
    return numbers


def _means(tokens: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (batch, count, d) of the tokens of each group, and the groups' sizes (batch, count), float32 at least: with
    8 bits one more token than 256 is none, and with 5 of an exponent some hundred large ones are infinite."""
    batch, _, width = tokens.shape
    places, wide = _places(groups, count), tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sizes = wide.new_zeros(batch * count).index_add(0, places, wide.new_ones(len(places)))
    sums = wide.new_zeros(batch * count, width).index_add(0, places, wide.flatten(0, 1))
    means = (sums / sizes[:, None]).to(tokens.dtype)
    return means.unflatten(0, (batch, count)), sizes.unflatten(0, (batch, count))


def _places(groups: Tensor, count: int) -> Tensor:
    """The numbers of groups (batch, sequence), of which each sample has `count`, through all samples. Along one axis
    rows are added up and copied several times faster than by an index for each entry."""
    return (groups + count * torch.arange(len(groups), device=groups.device)[:, None]).flatten()


@brick("token_merging_layer")
class TokenMergingLayer(Brick):
    """A layer of an encoder of patches that sees r tokens fewer.

    It takes and gives hidden states of all tokens, (batch, sequence, d), and whatever else the layer takes.
    """

    token_merging: TokenMerging
    argument_names: tuple[str, ...]

    @classmethod
    def replacing(cls, module: nn.Module, merged: int, kept: int = 1) -> Self:
        """`module`, a layer whose first argument and result (or the first of them) are hidden states, so extended.

        Args:
            module: the layer, also on the meta device.
            merged: r. 0 changes nothing.
            kept: the first tokens, which are left alone.

        Raises:
            ConfigError: a number is negative, the layer takes no attention mask, or works on streams.
        """
        if merged < 0 or kept < 0:
            raise ConfigError(f"token_merging_layer: merged = {merged}, kept = {kept}. Give 0 or more.")
        if isinstance(module, Brick) and module.residual_blocks() is not None:
            raise ConfigError(
                "token_merging_layer: the layer has a residual stream of several blocks (alternating updates), whose "
                "tokens can't be merged. Merge tokens of the model before that edit."
            )
        names = forward_arguments(module)[1:]
        if MASK not in names:
            raise ConfigError(
                f"token_merging_layer: {type(module).__name__} takes no {MASK}, by which attention is told the sizes "
                "of groups. Replace a layer that takes one."
            )
        layer = extended(module, cls)
        layer.token_merging, layer.argument_names = TokenMerging(merged, kept), names
        return layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (batch, sequence, d), then whatever the layer takes. As the layer.

        Raises:
            ConfigError: there are too few tokens, an attention mask, or an attention that takes no mask of numbers.
        """
        if not self.token_merging.merged:
            return super().forward(hidden_states, *args, **kwargs)
        if len(args) > len(self.argument_names):
            raise ConfigError(
                f"A layer that merges tokens knows the names of {len(self.argument_names)} of {len(args)} arguments of "
                f"{type(self).__name__}. Pass them by name."
            )
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        self._check(arguments)
        means, sizes, groups = self.token_merging(hidden_states)
        arguments[MASK] = sizes.log().to(means.dtype)[:, None, None]
        result = super().forward(means, **arguments)
        whole = isinstance(result, tuple)
        new = (result[0] if whole else result).flatten(0, 1)[_places(groups, means.shape[1])]
        new = new.unflatten(0, groups.shape)
        return (new, *result[1:]) if whole else new

    def _check(self, arguments: Mapping[str, Any]) -> None:
        if arguments.get(MASK) is not None:
            raise ConfigError(
                f"{MASK}: layers that merge tokens take all of them for parts of the image. Leave the mask out."
            )
        configs = (getattr(module, "config", None) for module in self.modules())
        for name in {str(getattr(config, "_attn_implementation", "sdpa")) for config in configs if config is not None}:
            if name not in ("sdpa", "eager"):
                raise ConfigError(
                    f"attn_implementation = {name} is not told the sizes of merged tokens. Load the model with sdpa "
                    "or eager."
                )

    def scaled(self, factor: float, plain: Mapping[str, float]) -> dict[str, float]:
        """As the layer.

        Raises:
            PlanError: it is to add nothing, and merges tokens, which come out as their mean.
        """
        if factor == 0 and self.token_merging.merged:
            raise PlanError(
                "it merges tokens, so that no copy of it is an identity block. Grow the model first and merge then."
            )
        return super().scaled(factor, plain)
