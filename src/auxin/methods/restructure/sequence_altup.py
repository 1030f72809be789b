"""Sequence-AltUp: layers that run on every k-th token, the others predicted and corrected (arXiv 2301.13310).

The layers between the first and the last get a stride along the sequence (see `auxin.nn.sequence_altup`): their linear
parts cost 1/k of what they did, their attention 1/k^2, for 3 parameters each. In the paper these are the layers of a
T5's encoder, with k = 4; decoders can have it too. They keep keys and values of anchors only, in a cache that can't be
cropped, so that no assistant model can speed them up. Two baselines of the paper are modes: "skip" (stride-and-skip)
and "pool" (average pooling, in encoders).

Nothing is promised, as no conversion can be exact for k > 1: within such a layer a token that is no anchor is attended
to by none and is given no update of its own, whatever a1, a2 and b are. They start at a1 = 1, a2 = 0, b = 1: every
token gets what the layer adds to its anchor. Training has to follow.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator
from torch import nn
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan, ZeroFill
from auxin.edits.kinds.fills import Fill
from auxin.edits.kinds.module_edits import ReplaceModule
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.scoped_config import config_at
from auxin.nn.bricks import Brick
from auxin.nn.sequence_altup import Mode, SequenceAltUpLayer, is_causal
from auxin.nn.strided import argument_names
from auxin.planning.bench import from_model
from auxin.planning.depth import chosen_stacks, depth, refuse_unknown_layers
from auxin.planning.method import Method
from auxin.planning.width_targets import refuse_stages, refuse_without_tower
from auxin.settings import Settings
from auxin.words.anatomy import LayerStack


class SequenceAltUpSettings(Settings):
    """Which layers get a stride, how large it is, and what becomes of the tokens between."""

    stride: int = Field(default=4, ge=2)
    """k: the layers run on every k-th token. Of sequences shorter than that they would see one token."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """The layers, counted from 0. None: all but the first and the last."""
    part: str | None = None
    """"encoder" or "decoder": whose layers. None: the encoder's, where a model has both."""
    mode: Mode = "altup"
    """"altup": tokens between are predicted and corrected; "skip": they pass as they are; "pool": the layer runs on the
    mean of k tokens, and all of them get the result (encoders only)."""

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError("a layer is named twice. Name each once")
        return layers


def plan_sequence_altup(model: PreTrainedModel, settings: SequenceAltUpSettings) -> Plan:
    """Plan a stride along the sequence for layers of `model`; weights are not looked at.

    Args:
        model: a known architecture, or any decoder built like Llama; also on the meta device.
        settings: how.

    Raises:
        PlanError: there are no such layers, or they can't have a stride; the message says what to ask for instead.
    """
    stack = _stack(model, settings)
    chosen = _chosen(model, stack, settings)
    _check_stride(model, stack, settings.stride)
    layers = model.get_submodule(stack.path)
    assert isinstance(layers, nn.ModuleList)
    for number in chosen:
        _check_layer(f"{stack.path}.{number}", layers[number], settings, stack.causal)
    values: dict[str, Any] = {"stride": settings.stride}
    fills: dict[str, Fill] = {}
    if settings.mode == "altup":
        fills = {"sequence_altup.deviations": ZeroFill()}
    else:
        values["mode"] = settings.mode
    edits: list[Edit] = [
        ReplaceModule(module=f"{stack.path}.{number}", brick="sequence_altup_layer", settings=values, fills=fills)
        for number in chosen
    ]
    return Plan(
        method="sequence-altup",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="none",
        edits=edits,
        notes=_notes(model, [layers[number] for number in chosen]),
        made_for=config_values(model.config),
    )


def _stack(model: PreTrainedModel, settings: SequenceAltUpSettings) -> LayerStack:
    body = anatomy(model, complete=False, part=settings.part)
    refuse_without_tower(body)
    refuse_stages(body)
    part = settings.part
    if part is None and len(body.stacks) > 1:
        part = "encoder"
    return chosen_stacks(body, part)[0]


def _chosen(model: PreTrainedModel, stack: LayerStack, settings: SequenceAltUpSettings) -> list[int]:
    """The layers that get a stride, in order."""
    count = depth(model, stack)
    if settings.layers is None:
        if count < 3:
            raise PlanError(
                f"{stack.path} has {count} layer(s) and none between the first and the last, which keep all tokens. "
                "Name the layers that shall have a stride: layers = [1], say."
            )
        return list(range(1, count - 1))
    refuse_unknown_layers(settings.layers, stack, count)
    if 0 in settings.layers and "position_bias" in argument_names(model.get_submodule(f"{stack.path}.0")):
        raise PlanError(
            f"layers = {settings.layers}: layer 0 of {stack.path} works out the position bias for all layers and must "
            "see all tokens for that. Begin with layer 1."
        )
    return sorted(settings.layers)


def _check_stride(model: PreTrainedModel, stack: LayerStack, stride: int) -> None:
    positions = _positions(model, stack)
    if positions is not None and stride > positions:
        raise PlanError(
            f"stride = {stride} is longer than any sequence of this model, which has at most {positions} tokens. Ask "
            f"for {positions} or less; the paper has 4."
        )


def _positions(model: PreTrainedModel, stack: LayerStack) -> int | None:
    """The tokens of the longest sequence in a stack; None where the config has no bound."""
    config: Any = config_at(model, stack.path)
    if hasattr(config, "patch_size") and hasattr(config, "image_size"):
        sizes = (config.image_size, config.patch_size)
        image, patch = (size if isinstance(size, Sequence) else (size, size) for size in sizes)
        return 1 + (image[0] // patch[0]) * (image[1] // patch[1])
    return getattr(config, "max_position_embeddings", None)


def _check_layer(path: str, layer: nn.Module, settings: SequenceAltUpSettings, causal: bool) -> None:
    if isinstance(layer, Brick) and layer.residual_blocks() is not None:
        raise PlanError(
            f"{path} has alternating updates, whose blocks are no tokens and can't be strided. Give the model its "
            "stride first and apply altup to the result."
        )
    if table := next((name for name, _ in layer.named_parameters() if name.endswith("position_bias_table")), None):
        raise PlanError(
            f"{path} adds biases by the distance of tokens ({table}) for all patches of an image, whatever it is "
            "given, and can't run on some of them. Name other layers, or use a model with one bias for all layers."
        )
    if isinstance(layer, SequenceAltUpLayer):
        raise PlanError(
            f"{path} has a stride of {layer.sequence_altup.stride} already. Name other layers, or start from the model "
            "before."
        )
    if settings.mode == "pool" and (causal or is_causal(layer)):
        raise PlanError(
            f"mode = pool: {path} is causal, and the mean of {settings.stride} tokens would tell each of them about "
            "later ones. Ask for altup or skip."
        )


def _notes(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[str]:
    notes = []
    # As transformers' models with experts call their modules of all experts.
    has_experts = any(name.endswith("experts") for layer in layers for name, _ in layer.named_modules())
    if has_experts and hasattr(model.config, "output_router_logits"):
        notes.append(
            "The loss that balances experts (output_router_logits) sees what routers say of anchors only, and "
            "transformers can't tell which rows of an attention mask are theirs: give none beside it."
        )
    return notes


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    towers = anatomy(model, complete=False).towers
    return {"layers": [1], "stride": 2, **({"part": towers[0]} if towers else {})}


METHOD = Method(
    name="sequence-altup",
    title="Layers that run on every k-th token, the others predicted and corrected (Sequence-AltUp)",
    paper="arXiv 2301.13310",
    intent="restructure",
    settings=SequenceAltUpSettings,
    plan=from_model(plan_sequence_altup),
    examples=_examples,
    promise="none; no choice of its parameters keeps the function",
)
