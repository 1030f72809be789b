"""AltUp: a residual stream of K blocks at the cost of one (alternating updates, arXiv 2301.13310).

The stream becomes K times as wide; every layer computes on one block of the old width, and a K x K mixing with K gains
predicts and corrects the others (see `auxin.nn.altup_updates`). Blocks take turns (layer l computes on block l mod K)
or one is always computed. A layer is a black box to this, so that norms before or after, experts, parameter tokens and
cross-attention need nothing special. K^2 + K parameters per layer, 0.05% more products at a width of 1,024; the streams
need K times the memory between layers.

How a model becomes one is a matter of exact conversions. With p = I and g = 1 each:

| conversion | embedding of the other blocks | who reads the last stream | selection | exact since |
|---|---|---|---|---|
| recycled | none: replicated | their mean, then all as it was | any | blocks stay equal |
| copies | copies | W/K on each block; tied: all by the table, scaled by 1/K | any | blocks stay equal |
| free | random | W on block 0, zeros on the others | same | block 0 is the old stream |
| relay | random | W on the block that comes next, zeros on the others | alternating | p hands the old stream on |
| zeros | zeros, and g = 0 for them | W on block 0, random on the others | same | the other blocks stay zero |

"random" is for pretraining: random tables and readers, no promise. Recycled-AltUp adds no embedding; the others have a
table K times as wide (K V d), a norm over each block and a head of K V d. The encoder of a T5 hands all its blocks to
the cross-attention, whose keys and values read K d. What is no table (BERT's and ViT's embeddings) stands K times side
by side.

Departures and choices. The paper does not say how p and g start; N(0, 1) is much worse than the identity. It sums the
blocks of Recycled-AltUp, which changes what the last norm sees by its epsilon (collapse = "sum" does it: a relative
change of eps / 2m (1 - 1/K^2), m the mean square of the stream); the mean is exact. Coefficients "dynamic" are
Gemma 3n's: from each token. Its random projections of the embedding, its per-layer inputs and its scale are not there.

A wider table and head help by themselves. Two controls tell that from alternating updates: coefficients = "none" lets
the other blocks pass from the embedding straight to the head, and control = "sum" adds the blocks of the table up
before the first layer.
"""

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.edits import ConstantFill, Edit, NormalFill, Plan, Promise, ZeroFill
from auxin.edits.kinds.fills import Fill, ValuesFill
from auxin.edits.kinds.module_edits import ReplaceModule
from auxin.edits.kinds.parameter_edits import generator
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.altup_layer import AltUpLayer, Coefficients
from auxin.nn.bricks import Brick
from auxin.planning.bench import from_model
from auxin.planning.depth import chosen_stacks, depth
from auxin.planning.method import Method
from auxin.planning.wide_stream import WideConversion, WideStream
from auxin.planning.width_targets import refuse_stages, refuse_without_tower
from auxin.settings import Settings
from auxin.words.anatomy import Anatomy, LayerStack

Conversion = Literal["recycled", WideConversion]
Selection = Literal["alternating", "same"]

SELECTIONS: dict[Conversion, tuple[Selection, ...]] = {
    "recycled": ("alternating", "same"),
    "copies": ("alternating", "same"),
    "free": ("same",),
    "relay": ("alternating",),
    "zeros": ("same",),
    "random": ("alternating", "same"),
}
"""The selections with which each conversion is exact, the default first."""
NOISY = ("recycled", "copies", "random")
"""The conversions that stay exact when the mixing starts with noise whose rows sum to zero (or promise nothing)."""


class AltUpSettings(Settings):
    """How many blocks, how they take turns, and how the model becomes one with them."""

    blocks: int = Field(default=2, ge=2, le=16)
    """K: the stream becomes so many times as wide."""
    conversion: Conversion = "recycled"
    """Where the other blocks come from, and what of the last stream is read: "recycled" (the stream is replicated; the
    mean of the blocks), "copies" (of the embedding; all blocks, in equal shares), "free" (random; block 0 alone),
    "relay" (random; the block that comes next), "zeros" (zeros; block 0, the others by random weights) or "random" (no
    promise: to pretrain from scratch)."""
    selection: Selection | None = None
    """"alternating": layer l computes on block l mod K; "same": always on block 0. None: alternating where the
    conversion allows it."""
    coefficients: Coefficients = "static"
    """Of mixing and gains: "static" (the paper: K K + K numbers per layer), "dynamic" (Gemma 3n: from each token) or
    "none" (a control: the other blocks go from the embedding straight to the head; with "random" and "same")."""
    control: Literal["sum"] | None = None
    """"sum", with "random": no wider stream, the blocks of the table are added up before the first layer."""
    collapse: Literal["mean", "sum"] = "mean"
    """Of a recycled stream after the last layer; the paper's sum is exact up to the last norm's epsilon only."""
    norm: Literal["blocks", "all"] = "blocks"
    """Of a wide stream after the last layer: statistics for each block, or one for all entries (with "copies" and
    "zeros" only, where that is exact)."""
    noise: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    """Standard deviation of noise on the mixing, each row summing to zero, and with "copies" of noise on the readers,
    relative to them, summing to zero over the blocks: parts blocks that would stay equal for ever."""
    part: str | None = None
    """"encoder" or "decoder", with "recycled": only its layers. Of a model of several towers ("text" or "vision") the
    one that is meant. None: all."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything that is random."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.selection is not None and self.selection not in (able := SELECTIONS[self.conversion]):
            raise ValueError(
                f"selection: {self.conversion!r} is exact only with {able[0]!r}, given {self.selection!r}. Leave it "
                "out, or choose the conversion copies, which goes with both"
            )
        if self.collapse == "sum" and self.conversion != "recycled":
            raise ValueError("collapse: only a recycled stream is summed up; leave it out")
        if self.norm == "all" and self.conversion not in ("copies", "zeros", "random"):
            raise ValueError(f"norm: 'all' would mix the blocks, which {self.conversion!r} keeps apart; leave it out")
        if self.noise and self.conversion not in NOISY:
            raise ValueError(
                f"noise: {self.conversion!r} is exact without it, and its blocks differ anyhow; leave it out"
            )
        if self.coefficients == "dynamic" and self.conversion in ("relay", "zeros"):
            raise ValueError(
                f"coefficients: {self.conversion!r} needs mixing or gains that dynamic ones don't start with; choose "
                "static, or another conversion"
            )
        if self.coefficients == "none" and (self.conversion, self.selection) != ("random", "same"):
            raise ValueError("coefficients: 'none' is a control for conversion = random with selection = same")
        if self.control is not None and (self.conversion, self.coefficients) != ("random", "static"):
            raise ValueError("control: 'sum' goes with conversion = random alone; leave the other settings out")
        return self

    @property
    def chosen_selection(self) -> Selection:
        """The selection asked for, or the conversion's default."""
        return self.selection or SELECTIONS[self.conversion][0]


def plan_altup(model: PreTrainedModel, settings: AltUpSettings) -> Plan:
    """Plan alternating updates for the layers of `model`; weights are not looked at.

    Args:
        model: a known architecture, or any decoder built like Llama; also on the meta device.
        settings: how.

    Raises:
        PlanError: the architecture has no residual stream that is known, has AltUp already, or the conversion's
            conditions do not hold; the message says what to ask for instead.
    """
    if hasattr(model, "peft_config"):
        raise PlanError(
            "The model carries PEFT adapters. Merge or remove them (merge_and_unload) before its stream is widened."
        )
    body = anatomy(model, complete=False, part=settings.part)
    refuse_stages(body)
    _check_part(body, settings)
    if twice := next((name for name, module in model.named_modules() if isinstance(module, AltUpLayer)), None):
        raise PlanError(
            f"{twice} has alternating updates already, and blocks can't be added to them. Start from the model before."
        )
    stacks = chosen_stacks(body, settings.part)
    edits: list[Edit] = []
    notes: list[str] = []
    for stack in stacks:
        _check_entry(settings, stack)
    if settings.control == "sum":
        edits += [
            ReplaceModule(module=f"{stack.path}.0", brick="summed_input", settings={"blocks": settings.blocks})
            for stack in stacks
        ]
        return _plan(model, settings, "none", [*edits, *_wide_stream(model, body, settings).summed()], [])
    for stack in stacks:
        layers = depth(model, stack)
        _check_blocks(model, settings, stack, layers)
        edits += _layers(body, stack, layers, settings)
        notes += _notes(settings, stack, layers)
        if settings.conversion == "recycled":
            edits.append(_collapse(stack, settings))
    if settings.conversion != "recycled":
        edits += _wide_stream(model, body, settings).edits()
    promise: Promise = "none" if settings.conversion == "random" else "exact"
    if settings.collapse == "sum":
        promise = "approximate"
    return _plan(model, settings, promise, edits, notes)


def active_blocks(settings: AltUpSettings, layers: int) -> list[int]:
    """The block that each of `layers` layers computes on. It is written into the model layer by layer, so that later
    edits of the depth don't deal the blocks out anew."""
    return [layer % settings.blocks if settings.chosen_selection == "alternating" else 0 for layer in range(layers)]


def twins(settings: AltUpSettings, layers: int) -> list[int]:
    """The blocks that stay equal to each other for ever; empty where there are none.

    Blocks that start equal are told apart only by being computed: whatever happens to one that never is happens to
    every other such one, gradients included. Noise, or contents or readers of their own, part them.
    """
    if settings.noise or settings.conversion not in ("recycled", "copies"):
        return []
    never = sorted(set(range(settings.blocks)) - set(active_blocks(settings, layers)))
    return never if len(never) > 1 else []


def _plan(
    model: PreTrainedModel, settings: AltUpSettings, promise: Promise, edits: list[Edit], notes: list[str]
) -> Plan:
    return Plan(
        method="altup",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise=promise,
        seed=settings.seed,
        edits=edits,
        notes=notes,
        made_for=config_values(model.config),
    )


def _check_entry(settings: AltUpSettings, stack: LayerStack) -> None:
    if stack.reader_of_entry and settings.conversion != "recycled":
        raise PlanError(
            f"conversion = {settings.conversion}: {stack.reader_of_entry} reads what enters the first layer of "
            f"{stack.path}, one block of it, and would get {settings.blocks}. Ask for the conversion recycled."
        )


def _check_part(body: Anatomy, settings: AltUpSettings) -> None:
    stacks = chosen_stacks(body, settings.part)
    wide = settings.conversion != "recycled"
    if wide and settings.part is not None and not all(stack.tower for stack in stacks):
        raise PlanError("part: a wide embedding enters every stack; leave part out, or choose recycled.")
    if wide or settings.coefficients == "dynamic":
        refuse_without_tower(body)


def _check_blocks(model: PreTrainedModel, settings: AltUpSettings, stack: LayerStack, layers: int) -> None:
    if settings.chosen_selection == "alternating" and settings.blocks > layers:
        fewer = f"Ask for at most {layers}, or for" if layers > 1 else "Ask for"
        raise PlanError(
            f"blocks = {settings.blocks} can't alternate over the {layers} layer(s) of {stack.path}: some would never "
            f"be computed. {fewer} selection = same."
        )
    places = {stack.end, *(f"{stack.path}.{layer}" for layer in range(layers))}
    bricks = [module for path, module in model.named_modules() if path in places and isinstance(module, Brick)]
    if brick := next((brick for brick in bricks if brick.temporary is not None), None):
        raise PlanError(
            f"{stack.path}: layers, or the norm behind them, have {brick.temporary}, with which the updates would go. "
            f"Before these are put there, {brick.plain_form}."
        )
    if stack.end == "":
        raise PlanError(f"{stack.path}: it is not known what follows its last layer, where the blocks would go.")


def _notes(settings: AltUpSettings, stack: LayerStack, layers: int) -> Iterator[str]:
    if equal := twins(settings, layers):
        named = ", ".join(map(str, equal))
        yield (
            f"The blocks {named} of {stack.path} start equal and are never computed, so that training keeps them equal "
            "and only one of them counts. Set noise (0.01, say), or let the blocks alternate."
        )
    if settings.chosen_selection == "alternating" and layers % settings.blocks:
        yield (
            f"{stack.path} has {layers} layers, no multiple of {settings.blocks} blocks: some blocks are computed once "
            "more than others."
        )
    if settings.collapse == "sum":
        yield (
            f"The sum of {settings.blocks} blocks is {settings.blocks} times the old stream, which the last norm takes "
            "back up to its epsilon; the mean is exact."
        )


def _layers(body: Anatomy, stack: LayerStack, layers: int, settings: AltUpSettings) -> Iterator[Edit]:
    """The updates of all layers, one edit for all where they are alike."""
    active = active_blocks(settings, layers)
    alike = settings.chosen_selection == "same" and not settings.noise
    for layer in range(1 if alike else layers):
        values: dict[str, Any] = {"blocks": settings.blocks, "active": active[layer]}
        if settings.conversion != "recycled":
            values["split"] = True
        if settings.coefficients != "static":
            values["coefficients"] = settings.coefficients
        if settings.conversion != "recycled" or settings.coefficients != "static":
            values["hidden_size"] = body.sizes.residual
        path = f"{stack.path}.{'*' if alike else layer}"
        fills = {f"altup.{name}": fill for name, fill in _coefficients(settings, path, active[layer]).items()}
        yield ReplaceModule(module=path, brick="altup_layer", settings=values, fills=fills)


def _coefficients(settings: AltUpSettings, path: str, active: int) -> dict[str, Fill]:
    """Where mixing and gains of one layer start, as deviations from the identity."""
    blocks = settings.blocks
    noise: Fill = ZeroFill()
    if settings.noise:
        count = blocks if settings.coefficients == "dynamic" else 1
        noise = ValuesFill(values=_zero_sums(settings, path, count))
    if settings.coefficients == "none":
        return {}
    if settings.coefficients == "dynamic":
        return {
            "router_norm.weight": ConstantFill(value=1.0),
            "router.weight": NormalFill(std=0.02),
            "prediction.weight": noise,
            "correction.weight": ZeroFill(),
        }
    correction: Fill = ZeroFill()
    if settings.conversion == "relay":
        # The block that is computed next is predicted as this one is, so that its correction makes it the output.
        mixing = torch.zeros(blocks, blocks, dtype=torch.float64)
        following = (active + 1) % blocks
        mixing[following, following], mixing[following, active] = -1.0, 1.0
        noise = ValuesFill(values=mixing.flatten().tolist())
    elif settings.conversion == "zeros":
        correction = ValuesFill(values=[0.0 if block == active else -1.0 for block in range(blocks)])
    return {"prediction": noise, "correction": correction}


def _zero_sums(settings: AltUpSettings, path: str, count: int) -> list[float]:
    """Noise (K, K, count) whose sums over the second axis are zero in any data type: numbers in pairs of both signs."""
    blocks, random = settings.blocks, generator(settings.seed, path, ())
    noise = torch.zeros(blocks, blocks, count)
    for row in range(blocks):
        for column in range(count):
            order = torch.randperm(blocks, generator=random)
            values = settings.noise * torch.randn(blocks // 2, generator=random)
            noise[row, order[0 : 2 * len(values) : 2], column] = values
            noise[row, order[1 : 2 * len(values) : 2], column] = -values
    return noise.flatten().tolist()


def _wide_stream(model: PreTrainedModel, body: Anatomy, settings: AltUpSettings) -> WideStream:
    assert settings.conversion != "recycled"
    return WideStream(model, body, settings.blocks, settings.conversion, settings.norm, settings.noise)


def _collapse(stack: LayerStack, settings: AltUpSettings) -> Edit:
    """What makes one block of the stream again, behind the last layer."""
    if settings.collapse == "sum" and not stack.ends_in_norm:
        raise PlanError(
            f"collapse = sum: no norm follows the layers of {stack.path} that would take back the factor "
            f"{settings.blocks}. Ask for the mean."
        )
    brick = "collapsed_input" if stack.ends_in_norm else "collapsed_output"
    values = {} if settings.collapse == "mean" else {"collapse": settings.collapse}
    return ReplaceModule(module=stack.end, brick=brick, settings=values)


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    shallow = any(depth(model, stack) < 2 for stack in anatomy(model, complete=False).stacks)
    return {"blocks": 2, "selection": "same"} if shallow else {"blocks": 2}


METHOD = Method(
    name="altup",
    title="A residual stream of K blocks, each layer computing on one of them (AltUp)",
    paper="arXiv 2301.13310",
    intent="grow",
    settings=AltUpSettings,
    plan=from_model(plan_altup),
    examples=_examples,
    promise="exact; recycled to the last bit. Approximate for collapse = sum, none for random",
)
