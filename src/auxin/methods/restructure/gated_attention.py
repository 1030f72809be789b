"""Heads with a gate, so that one that wants to do nothing needs no large scores ("Quantizable Transformers: Removing
Outliers by Helping Attention Heads Do Nothing", Bondarenko et al. 2023, arXiv 2306.12929, section 4.2):

    y_h = sigmoid(G_h(x)) (P_h V_h),        x the attention's input,

with the gates of `auxin.nn.gated_attention`. A gate begins at pi whatever the input, and the matrix behind the heads is
divided by pi, its bias not: the model is what it was, to the last bit where pi is 1/2 or 1/4. Training follows, in
which gates learn from the first step on. The model's own implementation of attention stays.

Not as in the paper's code: that multiplies by 1 / pi when the model runs, draws the weights of gates, and applies the
initial value to the per-head gate alone; here all of a gate's last weights are zero and 1 / pi is in the matrix.
"""

from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.accounting import count_parameters
from auxin.edits import Edit, Plan, ReplaceModule, ScaleParameter
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.sublayers import refuse_shared
from auxin.nn.gated_attention import Gate, GatedAttention, check_gate
from auxin.planning.bench import from_model
from auxin.planning.linear_layers import merged_paths
from auxin.planning.method import Method
from auxin.planning.self_attentions import SelfAttention, self_attentions
from auxin.planning.target import removal
from auxin.settings import Settings

NAME = "gated-attention"
BRICK = GatedAttention.brick_name


class GatedAttentionSettings(Settings):
    """What the gates are, where they begin, and which layers have some."""

    gate: Gate = "all-heads"
    """"all-heads": a number for each head, of the whole input; "per-head" and "mlp": of the head's own slice of the
    input, where heads have slices (hidden_size = heads x head dimension); "elementwise": a number for every entry that
    a head gives, of the whole input."""
    opening: float = Field(default=0.5, ge=0.001, lt=1)
    """pi: where all gates begin. The paper has 0.25 for OPT. The start is exact to the last bit for 1/2 and 1/4, else
    rounded."""
    hidden: int | None = Field(default=None, gt=0)
    """Of mlp: units between its two layers; None: a fourth of the head dimension."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """The layers, from 0, whose attentions get gates; None: all."""
    part: str | None = None
    """"encoder" or "decoder", or a tower: whose layers. None: those of all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden is not None and self.gate != "mlp":
            raise ValueError(f"hidden is of gate = mlp, and the gate is {self.gate}. Leave hidden out.")
        if self.gate == "elementwise" and self.opening != 0.5:
            raise ValueError("an elementwise gate has no bias and begins at 0.5. Leave opening out.")
        return self


def plan_gated_attention(model: PreTrainedModel, settings: GatedAttentionSettings) -> Plan:
    """Plan gates on the heads; weights are not looked at.

    Raises:
        PlanError: an unknown architecture, there is no such layer, a gate does not fit its heads, or heads have gates
            already.
    """
    found = self_attentions(model, settings.part, settings.layers, BRICK)
    refuse_shared(model, [*found, *(one.output for one in found.values())])
    values = {path: _values(model, one, settings) for path, one in found.items()}
    edits: list[Edit] = []
    modules = {path: one.module for path, one in found.items()}
    for path, name in merged_paths(model, modules, lambda name: tuple(values[name].items())):
        edits.append(ReplaceModule(module=path, brick=BRICK, settings=values[name]))
    outputs = {one.output: model.get_submodule(one.output) for one in found.values()}
    for path, _ in merged_paths(model, outputs, lambda name: None):
        edits.append(ScaleParameter(parameter=f"{path}.weight", factor=1 / settings.opening))
    before, after = (count_parameters(one).total for one in (model, removal(model, edits).after))
    return Plan(
        method=NAME,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="exact",
        edits=edits,
        findings=[f"{len(found)} attentions get gates of {after - before:,} parameters together."],
        made_for=config_values(model.config),
    )


def _values(model: PreTrainedModel, one: SelfAttention, settings: GatedAttentionSettings) -> dict[str, Any]:
    """What the brick at an attention is told."""
    if isinstance(one.module, GatedAttention):
        raise PlanError(
            f"{one.path} has gates already. Name other layers, or take these out, by the inverse of their plan."
        )
    if own := next((name for name, _ in one.module.named_children() if "gate" in name), None):
        raise PlanError(f"{one.path} has a gate of its own in this architecture ({own}). Name other layers.")
    body = anatomy(model, part=one.stack.tower or None)
    name = f"{one.output}.weight"
    read = body.role(name).units_read if name in dict(model.named_parameters()) else None
    if read is None:
        raise PlanError(
            f"{one.output}, which reads the heads of {one.path}, is no matrix that could be divided by where gates "
            "begin. Put gates in before it becomes something else, or merge it back (merge_module)."
        )
    axis, heads = read
    width = model.get_parameter(name).shape[1 - axis]
    found = {"gate": settings.gate, "opening": settings.opening, "hidden": settings.hidden}
    check_gate(heads=heads.count, head_width=heads.unit, width=width, **found)  # type: ignore[arg-type]
    sizes = {"heads": heads.count, "head_width": heads.unit, "width": width}
    return {**sizes, **{key: value for key, value in found.items() if value is not None}}


def _example(model: PreTrainedModel) -> dict[str, Any]:
    anatomy(model, complete=False)
    return {"opening": 0.25}


METHOD = Method(
    name=NAME,
    title="Heads with a sigmoid gate (gated attention), so that they can do nothing",
    paper="arXiv 2306.12929",
    intent="restructure",
    settings=GatedAttentionSettings,
    plan=from_model(plan_gated_attention),
    examples=_example,
    promise="exact",
)
