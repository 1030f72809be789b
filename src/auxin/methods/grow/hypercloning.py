"""HyperCloning: a model n times as wide whose streams are n equal copies (Samragh et al., arXiv 2409.12903).

| variant | matrix for n = 2 | C of a reader |
|---|---|---|
| symmetric (default) | [[W/2, W/2], [W/2, W/2]] | [I I]/2 |
| noisy | [[W/2+N, W/2-N], [W/2+M, W/2-M]], 10 dB below | the same plus noise that sums to zero |
| diagonal | [[W, 0], [0, W]] | copy j reads copy j |

All are exact, with RMSNorm and LayerNorm, gated or not, with biases, tied or not. The paper ranks symmetric and noisy
above diagonal, and leaves it to dropout to part the copies: without dropout or noise they stay equal to the last bit
for ever, so that noise should be asked for where there is no dropout. With plain rates Adam moves the function n times
too far at first; the receipt says so, and `continue_exactly` has the rates that do not.
"""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.planning.bench import from_model
from auxin.planning.method import Method
from auxin.planning.width import diagonal_edits, widen
from auxin.planning.width_maps import StreamMap, Widening, circular, feed_forward_maps, head_maps, scoped_maps
from auxin.planning.width_targets import (
    WidthTargets,
    example_tower,
    refuse_idle_part,
    refuse_unchanged,
    refuse_without_tower,
)
from auxin.words.anatomy import Anatomy
from auxin.words.widths import FEED_FORWARD, SETTINGS, Sizes, Width


class HyperCloning(WidthTargets):
    """How wide the model shall be: a factor for everything, or widths one by one."""

    factor: int | None = Field(default=None, ge=2)
    """Every width that is not given itself becomes so many times as large; a single key-value head stays single."""
    variant: Literal["symmetric", "noisy", "diagonal"] = "symmetric"
    """How every matrix reads the equal copies: "symmetric" (all of them, in equal shares), "noisy" (the same, plus
    noise that sums to zero and parts them) or "diagonal" (each output copy reads its own)."""
    snr_db: float = Field(default=10.0, allow_inf_nan=False)
    """With "noisy": how far the noise lies below the weights, in decibels (paper: 10)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the noise."""


def plan_hypercloning(model: PreTrainedModel, settings: HyperCloning) -> Plan:
    """Plan a wider model of equal copies; weights are not needed.

    Raises:
        PlanError: an unknown architecture, a hidden size that is no whole number of copies, heads that do not go
            together; the message names the nearest possible target.
    """
    body = anatomy(model, part=settings.part)
    refuse_idle_part(body, settings.part)
    refuse_without_tower(body)
    sizes = _targets(body, settings).sizes(body, _scoped(body, settings))
    refuse_unchanged(body, sizes)
    query, key_value = _head_maps(body.sizes, sizes)
    widening = Widening(
        residual=circular(body.sizes.residual, sizes.residual),
        query=query,
        key_value=key_value,
        feed_forward=feed_forward_maps(body.sizes, sizes, circular),
        head_dim=sizes.head_dim,
        noise=10 ** (-settings.snr_db / 20) if settings.variant == "noisy" else 0.0,
        scoped=scoped_maps(body.sizes, sizes, circular, _head_maps),
    )
    edits: list[Edit] = widen(body, widening).edits
    if settings.variant == "diagonal":
        edits += _diagonal(body, widening, sizes)
    return Plan(
        method="hypercloning",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        seed=settings.seed,
        edits=edits,
        made_for=config_values(model.config),
    )


def _targets(body: Anatomy, settings: HyperCloning) -> WidthTargets:
    """The widths asked for, those that follow from the factor filled in."""
    old, factor = body.sizes, settings.factor
    wanted = settings.model_dump(include=set(WidthTargets.model_fields))
    if factor is not None:
        kept = old.key_value_heads if old.key_value_heads == 1 < old.query_heads else factor * old.key_value_heads
        multiples = {
            "hidden_size": factor * old.residual,
            "num_attention_heads": old.query_heads if body.heads_stay else factor * old.query_heads,
            "num_key_value_heads": kept if body.fields.key_value_heads else None,
            **{
                SETTINGS[stream]: factor * units
                for stream in FEED_FORWARD
                if body.fields.of(stream) and (units := old.units(stream))
            },
        }
        wanted = {name: multiples.get(name) if value is None else value for name, value in wanted.items()}
    return WidthTargets.parse(wanted)


def _scoped(body: Anatomy, settings: HyperCloning) -> list[Width] | None:
    """The widths of layers and stacks that have their own, times the factor; None: as without one."""
    factor = settings.factor
    if factor is None:
        return None
    widths = []
    for width in body.sizes.scoped:
        shared = width.stream == "key_value" and width.units == 1 < (body.sizes.units("query", width.scope) or 1)
        if not settings.gives(width.stream):
            stays = shared or width.stream == "expert"
            widths.append(replace(width, units=width.units * (1 if stays else factor)))
    return widths


def _head_maps(old: Sizes, new: Sizes) -> tuple[StreamMap, ...]:
    return head_maps(old, new.query_heads, new.key_value_heads)


def _diagonal(body: Anatomy, widening: Widening, sizes: Sizes) -> list[Edit]:
    """What makes copy j of every matrix's output read copy j of its input."""
    times = sizes.residual // body.sizes.residual
    for kind, scope, stream in widening.maps():
        if stream.index != tuple(range(stream.old)) * times:
            name = f"{scope}: {SETTINGS[kind]}" if scope else SETTINGS[kind]
            stays = (kind == "query" and body.heads_stay) or (kind == "key_value" and body.single_key_value_head)
            raise PlanError(
                f"{name} = {stream.size}: the diagonal variant needs {times} copies of everything, as of hidden_size. "
                + ("Their number can't change here; " if stays else f"Ask for {name} = {stream.old * times}, or ")
                + ("ask " if stays else "")
                + "for variant symmetric."
            )
    return diagonal_edits(body, widening)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    return {"factor": 2, "variant": "noisy", **example_tower(model)[1]}


METHOD = Method(
    name="hypercloning",
    title="HyperCloning: every stream becomes n equal copies",
    paper="arXiv 2409.12903",
    intent="grow",
    settings=HyperCloning,
    plan=from_model(plan_hypercloning),
    examples=_examples,
    promise="exact at whole multiples of the hidden size, any norm",
)
