"""LEMON: lossless expansion to any width and depth (Wang et al., ICLR 2024, arXiv 2310.07999).

With k = floor(d'/d) the residual becomes k copies and the rest padding: its mean for LayerNorm, zeros for RMSNorm. The
norm then divides by a standard deviation that is eta = sqrt(k d / d') times the old one, so that gains are multiplied
by eta and epsilon by eta^2; what is normed is zero in the padding, whose readers are therefore free and start random.
Heads and feed-forward units are repeated in a circle. The shares of the copies are split unevenly (W = sum of W^(c)),
here by noise around the equal shares, which the paper calls "projection" with random W~ as large as the weights; copies
that are read equally would stay equal for ever. New blocks have an output of zero.

Post-norm architectures pass whole copies only. The paper keeps the learning rate of training from scratch and decays it
faster.
"""

from typing import Any

from pydantic import Field
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.models.anatomy import anatomy
from auxin.planning.bench import from_model
from auxin.planning.depth import deepest, identity_blocks
from auxin.planning.method import Method
from auxin.planning.width import widen
from auxin.planning.width_conditions import takes_padding
from auxin.planning.width_maps import Padding, Widening, circular, feed_forward_maps, head_maps, padded, scoped_maps
from auxin.planning.width_targets import (
    WidthTargets,
    example_tower,
    feed_forward_settings,
    refuse_idle_part,
    refuse_unchanged,
)
from auxin.words.anatomy import Anatomy


class Lemon(WidthTargets):
    """The widths and the depth after the growth; what is not given stays."""

    num_hidden_layers: int | None = Field(default=None, gt=0)
    """Layers; of an encoder and a decoder, of each."""
    part: str | None = None
    """Of a model of several towers, the one that grows: "text" or "vision"; with `num_hidden_layers` alone None means
    all. Of an encoder and a decoder, the one that gets layers."""
    padding: Padding | None = None
    """What the residual's padding holds: "mean" or "zeros"; None is what the norm asks for. A LayerNorm takes zeros too
    when the head is not tied: the mean of all that is written into the residual is then taken off first."""
    split_noise: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How unevenly the copies share: the noise around the equal shares, relative to their root mean square. It sums to
    zero over the copies of a unit."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the uneven split and of the padding's readers."""


def plan_lemon(model: PreTrainedModel, settings: Lemon) -> Plan:
    """Plan a lossless expansion; weights are not needed.

    Raises:
        PlanError: an unknown architecture, a target that is smaller than the model, a hidden size that the norms do not
            take, heads that do not go together, identity blocks in a post-norm architecture, or nothing to grow.
    """
    body = anatomy(model, part=settings.part)
    layers = settings.num_hidden_layers
    refuse_idle_part(body, settings.part, deeper=layers is not None)
    sizes = settings.sizes(body)
    deeper = [] if layers is None else identity_blocks(model, body, layers, settings.part)
    edits: list[Edit] = []
    if sizes != body.sizes or not deeper:
        refuse_unchanged(body, sizes)
        query, key_value = head_maps(body.sizes, sizes.query_heads, sizes.key_value_heads)
        widening = Widening(
            residual=padded(body.sizes.residual, sizes.residual),
            query=query,
            key_value=key_value,
            feed_forward=feed_forward_maps(body.sizes, sizes, circular),
            head_dim=sizes.head_dim,
            padding=settings.padding or _padding(body),
            noise=settings.split_noise,
            scoped=scoped_maps(
                body.sizes, sizes, circular, lambda old, new: head_maps(old, new.query_heads, new.key_value_heads)
            ),
        )
        edits += widen(body, widening).edits
    return Plan(
        method="lemon",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        seed=settings.seed,
        edits=[*edits, *deeper],
        made_for=config_values(model.config),
    )


def _padding(body: Anatomy) -> Padding:
    """What the norms ask for."""
    return "zeros" if body.norm == "rms" else "mean"


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    body, settings = example_tower(model)
    whole = not takes_padding(body, _padding(body))
    bound = body.fields.head_dim is None and (body.qk_norm == "all_heads" or body.grouped)
    hidden = 2 * body.sizes.residual if whole or bound else body.sizes.residual * 3 // 2
    settings |= {} if body.residual_stays and not body.residual_groups else {"hidden_size": hidden}
    settings |= feed_forward_settings(body, 1.5)
    if body.norm_position != "after_residual":
        settings["num_hidden_layers"] = deepest(model, body) + 1
    return settings


METHOD = Method(
    name="lemon",
    title="LEMON: lossless expansion to any width and depth",
    paper="arXiv 2310.07999",
    intent="grow",
    settings=Lemon,
    plan=from_model(plan_lemon),
    examples=_examples,
    promise="exact; whole copies only with post-norm or norms without gain",
)
