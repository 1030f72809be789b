"""Whole experts taken out of a mixture of experts: those that matter least by how routers use them on samples.

| score | the experts that stay | source |
|---|---|---|
| reap (default) | those that give most to the tokens that get them, times the gate | REAP, arXiv 2510.13999, eq. 9 |
| gate | those that get the largest sum of weights from the router | SEER-MoE's soft counting, arXiv 2404.05089 |
| frequency | those that the router chooses most often | SEER-MoE's counting |

`auxin.analysis.expert_use` has the equations. The router loses the experts' rows and what is added to their scores, and
chooses among the rest as if those that went had scores of minus infinity. So nothing changes for tokens that went to
none of them where gates are shares among the chosen experts (Mixtral, gpt-oss, sigmoid routers, `norm_topk_prob`);
where they are a softmax over all experts, those of the others grow by a common factor.

Fewer experts make a model smaller, not faster: a token gets as many as before. Only where fewer are left does it get
fewer, all of them; the config (`num_experts_per_tok`) follows. Where a router chooses groups first (`n_group`), every
group loses as many. Experts that all tokens share stay. Chance, the norm of weights, gradients are the scores of the
other methods that prune widths, whose setting `experts` says what stays.
"""

from typing import Any, Literal, Self

from pydantic import Field, StrictFloat, StrictInt, model_validator
from transformers import PreTrainedModel

from auxin.analysis.expert_use import ExpertUse
from auxin.analysis.run import measure
from auxin.edits import Plan
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.objectives.calibration import CalibrationSettings
from auxin.planning.bench import Bench
from auxin.planning.method import Method
from auxin.planning.pruning import Prunable, prunable
from auxin.planning.pruning_settings import STREAMS, Pruning, check_amount
from auxin.planning.target import Target
from auxin.settings import Settings


class ExpertDropping(Settings):
    """How many experts stay: `experts`, a share (0.5) or a count of each layer, or a `target`; and which."""

    experts: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Experts of a layer that stay."""
    target: Target | None = None
    """How small the model shall be, instead: `target.parameters` or `target.memory`."""
    score: Literal["reap", "gate", "frequency"] = "reap"
    """By what experts are ranked, see this module."""
    uniform: bool = True
    """Whether every layer keeps as many."""
    normalised: bool = True
    """Where layers may differ, whether scores are standardised within the layer: less their mean, by their spread."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.experts is None) == (self.target is None):
            raise ValueError("give experts (how many of a layer stay), or a target.")
        if self.target is not None and self.target.name not in ("parameters", "memory"):
            raise ValueError(
                f"target.{self.target.name}: a token gets as many experts as before, so that it takes as much "
                "computation. Give target.parameters or target.memory."
            )
        if self.experts is not None:
            check_amount("experts", self.experts, self.uniform)
        return self

    def as_pruning(self) -> Pruning:
        """The same in the settings of all methods that prune widths."""
        return Pruning(
            experts=self.experts,
            target=self.target,
            streams=None if self.target is None else ["experts"],
            uniform=self.uniform,
            normalised=self.normalised,
        )


def plan_expert_dropping(bench: Bench, settings: ExpertDropping) -> Plan:
    """Plan a model without the experts of the lowest scores.

    Raises:
        PlanError: see `auxin.planning.pruning`; a model without routed experts, or one into whose experts nobody sees.
    """
    found = _prunable(bench.model, settings)
    found.refuse_impossible("expert-dropping")  # before the model is run
    measured = measure(ExpertUse(), bench.model, bench.data).of(settings.score)
    return _said(found.plan("expert-dropping", {("expert", scope): use for scope, use in measured.items()}), settings)


def _outline(bench: Bench, settings: ExpertDropping) -> Plan:
    return _said(_prunable(bench.model, settings).outline("expert-dropping"), settings)


def _prunable(model: PreTrainedModel, settings: ExpertDropping) -> Prunable:
    """What can go.

    Raises:
        PlanError: there are no experts.
    """
    if anatomy(model).routing is None:
        raise PlanError(
            "There are no experts among which a router chooses, so that none can go. Take heads and feed-forward units "
            "out instead, by magnitude or taylor."
        )
    others = [part for part in STREAMS if part != "experts"]
    return prunable(model, settings.as_pruning(), dict.fromkeys(others, "expert-dropping takes experts alone."))


def _said(plan: Plan, settings: ExpertDropping) -> Plan:
    """The plan with the method's own settings."""
    return plan.model_copy(update={"settings": settings.model_dump(mode="json", exclude_defaults=True)})


def _example(model: PreTrainedModel) -> dict[str, Any]:
    values = {"experts": 0.5}
    _prunable(model, ExpertDropping.parse(values)).outline("")
    return values


METHOD = Method(
    name="expert-dropping",
    title="Fewer experts in a mixture, without those that routers use least",
    paper="arXiv 2510.13999 (counting: arXiv 2404.05089)",
    intent="prune",
    settings=ExpertDropping,
    plan=plan_expert_dropping,
    examples=_example,
    needs_weights=True,
    promise="none",
    calibration=lambda settings: CalibrationSettings(samples=64),
    outline=_outline,
)
