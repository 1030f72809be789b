"""Depth up-scaling (SOLAR, arXiv 2312.15166, section 2), and slices of layers in any order (mergekit's passthrough).

SOLAR puts two copies of a model of n layers on top of each other and leaves out the m layers at the seam of each:
layers 0..n-m-1, then m..n-1, which are 2(n - m) layers. Its paper has n = 32, m = 8 and 48 layers. Leaving layers out
makes the jump from layer n-m-1 to layer m at the seam shorter, but the function is another one; continued training
mends it.

`slices` says the same as mergekit's ranges, ends excluded: [[0, 24], [8, 32]] is SOLAR, and a slice {"layers": [8, 32],
"scale": 0.5} multiplies what its layers add to the residual by 0.5. The promise is `exact` when the slices of scale 0
are the only ones that are added, and `none` otherwise.
"""

from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.layout import layer_stacks
from auxin.planning.bench import from_model
from auxin.planning.depth import arrange, depth, is_exact, naming_parts, stacks_to_deepen
from auxin.planning.method import Method
from auxin.settings import Settings
from auxin.words.anatomy import LayerStack


class Slice(Settings):
    """A range of old layers; a pair of numbers is short for one of scale 1."""

    layers: tuple[int, int]
    """First layer and the one after the last."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of what these layers add to the residual; 0 makes them identity blocks."""

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, values: Any) -> Any:
        return {"layers": values} if isinstance(values, list | tuple) else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, end = self.layers
        if not 0 <= first < end:
            raise ValueError(f"layers [{first}, {end}] is no range: it needs 0 <= first < end, the end excluded.")
        return self


class DepthUpscaling(Settings):
    """Which layers follow each other; give one of `dropped`, `layers` and `slices`."""

    dropped: int | None = Field(default=None, ge=0)
    """Layers left out of each copy at the seam (m); the paper has 8 of 32."""
    layers: int | None = Field(default=None, gt=0)
    """Number of layers after the growth, 2(n - m), instead of m."""
    slices: list[Slice] | None = Field(default=None, min_length=1)
    """Ranges of old layers, bottom first, ends excluded, for example [[0, 24], [8, 32]]; they may overlap."""
    part: str | None = None
    """Of a model with an encoder and a decoder, the one to grow; None grows both."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("dropped", "layers", "slices") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of dropped, layers and slices, not {' and '.join(given) or 'none of them'}."
            )
        return self


def plan_depth_upscaling(model: PreTrainedModel, settings: DepthUpscaling) -> Plan:
    """Plan a model of slices of layers; weights are not needed.

    Raises:
        PlanError: no stack of layers is found, slices beyond its layers, a number of layers that two copies can't give,
            an order that no config can say, or a slice of scale 0 in a post-norm architecture.
    """
    body, stacks = stacks_to_deepen(model, settings.part)
    edits: list[Edit] = []
    exact = True
    with naming_parts(stacks, settings.part):
        slices_of = [_slices(settings, depth(model, stack), stack) for stack in stacks]
    for stack, slices in zip(stacks, slices_of, strict=True):
        old = depth(model, stack)
        order = [layer for piece in slices for layer in range(*piece.layers)]
        scales = [piece.scale for piece in slices for _ in range(*piece.layers)]
        if order == list(range(old)) and set(scales) == {1.0}:
            raise PlanError(f"{stack.path}: these slices are the {old} layers that the model has. Ask for others.")
        others = {index: scale for index, scale in enumerate(scales) if scale != 1}
        added = {index for index, scale in others.items() if scale == 0}
        keeps = is_exact(order, added, old) and added == set(others)
        exact = exact and keeps
        edits += arrange(model, body, stack, order, others, exact=keeps)
    return Plan(
        method="solar",
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact" if exact else "none",
        edits=edits,
        made_for=config_values(model.config),
    )


def _slices(settings: DepthUpscaling, layers: int, stack: LayerStack) -> list[Slice]:
    if settings.slices is not None:
        for piece in settings.slices:
            if piece.layers[1] > layers:
                raise PlanError(
                    f"slices: layers {list(piece.layers)} end beyond the {layers} layers of {stack.path}. The last "
                    f"possible end is {layers}."
                )
        return settings.slices
    dropped = settings.dropped if settings.layers is None else _dropped(settings.layers, layers, stack)
    assert dropped is not None
    most = (layers - 1) // 2
    if dropped > most:
        raise PlanError(
            f"dropped = {dropped} of the {layers} layers of {stack.path} leaves 2 x ({layers} - {dropped}) = "
            f"{2 * (layers - dropped)} layers, which is no growth. Drop at most {most}."
        )
    return [Slice(layers=(0, layers - dropped)), Slice(layers=(dropped, layers))]


def _dropped(wanted: int, layers: int, stack: LayerStack) -> int:
    """m for a target number of layers, 2(n - m)."""
    least, most = 2 * (layers // 2 + 1), 2 * layers
    if wanted % 2 or not least <= wanted <= most:
        near = min(range(least, most + 1, 2), key=lambda target: (abs(target - wanted), -target))
        raise PlanError(
            f"layers = {wanted}: two copies of the {layers} layers of {stack.path}, the same number left out of each, "
            f"give {f'an even number from {least} to ' if least < most else ''}{most}. The nearest possible is {near}; "
            "slices can say any other."
        )
    return layers - wanted // 2


def _examples(model: PreTrainedModel) -> dict[str, Any]:
    return {"dropped": min(depth(model, stack) for stack in layer_stacks(model)) // 4}


METHOD = Method(
    name="solar",
    title="Deeper by two copies without the layers at their seam, or by any slices (SOLAR, passthrough merges)",
    paper="arXiv 2312.15166",
    intent="grow",
    settings=DepthUpscaling,
    plan=from_model(plan_depth_upscaling),
    examples=_examples,
    promise="none; exact only for slices that add nothing but layers of scale 0",
)
