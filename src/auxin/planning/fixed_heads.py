"""Sizes of a growth that leaves the head dimension as it is."""

from auxin.errors import PlanError
from auxin.planning.width_targets import WidthTargets
from auxin.words.anatomy import Anatomy
from auxin.words.widths import Sizes


def fixed_head_sizes(anatomy: Anatomy, targets: WidthTargets) -> Sizes:
    """The widths that `targets` mean for a model of this anatomy; where nothing else is said and the config derives the
    head dimension (hidden size / heads), the hidden size follows the heads.

    Raises:
        PlanError: a width shrinks, they don't go together, or the head dimension would have to change; the message
            names the nearest possible ones.
    """
    old = anatomy.sizes
    if anatomy.fields.head_dim is None and targets.hidden_size is None and targets.num_attention_heads is not None:
        targets = targets.model_copy(update={"hidden_size": targets.num_attention_heads * old.head_dim})
    new = targets.sizes(anatomy)
    if new.head_dim != old.head_dim and anatomy.heads_stay:
        raise PlanError(
            f"hidden_size = {new.residual}: new heads are whole heads here, and num_attention_heads = "
            f"{old.query_heads} stays: {anatomy.heads_stay} Leave hidden_size out, or use a method that makes heads "
            "larger, for example hypercloning."
        )
    if new.head_dim != old.head_dim:
        below = max(new.residual // old.head_dim * old.head_dim, old.residual)
        raise PlanError(
            f"hidden_size = {new.residual} with {new.query_heads} heads would change the head dimension from "
            f"{old.head_dim} to {new.head_dim}; new heads are whole heads here. The nearest possible: hidden_size = "
            f"{below} with num_attention_heads = {below // old.head_dim}, or {below + old.head_dim} with "
            f"{below // old.head_dim + 1}."
        )
    return new
