"""Factors on the outputs of linear layers: a brick and its method for Auxin, in a package of its own.

y = s * (W x + b), one factor for each output, 1 at first: a way to adapt a model by few numbers, in the manner of
(IA)^3 (arXiv 2205.05638), whose factors lie on keys, on values and inside the feed-forward part. It can be merged back,
into diag(s) W and s b.
"""

from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxin.edits import Plan, ReplaceModule
from auxin.edits.structure import config_values
from auxin.errors import ConfigError, PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import Brick, Making, Roles, Shapes, Tensors, brick
from auxin.planning.bench import from_model
from auxin.planning.method import Method
from auxin.settings import Settings

AXES = {nn.Linear: 0, Conv1D: 1}
"""Which axis of its weight is a layer's output."""


class ScaleMaking(Making):
    """One factor per output, and back into the layer. `axis` is that of the weight's outputs."""

    def shapes(self, old: Shapes, axis: int = 0) -> Shapes:
        return {"scale": (old["weight"][axis],)}

    def values(self, old: Tensors, draw: torch.Generator, axis: int = 0) -> dict[str, Tensor]:
        return {"scale": old["weight"].new_ones(old["weight"].shape[axis])}

    def back(self, new: Tensors, axis: int = 0) -> dict[str, Tensor]:
        scale = new["scale"]
        merged = {"weight": new["weight"] * (scale[:, None] if axis == 0 else scale)}
        return merged | ({"bias": new["bias"] * scale} if "bias" in new else {})


@brick("channel_scale")
class ChannelScale(Brick):
    """A Linear or Conv1D whose outputs have factors: `weight` and `bias` as they were, `scale` (outputs,).

    What multiplies its result is what multiplied the layer's, so that `scaled` is what it is for any brick.
    """

    making = ScaleMaking()
    plain_form = "merge it back, into diag(scale) weight and scale * bias"

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: int) -> None:
        super().__init__()
        self.axis, self.weight, self.bias = axis, weight, bias
        self.scale = nn.Parameter(weight.new_ones(weight.shape[axis]))

    @classmethod
    def replacing(cls, module: nn.Module, axis: int = 0) -> Self:
        if AXES.get(type(module)) != axis:
            raise ConfigError(f"channel_scale: a {type(module).__name__} has no outputs on axis {axis} of its weight.")
        return cls(module.weight, module.bias, axis)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.axis == 0 else self.weight.T, self.bias) * self.scale

    def roles(self, replaced: Roles) -> Roles:
        return {"scale": replaced["weight"].vector(self.axis, "scale")} if "weight" in replaced else {}


class ChannelScaling(Settings):
    """Which layers get factors."""

    streams: list[Literal["residual", "query", "key_value", "ffn"]] = Field(["key_value", "ffn"], min_length=1)
    """What the layers write: keys and values of heads, units of the feed-forward part, queries, or the residual."""


def plan_channel_scaling(model: PreTrainedModel, settings: ChannelScaling) -> Plan:
    """Plan factors on the outputs of the layers that write `settings.streams`; weights are not needed.

    Raises:
        PlanError: an unknown architecture, or no such layer, or all of them have factors already.
    """
    body, layers = anatomy(model), dict[str, int]()
    for name, _ in model.named_parameters():
        path, _, kind = name.rpartition(".")
        axis, role = AXES.get(type(model.get_submodule(path))), body.role(name)
        if axis is not None and kind == "weight" and any(part.stream in settings.streams for part in role.axes[axis]):
            layers[role.pattern.removesuffix(".weight")] = axis
    if not layers:
        raise PlanError(f"No linear layer without factors writes {' or '.join(settings.streams)}. Name other streams.")
    edits = [
        ReplaceModule(module=path, brick="channel_scale", settings={"axis": axis} if axis else {})
        for path, axis in layers.items()
    ]
    chosen: dict[str, Any] = settings.model_dump(mode="json", exclude_defaults=True)
    made_for = config_values(model.config)
    return Plan(method="channel-scale", settings=chosen, promise="exact", edits=edits, made_for=made_for)


METHOD = Method(
    name="channel-scale",
    title="Factors on what linear layers give, one per output, that merge back into them",
    paper="after arXiv 2205.05638",
    intent="adapt",
    settings=ChannelScaling,
    plan=from_model(plan_channel_scaling),
    examples=lambda model: {},
    promise="exact",
)
