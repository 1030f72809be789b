"""The widths that a user asks for: which go together, and the nearest possible ones where they do not."""

from collections.abc import Iterable
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

from auxin.errors import PlanError
from auxin.models.anatomy import anatomy as complete_anatomy
from auxin.planning.depth import chosen_stacks
from auxin.planning.width import describe_sizes
from auxin.settings import Settings
from auxin.words.anatomy import Anatomy
from auxin.words.widths import FEED_FORWARD, SETTINGS, Sizes, Stream, Width


class WidthTargets(Settings):
    """The widths after the growth; what is not given stays, or follows where the architecture leaves no choice.

    A width that is given is that of all layers, also of those that have widths of their own before.
    """

    hidden_size: int | None = Field(default=None, gt=0)
    """Width of the residual."""
    num_attention_heads: int | None = Field(default=None, gt=0)
    """Query heads. Where the head dimension is hidden_size / heads, they follow hidden_size at an unchanged head
    dimension if that is possible, else the head dimension grows."""
    num_key_value_heads: int | None = Field(default=None, gt=0)
    """Key-value heads; they follow the query heads in their old ratio. A single one stays single."""
    intermediate_size: int | None = Field(default=None, gt=0)
    """Hidden units of the feed-forward part; of each expert, where the config has no other name for these."""
    moe_intermediate_size: int | None = Field(default=None, gt=0)
    """Hidden units of each expert, where experts have a size of their own."""
    shared_expert_intermediate_size: int | None = Field(default=None, gt=0)
    """Hidden units of the expert that all tokens share, where it has a size of its own."""
    part: str | None = None
    """Of a model of several towers, the one that grows: "text" or "vision"."""

    def sizes(self, anatomy: Anatomy, scoped: Iterable[Width] | None = None) -> Sizes:
        """All widths after the growth.

        Args:
            anatomy: of the model.
            scoped: the widths of narrower scopes, for those whose layers differ before; default: what is given here for
                all, and otherwise what they are.

        Raises:
            PlanError: a width shrinks, does not exist in this architecture, or does not go with the others; the message
                names the nearest possible one.
        """
        if any(value is not None for value in self.model_dump(include=set(SETTINGS.values())).values()):
            refuse_without_tower(anatomy)
        refuse_stages(anatomy)
        old = anatomy.sizes
        hidden = _at_least("hidden_size", self.hidden_size, old.residual)
        refuse_other_heads(anatomy, self.num_attention_heads)
        heads = _at_least("num_attention_heads", self.num_attention_heads, old.query_heads)
        head_dim = old.head_dim
        if anatomy.fields.head_dim is None:
            heads, head_dim = self._bound_heads(anatomy, hidden)
        elif anatomy.heads_divide_hidden_size and hidden % heads:
            raise PlanError(
                f"num_attention_heads = {heads} does not divide hidden_size = {hidden}, which this architecture's "
                f"config insists on. The nearest possible: {_either(_divisors_near(hidden, heads, old.query_heads))}."
            )
        inner = {stream: self._feed_forward(anatomy, stream, hidden) for stream in FEED_FORWARD}
        inner["expert"] = old.experts
        new = Sizes.of(hidden, heads, self._key_value_heads(anatomy, heads), head_dim, inner)
        new = new.with_widths(self._unchanged(old) if scoped is None else scoped)
        refuse_shrinking(old, new)
        return new

    def gives(self, stream: Stream) -> bool:
        """Whether the width of `stream` is given for all layers; heads of both kinds are given together."""
        if stream in FEED_FORWARD:
            return self._given(stream) is not None
        if stream == "expert":
            return False
        return self.num_attention_heads is not None or self.num_key_value_heads is not None

    def _unchanged(self, old: Sizes) -> list[Width]:
        """The widths of narrower scopes that stay."""
        return [width for width in old.scoped if not self.gives(width.stream)]

    def _bound_heads(self, anatomy: Anatomy, hidden: int) -> tuple[int, int]:
        """Heads and their dimension where the product is the hidden size."""
        old = anatomy.sizes
        if anatomy.heads_stay:
            if hidden % old.query_heads:
                below = hidden // old.query_heads * old.query_heads
                raise PlanError(
                    f"hidden_size = {hidden} is no multiple of the {old.query_heads} heads, whose number stays: "
                    f"{anatomy.heads_stay} The nearest possible: {_either((below, below + old.query_heads))}."
                )
            return old.query_heads, hidden // old.query_heads
        if self.num_attention_heads is not None:
            heads = self.num_attention_heads
            if hidden % heads or hidden // heads < old.head_dim:
                raise PlanError(
                    f"num_attention_heads = {heads}: this architecture's head dimension is hidden_size / heads, which "
                    f"with hidden_size = {hidden} is not at least the {old.head_dim} of before. The nearest possible: "
                    f"hidden_size = {heads * max(old.head_dim, round(hidden / heads))}."
                )
            return heads, hidden // heads
        if hidden % old.head_dim == 0:
            return hidden // old.head_dim, old.head_dim
        if hidden % old.query_heads == 0:
            return old.query_heads, hidden // old.query_heads
        steps = sorted((old.head_dim, old.query_heads))
        near = sorted({size for step in steps for size in (hidden // step * step, -(-hidden // step) * step)})
        raise PlanError(
            f"hidden_size = {hidden} is neither a number of heads of the old dimension {old.head_dim} nor a multiple "
            f"of the {old.query_heads} heads. The nearest possible: {_either(s for s in near if s >= old.residual)}."
        )

    def _key_value_heads(self, anatomy: Anatomy, heads: int) -> int:
        old, wanted = anatomy.sizes, self.num_key_value_heads
        if anatomy.fields.key_value_heads is None:
            if anatomy.single_key_value_head:
                if wanted not in (None, 1):
                    raise PlanError(
                        f"num_key_value_heads = {wanted}: in this architecture all query heads read one key-value "
                        "head. Leave it out."
                    )
                return 1
            if wanted not in (None, heads):
                raise PlanError(
                    f"num_key_value_heads = {wanted}: in this architecture every head has its own keys and values, so "
                    f"there are {heads}. Leave it out."
                )
            return heads
        if wanted is None:
            if heads == old.query_heads or old.key_value_heads == 1:
                wanted = old.key_value_heads
            elif heads * old.key_value_heads % old.query_heads == 0:
                wanted = heads * old.key_value_heads // old.query_heads
            else:
                wanted = old.key_value_heads
        wanted = _at_least("num_key_value_heads", wanted, old.key_value_heads)
        if heads % wanted:
            near = _divisors_near(heads, wanted, old.key_value_heads)
            raise PlanError(
                f"num_key_value_heads = {wanted} does not divide num_attention_heads = {heads}. The nearest possible: "
                f"{_either(near) if near else f'num_attention_heads = {-(-heads // wanted) * wanted}'}."
            )
        return wanted

    def _given(self, stream: Stream) -> int | None:
        """The width asked for, of a feed-forward stream."""
        value: int | None = getattr(self, SETTINGS[stream])
        return value

    def _feed_forward(self, anatomy: Anatomy, stream: Stream, hidden: int) -> int | None:
        old, wanted, name = anatomy.sizes.units(stream), self._given(stream), SETTINGS[stream]
        if old is not None and anatomy.fields.of(stream) is None:
            follows = followed_width(anatomy, stream, hidden)
            if wanted not in (None, follows):
                raise PlanError(
                    f"{name} = {wanted}: this architecture has no value for it and works it out from the hidden size: "
                    f"{follows} for hidden_size = {hidden}. Leave it out."
                )
            return follows
        if old is not None:
            return _at_least(name, wanted, old)
        if wanted is not None:
            others = [SETTINGS[other] for other in FEED_FORWARD if anatomy.sizes.units(other)]
            instead = (
                f"What it has is {' and '.join(others)}."
                if others
                else "Its feed-forward part grows by tokens (method tokenformer)."
            )
            raise PlanError(f"{name} = {wanted}: this {anatomy.family} model has no such size. Leave it out. {instead}")
        return None


def followed_width(anatomy: Anatomy, stream: Stream, hidden: int) -> int:
    """The units of a feed-forward stream for which the config has no value, with a hidden size of `hidden`."""
    if stream == "ffn" and anatomy.ffn_follows is not None:
        return anatomy.ffn_follows.units(hidden)
    return (anatomy.sizes.units(stream) or 0) * hidden // anatomy.sizes.residual


def refuse_without_tower(anatomy: Anatomy) -> None:
    """Raise PlanError when the model has several towers and `anatomy` is that of none of them."""
    if anatomy.towers:
        raise PlanError(
            f"The model has several towers ({', '.join(anatomy.towers)}), each with widths of its own, and one is "
            f"changed at a time. Choose it: {' or '.join(f'part = {tower}' for tower in anatomy.towers)}."
        )


def refuse_stages(anatomy: Anatomy) -> None:
    """Raise PlanError when the model has stages, whose residual streams are of several widths."""
    if anatomy.has_stages:
        raise PlanError(
            f"A {anatomy.family} model has stages with a residual stream each, and what makes streams wider knows one. "
            "Let it lose heads or feed-forward units instead (optin, taylor, magnitude), or grow its linear layers by "
            "graft."
        )


def refuse_idle_part(anatomy: Anatomy, part: str | None, deeper: bool = False) -> None:
    """Raise PlanError when `part` chooses nothing: the model has no such tower, and no layers are added.

    Args:
        anatomy: of the model, asked for with this part.
        part: the setting.
        deeper: whether layers are added; `part` may then name a stack that shares its widths with others.
    """
    stacks = chosen_stacks(anatomy, part)
    if part is not None and not deeper and not any(stack.tower for stack in stacks):
        raise PlanError(
            f"part = {part!r} chooses where layers are added, and none are asked for: the widths of this model are "
            "those of all its stacks. Leave it out, or ask for layers too."
        )


def example_tower(model: PreTrainedModel, number: int = 0) -> tuple[Anatomy, dict[str, Any]]:
    """The anatomy of a model, or of one of its towers, and the setting that chooses that; for examples of settings.

    Args:
        model: the model.
        number: of the tower, in the order of the model's config.
    """
    body = complete_anatomy(model)
    return (
        (complete_anatomy(model, part=body.towers[number]), {"part": body.towers[number]})
        if body.towers
        else (body, {})
    )


def feed_forward_settings(anatomy: Anatomy, factor: float) -> dict[str, int]:
    """Settings of `WidthTargets` that ask for `factor` times as many units in all feed-forward parts whose width the
    config says, rounded down."""
    sizes = {stream: anatomy.sizes.units(stream) for stream in FEED_FORWARD if anatomy.fields.of(stream)}
    return {SETTINGS[stream]: int(units * factor) for stream, units in sizes.items() if units}


def somewhat_wider(anatomy: Anatomy) -> dict[str, int]:
    """Settings of `WidthTargets` that ask for the fewest heads more, a hidden size that goes with them, and a quarter
    more feed-forward units, each where it can change and is not bound to another; for examples of settings."""
    sizes, bound, settings = anatomy.sizes, anatomy.fields.head_dim is None, feed_forward_settings(anatomy, 1.25)
    heads = sizes.query_heads + sizes.query_heads // sizes.key_value_heads
    if not anatomy.heads_stay and not (bound and anatomy.residual_stays):
        settings["num_attention_heads"] = heads
    if not bound and not anatomy.residual_stays:
        settings["hidden_size"] = (sizes.residual // heads + 1) * heads  # Llama's must be a multiple
    return settings


def refuse_other_heads(anatomy: Anatomy, wanted: int | None) -> None:
    """Raise PlanError when another number of query heads is wanted, and the architecture keeps the one that it has."""
    if anatomy.heads_stay and wanted not in (None, anatomy.sizes.query_heads):
        raise PlanError(f"num_attention_heads = {wanted}: {anatomy.heads_stay} Leave it out.")


def refuse_shrinking(old: Sizes, new: Sizes) -> None:
    """Raise PlanError when a layer or a stack that has widths of its own would lose units."""
    for width in old.scoped:
        wanted = new.units(width.stream, width.scope)
        if wanted is not None and wanted < width.units:
            raise PlanError(
                f"{SETTINGS[width.stream]} = {wanted} is less than the {width.units} that {width.scope} has; growth "
                f"can't shrink. The nearest possible: {width.units}."
            )


def refuse_unchanged(anatomy: Anatomy, sizes: Sizes) -> None:
    """Raise PlanError when `sizes` are those that the model has."""
    if sizes == anatomy.sizes:
        raise PlanError(f"There is nothing to widen: the model already has {describe_sizes(anatomy)}. Ask for more.")


def _at_least(field: str, wanted: int | None, old: int) -> int:
    if wanted is not None and wanted < old:
        raise PlanError(
            f"{field} = {wanted} is less than the {old} that the model has; growth can't shrink. "
            f"The nearest possible: {old}."
        )
    return old if wanted is None else wanted


def _divisors_near(number: int, wanted: int, least: int) -> list[int]:
    """The divisors of `number` that are not below `least`, the two nearest to `wanted`."""
    divisors = [d for d in range(least, number + 1) if number % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2])


def _either(values: Iterable[int]) -> str:
    return " or ".join(str(value) for value in values)
