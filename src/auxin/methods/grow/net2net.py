"""Net2Net on transformers: wider attention and feed-forward parts by a random map, deeper by identity blocks
(Chen, Goodfellow and Shlens, ICLR 2016, arXiv 1511.05641).

The random map keeps the old units and draws every further one from them; readers divide by the number of copies, which
differ. That is exact for feed-forward units and heads, and not for the residual, whose norm would weight its units
anew: for a larger hidden size use lemon or hypercloning, or bert2bert for the random map without the promise. Key-value
heads are drawn with all their query heads; where only query heads are added, those of every group are repeated in turn.
A block becomes an identity by an output of zero.
"""

import random
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.bench import from_model
from auxin.planning.depth import deepest, identity_blocks
from auxin.planning.method import Method
from auxin.planning.width import describe_sizes, widen
from auxin.planning.width_maps import StreamMap, Widening, circular, drawn, feed_forward_maps, head_maps, scoped_maps
from auxin.planning.width_targets import (
    WidthTargets,
    example_tower,
    feed_forward_settings,
    refuse_idle_part,
    refuse_other_heads,
    refuse_without_tower,
)
from auxin.settings import Settings
from auxin.words.widths import Sizes


class Net2Net(Settings):
    """The widths of attention and feed-forward part, and the depth, after the growth; what is not given stays."""

    num_attention_heads: int | None = Field(default=None, gt=0)
    """Query heads, where the head dimension is a value of its own."""
    num_key_value_heads: int | None = Field(default=None, gt=0)
    """Key-value heads; they follow the query heads in their old ratio."""
    intermediate_size: int | None = Field(default=None, gt=0)
    """Hidden units of the feed-forward part; of each expert, where the config has no other name for these."""
    moe_intermediate_size: int | None = Field(default=None, gt=0)
    """Hidden units of each expert, where experts have a size of their own."""
    shared_expert_intermediate_size: int | None = Field(default=None, gt=0)
    """Hidden units of the expert that all tokens share, where it has a size of its own."""
    num_hidden_layers: int | None = Field(default=None, gt=0)
    """Layers; of an encoder and a decoder, of each."""
    part: str | None = None
    """Of a model of several towers, the one that grows: "text" or "vision"; with `num_hidden_layers` alone None means
    all. Of an encoder and a decoder, the one that gets layers."""
    noise: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """Noise on the shares of the copies, relative to the root mean square of the weights; it sums to zero over the
    copies of a unit. Without it copies of units that are read equally stay equal for ever."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random map and of the noise."""


def plan_net2net(model: PreTrainedModel, settings: Net2Net) -> Plan:
    """Plan wider attention and feed-forward parts and identity blocks; weights are not needed.

    Raises:
        PlanError: an unknown architecture, a target that is smaller than the model, heads that do not go together or
            that would need another hidden size, identity blocks in a post-norm architecture, or nothing to grow.
    """
    body = anatomy(model, part=settings.part)
    refuse_idle_part(body, settings.part, deeper=settings.num_hidden_layers is not None)
    old = body.sizes
    wanted = settings.model_dump(include=set(WidthTargets.model_fields) & set(Net2Net.model_fields))
    if settings.num_attention_heads is not None:
        refuse_without_tower(body)
    refuse_other_heads(body, settings.num_attention_heads)
    if body.fields.head_dim is None and settings.num_attention_heads not in (None, old.query_heads):
        raise PlanError(
            f"num_attention_heads = {settings.num_attention_heads}: in this architecture the head dimension is hidden "
            "size / heads, so that heads grow with the hidden size alone. Use lemon or hypercloning with hidden_size = "
            f"{settings.num_attention_heads * old.head_dim}."
        )
    sizes = WidthTargets.parse(wanted).sizes(body)
    draw = random.Random(settings.seed)
    edits: list[Edit] = []
    if sizes != old:
        edits += widen(body, _random_maps(old, sizes, draw, settings.noise)).edits
    if settings.num_hidden_layers is not None:
        edits += identity_blocks(model, body, settings.num_hidden_layers, settings.part)
    if not edits:
        raise PlanError(
            f"There is nothing to grow: the model already has {describe_sizes(body)} and the layers asked for. Ask for "
            "more of one of them."
        )
    return Plan(
        method="net2net",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        seed=settings.seed,
        edits=edits,
        made_for=config_values(model.config),
    )


def _random_maps(old: Sizes, new: Sizes, draw: random.Random, noise: float) -> Widening:
    """The old units and then draws from them, for all layers together and for those with widths of their own."""

    def heads(old: Sizes, new: Sizes) -> tuple[StreamMap, ...]:
        groups = old.query_heads // old.key_value_heads
        added = new.key_value_heads - old.key_value_heads
        whole = added > 0 and new.query_heads == new.key_value_heads * groups
        chosen = [draw.randrange(old.key_value_heads) for _ in range(added)] if whole else []
        return head_maps(old, new.query_heads, new.key_value_heads, chosen)

    def units(old: int, new: int) -> StreamMap:
        return drawn(old, new, [draw.randrange(old) for _ in range(new - old)])

    query, key_value = heads(old, new)
    feed_forward = feed_forward_maps(old, new, units)
    residual = circular(old.residual, old.residual)
    scoped = scoped_maps(old, new, units, heads)
    return Widening(residual, query, key_value, feed_forward, old.head_dim, noise=noise, scoped=scoped)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    body, settings = example_tower(model)
    settings |= feed_forward_settings(body, 1.5)
    if body.norm_position != "after_residual":
        settings["num_hidden_layers"] = deepest(model, body) + 1
    return settings


METHOD = Method(
    name="net2net",
    title="Net2Net: random copies of heads and feed-forward units, identity blocks",
    paper="arXiv 1511.05641",
    intent="grow",
    settings=Net2Net,
    plan=from_model(plan_net2net),
    examples=_examples,
    promise="exact; heads and feed-forward units only, deeper only with norms before or inside the residual sum",
)
