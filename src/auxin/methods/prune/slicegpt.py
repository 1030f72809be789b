"""A narrower residual stream, rotated first: its principal components stay, the least of them go (SliceGPT, Ashkboos et
al. 2024, arXiv 2401.15024).

The stream of a model with RMSNorms can be rotated without a change of the function (`auxin.planning.rotation`). The
rotation is that by the eigenvectors of

    C = sum over norms l and tokens i of X_li^T X_li,

X_li what enters norm l at token i of the samples, divided by its root mean square: what the norm gives without its
gain. Behind the rotation unit i of the stream is the i-th component, and those of the smallest eigenvalues are cut as
any method cuts units: rows of what writes them, columns of what reads them, the gains scaled so that norms divide by
what they divided by.

* In the paper every layer has a rotation of its own, by its own C_l, and what is passed on by the residual connection
  is multiplied by Q_l^T Q_l+1 (its matrices beside the layers). Here one rotation serves all layers: nothing lies on
  the connection, the result is a plain model of the family's own config and as fast as its size says. It fits each
  layer less well.
* The paper makes RMSNorms of LayerNorms by folding the mean into what writes the stream; here these are refused, since
  the result would be no model of the family.
* A head that is the token embedding gets a table of its own, as in the paper's code: the model is larger first.
"""

from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from auxin.analysis.input_moments import second_moments
from auxin.analysis.run import forward_through_layers
from auxin.edits import Plan, SliceParameter
from auxin.errors import PlanError
from auxin.nn.low_rank import signs
from auxin.objectives.calibration import Calibration, CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.pruning import Prunable, prunable
from auxin.planning.pruning_settings import STREAMS, Part, Pruning, check_amount
from auxin.planning.rotation import Rotatable, rotatable
from auxin.planning.target import Target
from auxin.planning.width_removal import Preparation
from auxin.settings import Settings

NAME = "slicegpt"


class SliceGPT(Settings):
    """How many components of the residual stay: `hidden`, a share (0.75) or a count, or a `target`."""

    hidden: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Units of the residual that stay."""
    target: Target | None = None
    """How small or fast the model shall be, instead."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.hidden is None) == (self.target is None):
            raise ValueError("give hidden (how much of the residual stays), or a target.")
        if self.hidden is not None:
            check_amount("hidden", self.hidden, alike=True)
        return self

    def as_pruning(self) -> Pruning:
        """The same in the settings of all methods that prune widths."""
        return Pruning(hidden=self.hidden, target=self.target, streams=None if self.target is None else ["hidden"])


def plan_slicegpt(bench: Bench, settings: SliceGPT) -> Plan:
    """Plan a model of the principal components of its stream.

    Args:
        bench: with the samples. The rotation's file goes to its folder.
        settings: how much stays.

    Raises:
        PlanError: see `auxin.planning.pruning` and `auxin.planning.rotation`; a stream that is not finite.
    """
    rotation = rotatable(bench.model)
    found = _prunable(rotation, settings)
    found.refuse_impossible(NAME)  # before the model is run
    assert bench.data is not None
    values, vectors = components(covariance(rotation, bench.data))
    edits, files = rotation.edits(vectors, bench.folder)
    prepared = Preparation(tuple(edits), rotation.untied, tuple(files), bench.folder)
    plan = replace(found, preparation=prepared).plan(NAME, {("residual", ""): values.tolist()})
    return _said(plan, rotation, settings, values)


def covariance(rotation: Rotatable, data: Calibration) -> Tensor:
    """C of this module, (hidden, hidden), float64, on the model's device.

    Args:
        rotation: of a model with weights, which stays as it is.
        data: samples; padding does not count.
    """
    model, epsilon = rotation.model, rotation.body.epsilon

    def normed(hidden: Tensor) -> Tensor:
        return hidden * (hidden.square().mean(1, keepdim=True) + epsilon).rsqrt()

    of_decoder = {norm: rotation.is_of_decoder(norm) for norm in rotation.readers}
    return second_moments(model, data, of_decoder, forward_through_layers(model), normed, together=True)[""]


def components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues, the largest first, and the eigenvectors in columns, of each of which the largest entry is
    positive, so that they do not depend on the machine's choice.

    Raises:
        PlanError: the matrix is not finite.
    """
    if not covariance.isfinite().all():
        raise PlanError(
            "The residual stream holds numbers that are not finite on these samples, so that it has no components. "
            "Look at the model's weights and at the data type in which it computes."
        )
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return values, vectors * signs(vectors)


def _prunable(rotation: Rotatable, settings: SliceGPT) -> Prunable:
    """What of the model with a head of its own can go.

    Raises:
        PlanError: the residual can't be narrower by itself.
    """
    if rotation.body.fields.heads_are_bound:
        raise PlanError(
            f"In the {rotation.body.family} architecture the hidden size is heads x head dimension, so that the stream "
            "can't be narrower by itself, and heads are not rotated. Take magnitude or minitron with heads and hidden."
        )
    others: list[Part] = [part for part in STREAMS if part != "hidden"]
    refused: dict[Part, str] = dict.fromkeys(others, f"{NAME} takes components of the residual alone.")
    found = prunable(rotation.untied, settings.as_pruning(), refused)
    return replace(found, model=rotation.model, preparation=Preparation(rotation.untying, rotation.untied))


def _said(plan: Plan, rotation: Rotatable, settings: SliceGPT, values: Tensor | None = None) -> Plan:
    """The plan with the method's own settings, and what is to be known of it."""
    said: dict[str, Any] = {"settings": settings.model_dump(mode="json", exclude_defaults=True)}
    if rotation.untying:
        note = (
            "The head was the token embedding and gets a table of its own, since the gain of the norm before it goes "
            "into the head alone."
        )
        said["notes"] = [*plan.notes, note]
    if values is not None:
        cut = (edit for edit in plan.edits if isinstance(edit, SliceParameter))
        left = max(len(edit.index) for edit in cut)
        share = float(values[:left].sum() / values.sum())
        finding = f"The {left} components that stay hold {share:.2%} of the sum of squares of what norms give."
        said["findings"] = [*plan.findings, finding]
    return plan.model_copy(update=said)


def _outline(bench: Bench, settings: SliceGPT) -> Plan:
    rotation = rotatable(bench.model)
    return _said(_prunable(rotation, settings).outline(NAME), rotation, settings)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    values = {"hidden": 0.75}
    _prunable(rotatable(model), SliceGPT.parse(values)).outline("")
    return values


METHOD = Method(
    name=NAME,
    title="A narrower residual stream, rotated to its principal components without the least of them",
    paper="arXiv 2401.15024",
    intent="prune",
    settings=SliceGPT,
    plan=plan_slicegpt,
    examples=_example,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=64),
    outline=_outline,
)
