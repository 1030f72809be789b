"""Attentions whose weights can be exactly zero, so that a head that wants to do nothing needs no large scores
("Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", Bondarenko et al. 2023, arXiv
2306.12929, section 4.1):

    P' = clip((zeta - gamma) P + gamma, 0, 1),      gamma = -alpha / T,

with T the length of the texts that the model is trained on (section 4.3: the range of alpha that works is the same for
all lengths). A row of m equal weights is left alone down to nothing: it sums up to 1 - (m - 1) alpha / T, and is zero
from m = (T + alpha) / alpha on.

That changes what a trained model computes, and a new one, whose attention is nearly uniform, may never begin to learn.
With `ramp_steps` gamma goes from 0, where the model is what it was, to -alpha / T in the next training stage (the hook
`GammaRamp`).

Not as in the paper: gamma can be ramped; zeta is 1 unless it is set, since a zeta above 1 alone does not help there.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.edits import Edit, Plan, ReplaceModule
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.attention_functions import IMPLEMENTATIONS
from auxin.nn.clipped_softmax import ClippedSoftmax
from auxin.planning.bench import from_model
from auxin.planning.hooks import Hook, HookContext, HookSettings, Ramp
from auxin.planning.linear_layers import merged_paths
from auxin.planning.method import Method
from auxin.planning.self_attentions import self_attentions
from auxin.settings import Settings

NAME = "clipped-softmax"
BRICK = ClippedSoftmax.brick_name


class ClippedSoftmaxSettings(Settings):
    """How far weights are clipped, where, and whether at once."""

    alpha: float = Field(gt=0, allow_inf_nan=False)
    """gamma = -alpha / length. The paper has 3.2 for BERT and 12 for OPT; 2 to 4 serve for BERT at many lengths."""
    length: int = Field(gt=0)
    """T: tokens of the texts that the model is trained on. Shorter texts, and the first rows of causal ones, are
    clipped less, longer ones more."""
    zeta: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """Above 1, weights near 1 become 1."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """The layers, from 0, whose attentions are clipped; None: all."""
    part: str | None = None
    """"encoder" or "decoder", or a tower: whose layers. None: those of all."""
    ramp_steps: int | None = Field(default=None, gt=0)
    """Steps of the next train stage in which gamma goes from 0 to its value, and zeta from 1; None: both at once."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.alpha >= self.length:
            raise ValueError(
                f"alpha = {self.alpha:g} at length = {self.length}: a row of two equal weights would be nothing. Give "
                "an alpha far below the length, such as 3."
            )
        return self

    @property
    def gamma(self) -> float:
        """-alpha / length."""
        return -self.alpha / self.length


def plan_clipped_softmax(model: PreTrainedModel, settings: ClippedSoftmaxSettings) -> Plan:
    """Plan clipped attentions; weights are not looked at.

    Raises:
        PlanError: an unknown architecture, there is no such layer, its weights can't be had, or all are clipped so.
    """
    if (own := model.config._attn_implementation) not in (None, *IMPLEMENTATIONS):
        raise PlanError(
            f"{NAME} needs attention probabilities, which {own!r} does not give. Call model.set_attn_implementation("
            f"{IMPLEMENTATIONS[1]!r}), or set attn_implementation = {IMPLEMENTATIONS[1]!r} where it is loaded."
        )
    found = self_attentions(model, settings.part, settings.layers, BRICK)
    clipped = next((path for path, one in found.items() if isinstance(one.module, ClippedSoftmax)), None)
    if clipped is not None and settings.ramp_steps is not None:
        raise PlanError(
            f"ramp_steps = {settings.ramp_steps}: {clipped} is clipped already, and a ramp begins without. Leave "
            "ramp_steps out, or merge what is there back (merge_module) first."
        )
    if all(_is_so(one.module, settings) for one in found.values()):
        raise PlanError(
            f"All of these attentions are clipped with gamma = {settings.gamma:.4g} and zeta = {settings.zeta:g} "
            "already, so that nothing would change. Give another alpha or length, or leave it."
        )
    values: dict[str, Any] = {"gamma": settings.gamma}
    if settings.zeta != 1:
        values["zeta"] = settings.zeta
    if settings.ramp_steps is not None:
        values["begin"] = 0.0
    modules = {path: one.module for path, one in found.items()}
    edits: list[Edit] = [
        ReplaceModule(module=path, brick=BRICK, settings=values)
        for path, _ in merged_paths(model, modules, lambda path: None)
    ]
    return Plan(
        method=NAME,
        settings=settings.model_dump(mode="json", exclude_defaults=True),
        promise="none" if settings.ramp_steps is None else "exact",
        edits=edits,
        hooks=[] if settings.ramp_steps is None else [GammaRampSettings(steps=settings.ramp_steps).model_dump()],
        notes=_dead_start(settings),
        findings=[
            f"{len(found)} attentions are clipped with gamma = {settings.gamma:.4g}: a weight below "
            f"{-settings.gamma / (settings.zeta - settings.gamma):.4g} is nothing, so that a head averages fewer than "
            f"{_limit(settings):.4g} tokens."
        ],
        made_for=config_values(model.config),
    )


def _is_so(module: nn.Module, settings: ClippedSoftmaxSettings) -> bool:
    # One that begins with less strength may be at any.
    wanted = settings.gamma, settings.zeta, 1.0
    return isinstance(module, ClippedSoftmax) and (module.gamma, module.zeta, module.begin) == wanted


def _limit(settings: ClippedSoftmaxSettings) -> float:
    """From how many tokens on a row of equal weights is zero; (T + alpha) / alpha for zeta = 1."""
    return (settings.zeta - settings.gamma) / -settings.gamma


def _dead_start(settings: ClippedSoftmaxSettings) -> list[str]:
    """What a new model is to be warned of."""
    if settings.ramp_steps is not None or _limit(settings) > settings.length:
        return []
    return [
        f"A new model attends to all tokens nearly alike, and of {_limit(settings):.4g} equal weights or more nothing "
        f"is left, nor a gradient: at alpha = {settings.alpha:g} it may never begin to learn. Set ramp_steps, or give "
        "an alpha below 1, unless the model is trained already."
    ]


class GammaRampSettings(HookSettings):
    """The clipping of attention weights begins in the course of the stage."""

    kind: Literal["gamma_ramp"] = "gamma_ramp"
    """Says that it does."""
    steps: int = Field(ge=1)
    """Steps from no clipping to that of the settings, from the start of the stage."""

    def made(self, context: HookContext) -> Hook:
        """See `GammaRamp`."""
        return GammaRamp(self.steps)


class GammaRamp(Ramp):
    """Training hook: lets the clipping of attention weights grow from none to what was asked for, in equal steps.

    Step s (0-based) sees s / steps of gamma and of zeta - 1, and from step `steps` on all of it. The strength is saved
    with the model.

    Args:
        steps: optimizer steps, counted from the start of the training stage.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._clipped: list[ClippedSoftmax] = []

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the attentions; PlanError when none is clipped."""
        self._clipped = [module for module in model.modules() if isinstance(module, ClippedSoftmax)]
        if not self._clipped:
            raise PlanError(
                f"GammaRamp: no attention of the {type(model).__name__} is clipped. Change it with {NAME} first."
            )

    def move(self, step: int) -> None:
        """Set the strength that `step` sees."""
        for module in self._clipped:
            module.set_strength(step / self.steps)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    anatomy(model, complete=False)
    return {"alpha": 0.9, "length": 16}


METHOD = Method(
    name=NAME,
    title="Attention weights that can be exactly zero (clipped softmax), so that heads can do nothing",
    paper="arXiv 2306.12929",
    intent="restructure",
    settings=ClippedSoftmaxSettings,
    plan=from_model(plan_clipped_softmax),
    examples=_example,
    promise="exact with ramp_steps, when the ramp begins; else none",
)
