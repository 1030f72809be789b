"""bert2BERT: a wider and deeper model by random maps and stacking (Chen et al., ACL 2022, arXiv 2110.07143).

* **fpi** (function-preserving initialisation) is Net2Net's random map on all streams, heads whole and the same map
  wherever a stream goes. The norms' gains are indexed, not rescaled: with the residual grown it keeps the function
  only approximately, unless the hidden size is a whole number of copies of which each unit gets one.
* **aki** (advanced knowledge initialisation, the paper's better one) takes the further output units of layer l from
  the same places of layer l + 1, widened on the input side. It keeps no function, but the copies are no copies.

Depth: the widened layers are stacked floor(L'/L) times, and the top L' mod L ones once more on top. The paper trains
ever longer prefixes of layers first; the hook `TrainOnly` does that. Saved FLOPs on BERT-base from (12, 512): FPI 30 %,
AKI 38 %.
"""

import random
from typing import Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.plan import Promise
from auxin.edits.structure import config_values
from auxin.models.anatomy import anatomy
from auxin.planning.bench import from_model
from auxin.planning.depth import arrange, can_deepen, chosen_stacks, deepest, depth, stacked_order
from auxin.planning.method import Method
from auxin.planning.width import widen
from auxin.planning.width_maps import StreamMap, Widening, drawn, feed_forward_maps, head_maps, scoped_maps
from auxin.planning.width_targets import WidthTargets, example_tower, refuse_idle_part, refuse_unchanged
from auxin.words.anatomy import Anatomy
from auxin.words.widths import Sizes


class Bert2Bert(WidthTargets):
    """The widths and the depth after the growth; what is not given stays."""

    num_hidden_layers: int | None = Field(default=None, gt=0)
    """Layers; of an encoder and a decoder, of each."""
    part: str | None = None
    """Of a model of several towers, the one that grows: "text" or "vision"; with `num_hidden_layers` alone None means
    all. Of an encoder and a decoder, the one that gets layers."""
    initialisation: Literal["fpi", "aki"] = "aki"
    """Where further output units come from: copies in the same layer, or the layer above."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random maps."""


def plan_bert2bert(model: PreTrainedModel, settings: Bert2Bert) -> Plan:
    """Plan a wider and deeper model; weights are not needed.

    Raises:
        PlanError: an unknown architecture, a target that is smaller than the model, heads that do not go together, a
            tied head without a norm that could take up the copies, or nothing to grow.
    """
    body = anatomy(model, part=settings.part)
    refuse_idle_part(body, settings.part, deeper=settings.num_hidden_layers is not None)
    sizes = settings.sizes(body)
    stacks = [(stack, depth(model, stack)) for stack in chosen_stacks(body, settings.part)]
    deeper = {stack.path: layers for stack, layers in stacks if settings.num_hidden_layers not in (None, layers)}
    if not deeper:
        refuse_unchanged(body, sizes)
    edits: list[Edit] = []
    promise: Promise = "exact"
    aki = settings.initialisation == "aki"
    if sizes != body.sizes:
        widened = widen(body, _random_maps(body, sizes, settings.seed), approximate=True, from_above=aki)
        promise = "none" if aki else widened.promise
        edits += widened.edits
    for stack, layers in stacks:
        if stack.path in deeper:
            assert settings.num_hidden_layers is not None
            edits += arrange(model, body, stack, stacked_order(layers, settings.num_hidden_layers))
            promise = "none"
    return Plan(
        method="bert2bert",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise=promise,
        seed=settings.seed,
        edits=edits,
        made_for=config_values(model.config),
    )


def _random_maps(body: Anatomy, sizes: Sizes, seed: int) -> Widening:
    """Every stream's old units and then draws from them; heads by whole groups."""
    draw = random.Random(seed)

    def random_map(old: int, new: int) -> StreamMap:
        return drawn(old, new, [draw.randrange(old) for _ in range(new - old)])

    def heads(old: Sizes, new: Sizes) -> tuple[StreamMap, ...]:
        whole = new.query_heads == new.key_value_heads * (old.query_heads // old.key_value_heads)
        added = new.key_value_heads - old.key_value_heads
        chosen = [draw.randrange(old.key_value_heads) for _ in range(added)] if whole else []
        return head_maps(old, new.query_heads, new.key_value_heads, chosen)

    old = body.sizes
    residual = random_map(old.residual, sizes.residual)
    query, key_value = heads(old, sizes)
    feed_forward = feed_forward_maps(old, sizes, random_map)
    scoped = scoped_maps(old, sizes, random_map, heads)
    return Widening(residual, query, key_value, feed_forward, sizes.head_dim, scoped=scoped)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    body, chosen = example_tower(model)
    settings: dict[str, Any] = {**chosen, "initialisation": "fpi"}
    if can_deepen(body):
        settings = {**chosen, "num_hidden_layers": 2 * deepest(model, body)}
    if body.residual_stays or (body.tied and body.final_norm is None):
        return settings
    return {**settings, "hidden_size": 2 * body.sizes.residual}


METHOD = Method(
    name="bert2bert",
    title="bert2BERT: random maps on all streams, further units from the layer above, stacking",
    paper="arXiv 2110.07143",
    intent="grow",
    settings=Bert2Bert,
    plan=from_model(plan_bert2bert),
    examples=_examples,
    promise="fpi: exact where the hidden size stays, else approximate; aki or deeper: none",
)
