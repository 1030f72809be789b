"""The widths that a user asks for: which go together, and the nearest possible ones where they do not."""

from collections.abc import Iterable

from pydantic import Field

from auxin.errors import PlanError
from auxin.planning.width import describe_sizes
from auxin.settings import Settings
from auxin.words.roles import Anatomy, Sizes, Stream, Width


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
    """Hidden units of the feed-forward part."""

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
        old = anatomy.sizes
        hidden = _at_least("hidden_size", self.hidden_size, old.residual)
        heads = _at_least("num_attention_heads", self.num_attention_heads, old.query_heads)
        head_dim = old.head_dim
        if anatomy.fields.head_dim is None:
            heads, head_dim = self._bound_heads(old, hidden)
        elif anatomy.heads_divide_hidden_size and hidden % heads:
            raise PlanError(
                f"num_attention_heads = {heads} does not divide hidden_size = {hidden}, which this architecture's "
                f"config insists on. The nearest possible: {_either(_divisors_near(hidden, heads, old.query_heads))}."
            )
        new = Sizes(hidden, heads, self._key_value_heads(anatomy, heads), head_dim, self._ffn(anatomy))
        new = new.with_widths(self._unchanged(old) if scoped is None else scoped)
        refuse_shrinking(old, new)
        return new

    def gives(self, stream: Stream) -> bool:
        """Whether the width of `stream` is given for all layers; heads of both kinds are given together."""
        if stream == "ffn":
            return self.intermediate_size is not None
        return self.num_attention_heads is not None or self.num_key_value_heads is not None

    def _unchanged(self, old: Sizes) -> list[Width]:
        """The widths of narrower scopes that stay."""
        return [width for width in old.scoped if not self.gives(width.stream)]

    def _bound_heads(self, old: Sizes, hidden: int) -> tuple[int, int]:
        """Heads and their dimension where the product is the hidden size."""
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

    def _ffn(self, anatomy: Anatomy) -> int | None:
        if anatomy.sizes.ffn is None:
            if self.intermediate_size is not None:
                raise PlanError(
                    f"intermediate_size = {self.intermediate_size}: the {anatomy.family} architecture has no such "
                    "size. Leave it out; its feed-forward part grows by tokens (method tokenformer)."
                )
            return None
        return _at_least("intermediate_size", self.intermediate_size, anatomy.sizes.ffn)


def refuse_shrinking(old: Sizes, new: Sizes) -> None:
    """Raise PlanError when a layer or a stack that has widths of its own would lose units."""
    names: dict[Stream, str] = {
        "query": "num_attention_heads",
        "key_value": "num_key_value_heads",
        "ffn": "intermediate_size",
    }
    for width in old.scoped:
        wanted = new.units(width.stream, width.scope)
        if wanted is not None and wanted < width.units:
            raise PlanError(
                f"{names[width.stream]} = {wanted} is less than the {width.units} that {width.scope} has; growth can't "
                f"shrink. The nearest possible: {width.units}."
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
