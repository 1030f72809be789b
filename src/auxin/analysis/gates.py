"""Noisy gates on units, learned on samples while the model's weights stay: the variational information bottleneck.

What a unit gives, h, becomes z h with z = mu + sigma eps, sigma = exp(logD / 2), and eps normal, drawn anew for every
token and, of heads, for every dimension (query heads of one key-value group share the draw, as they share the gate).
What a whole sublayer adds has one gate, and one draw for a token.
mu and logD are learned. What the gate lets through is held against N(0, xi), where xi is learned, too; at the best one,
xi = h^2 (mu^2 + sigma^2), the data is no longer there (VIBNet, arXiv 1802.10399):

    KL = 0.5 log(1 + mu^2 / sigma^2)      log alpha = logD - log(mu^2)

A unit whose gate is more noise than signal, log alpha > 0, can go. The loss is that of the model, plus beta times the
mean of KL over units, each weighted by its kappa, plus for every goal

    lambda1 (s - t) + lambda2 (s - t)^2

where s is the share that is expected to go when a unit stays with probability sigmoid(-slope log alpha), and t, the
share that shall, rises from 0 in the first half of the steps. The lambdas begin at 0 and climb (TVA-Prune's
constraint, after Wang et al., arXiv 1910.04732). Gates, KL and goals are computed in float32 whatever the model's type.

Weights may be trained with the gates, on the model's loss alone; then the loss may have a part more, the divergence of
what the model gives from what a teacher does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, CalibrationData, as_model_has, kept_tokens, logits_of, result_of
from auxin.analysis.targets import label_rows
from auxin.analysis.units import Group, Place, Rows, Units
from auxin.errors import DataError, PlanError
from auxin.models.evaluating import evaluation_mode
from auxin.objectives.objective import IGNORED
from auxin.settings import Settings

MU, LOG_VARIANCE, SPREAD = 1.0, -9.0, 0.01
"""Where gates start: the means of mu and logD, and the deviation of both (TVA-Prune's code; VIBNet's is the same)."""
TINY = 1e-8
"""What is added to squares that are divided by, or whose logarithm is taken (TVA-Prune's code)."""
RAMP = 0.5
"""Share of the steps in which goals rise to what is asked for. TVA-Prune has 0.1 or 0.2 of some 4,000 steps, more than
all of those here; with as small a part of 200, gates overshoot, and units that are noise by then do not come back."""
MULTIPLIER_RATE = 0.1
"""Learning rate of the lambdas (TVA-Prune)."""
CLIP = 1.0
"""Largest norm of the gates' gradient (TVA-Prune), and of the weights'."""

Shares = Mapping[Group, Tensor]
"""By group, for every unit, how probably it stays."""


class GateSettings(Settings):
    """How gates are learned."""

    steps: int = Field(default=200, gt=0)
    """Steps, each on a batch of the data."""
    learning_rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Of AdamW, without weight decay; falls linearly to zero. Gates start at log alpha = -9, and half of the steps
    times the rate is about how far they can go. TVA-Prune has 0.05, or 0.1 where more than half goes, over some 4,000
    steps."""
    beta: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight of the mean KL. TVA-Prune's 1e-6 weighs a sum, which for Llama-7B comes to about 1 here."""
    slope: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of the sigmoid that counts units softly. TVA-Prune has 10, by which nothing moves before KL has brought log alpha
    near 0."""
    weight_learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Of AdamW for the model's weights, which are trained together with the gates; falls linearly to zero. None:
    weights stay as they are."""
    distillation: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Where weights are trained, what KL(whole model || gated model) of the outputs counts beside the loss, the mean
    over labelled places at a temperature of 1. 0: the whole model is not asked."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the gates' start and of their noise."""

    @model_validator(mode="after")
    def _distils_into_weights(self) -> Self:
        if self.weight_learning_rate is None and "distillation" in self.model_fields_set:
            raise ValueError(
                "distillation teaches weights that are trained with the gates, and they stay as they are. Give a "
                "weight_learning_rate, or leave it out."
            )
        return self


@dataclass(frozen=True)
class Goal:
    """How much shall be left of something."""

    left: Callable[[Shares], Tensor]
    """(how probably units stay) -> the share that is expected to be left of it, differentiable."""
    share: float
    """What shall be left."""


class Gates(nn.Module):
    """A gate for every unit of some groups; a reader of what passes through their places.

    Args:
        units: of the model.
        groups: those that are gated, at all their places; of "key_value" the gates lie on the query heads.
        kappas: what the KL of a unit counts, by group.
        seed: of the start and of the noise.
        device: where the gates lie.
    """

    def __init__(
        self, units: Units, groups: Sequence[Group], kappas: Mapping[Group, float], seed: int, device: torch.device
    ) -> None:
        super().__init__()
        self._units, self._seed = units, seed
        self.counts = {group: units.counts[group] for group in groups}
        """How many gates each group has."""
        start, total = torch.Generator().manual_seed(seed), sum(self.counts.values())
        draws = SPREAD * torch.randn(2, total, generator=start)
        self.mu = nn.Parameter((MU + draws[0]).to(device))
        self.log_variance = nn.Parameter((LOG_VARIANCE + draws[1]).to(device))
        kappa = torch.cat([torch.full((count,), kappas[group]) for group, count in self.counts.items()])
        self._kappa = (kappa / kappa.sum()).to(device)
        # Query heads lie group by group, so that one gate serves as many consecutive entries.
        self._gated_by: dict[Group, Group] = {
            ("query" if kind == "key_value" else kind, scope): (kind, scope) for kind, scope in groups
        }
        self._generators: dict[torch.device, torch.Generator] = {}
        self._noisy = False

    @contextmanager
    def on(self, noisy: bool = True) -> Iterator[None]:
        """Within the context what passes is multiplied: by draws, or by mu alone, the weighted mask."""
        self._noisy = noisy
        with self._units.read_by(self, list(self._gated_by)):
            yield

    def __call__(self, place: Place, rows: Rows) -> Tensor:
        """What goes on where `rows` come."""
        group = self._gated_by[place.group]
        # With its graph: the gates before this place learn from what comes behind it.
        values = rows.values.to(torch.promote_types(rows.values.dtype, torch.float32))
        mu, log_variance = (self.by_group(each)[group].to(values.device) for each in (self.mu, self.log_variance))
        gates, entries = mu[:, None], place.entries or 1
        if self._noisy:
            eps = torch.randn(
                len(values), len(mu), entries, generator=self._generator(values.device), device=values.device
            )
            gates = gates + (log_variance / 2).exp()[:, None] * eps
        apart = values.unflatten(-1, (len(mu), -1, entries)) * gates.unsqueeze(-2)
        return apart.flatten(-3).to(rows.values.dtype)

    def log_alpha(self) -> Tensor:
        """By unit log(sigma^2 / mu^2): the larger, the more noise."""
        return self.log_variance - (self.mu.square() + TINY).log()

    def kl(self) -> Tensor:
        """The mean of 0.5 log(1 + mu^2 / sigma^2), weighted by the kappas."""
        ratio = self.mu.square() / (self.log_variance.exp() + TINY)
        return (self._kappa * 0.5 * torch.log1p(ratio)).sum()

    def by_group(self, values: Tensor) -> dict[Group, Tensor]:
        """Values of all units, (units,), group by group."""
        return dict(zip(self.counts, values.split(list(self.counts.values())), strict=True))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def learn(
    gates: Gates,
    task: Callable[[], Tensor],
    settings: GateSettings,
    goals: Sequence[Goal],
    weights: Sequence[nn.Parameter] = (),
) -> list[float]:
    """Train gates and, if some are given, weights; nothing else.

    Args:
        gates: changed in place.
        task: the model's loss on the next batch; called once at every step, with the gates on.
        settings: how.
        goals: what is to be left.
        weights: of the model, changed in place, at the settings' `weight_learning_rate`.

    Returns:
        The task's loss at every step, before its update.

    Raises:
        PlanError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(gates.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    if weights:
        assert settings.weight_learning_rate is not None
        optimizer.add_param_group({"params": weights, "lr": settings.weight_learning_rate})
    rates: list[float] = [group["lr"] for group in optimizer.param_groups]
    multipliers = nn.Parameter(gates.mu.new_zeros(2, len(goals)))
    climb = torch.optim.AdamW([multipliers], lr=MULTIPLIER_RATE, weight_decay=0.0, maximize=True)
    losses: list[float] = []
    for step in range(settings.steps):
        with gates.on():
            loss = task()
        if not torch.isfinite(loss):
            raise PlanError(
                f"The loss with gates is {loss.item()} at step {step}. Lower learning_rate "
                f"({settings.learning_rate:g}), or look at the model's weights."
                if not weights
                else f"The loss with gates is {loss.item()} at step {step}. Lower weight_learning_rate "
                f"({settings.weight_learning_rate:g}) or learning_rate ({settings.learning_rate:g})."
            )
        losses.append(loss.item())
        risen = min(1.0, (step + 1) / (RAMP * settings.steps))
        shares = gates.by_group(torch.sigmoid(-settings.slope * gates.log_alpha()))
        total = loss.float() + settings.beta * gates.kl()
        for goal, linear, squared in zip(goals, *multipliers, strict=True):
            beyond = 1 - goal.left(shares) - risen * (1 - goal.share)
            total = total + linear * beyond + squared * beyond.square()
        optimizer.zero_grad()
        climb.zero_grad()
        total.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            nn.utils.clip_grad_norm_(group["params"], CLIP)
            group["lr"] = rate * (1 - step / settings.steps)
        optimizer.step()
        climb.step()
    return losses


@contextmanager
def losses_of(
    model: PreTrainedModel,
    data: CalibrationData,
    asked_by: str,
    trained: Sequence[nn.Parameter] = (),
    teacher: PreTrainedModel | None = None,
    distillation: float = 1.0,
) -> Iterator[Callable[[], Tensor]]:
    """Within the context, a function that gives the loss of `model` on the next batch of the data, from the start again
    when it ends. Model and teacher are in evaluation mode, and no weights ask for gradients but those that are trained;
    afterwards all is as it was. No random number is taken from the global generators.

    Args:
        model: the model.
        data: samples with labels.
        asked_by: what looks at the loss, for messages.
        trained: weights of the model.
        teacher: another model, from whose outputs those of the model are to differ little; None: there is none.
        distillation: what KL(teacher || model) counts, the mean over the places that have a label.

    Raises:
        DataError: by the function: the model gives no loss for a batch.
        PlanError: by the function: there is a teacher, and one of the two gives no logits.
    """
    first = next(model.parameters())
    learning = {id(parameter) for parameter in trained}
    asking = [p for p in model.parameters() if p.requires_grad and id(p) not in learning]
    batches = _endless(data)

    def loss() -> Tensor:
        batch = next(batches)
        inputs = _own_inputs(model, batch)
        result = result_of(model, inputs)
        found: Tensor | None = getattr(result, "loss", None)
        if found is None:
            raise DataError(
                f"The {type(model).__name__} gives no loss for {', '.join(inputs)}, by which {asked_by} learns. Give "
                "data with labels and a model with a head."
            )
        if teacher is None:
            return found
        logits = logits_of(model, result, "Set distillation = 0.")
        with torch.no_grad():
            told = logits_of(teacher, result_of(teacher, _own_inputs(teacher, batch)))
        return found + distillation * _divergence(model, as_model_has(model, batch), told, logits)

    devices = [first.device] if first.device.type == "cuda" else []
    others = evaluation_mode(teacher) if teacher is not None else nullcontext()
    with evaluation_mode(model), others, torch.random.fork_rng(devices=devices):
        for parameter in asking:
            parameter.requires_grad_(False)
        try:
            yield loss
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)


def _own_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    # A model may write into what it gets.
    return {name: tensor.clone() for name, tensor in as_model_has(model, batch).items()}


def _divergence(model: PreTrainedModel, inputs: Batch, told: Tensor, logits: Tensor) -> Tensor:
    """KL(told || logits), the mean over what has a label, or over all where labels are not one for each of the logits;
    float32 at least."""
    kept = kept_tokens(model, inputs, decoder=model.config.is_encoder_decoder) if logits.dim() == 3 else None
    labels = label_rows(model, inputs, kept, logits.shape)
    ours, theirs = (
        values.to(torch.promote_types(values.dtype, torch.float32)).log_softmax(-1) for values in (logits, told)
    )
    each = functional.kl_div(ours, theirs.to(ours.dtype), reduction="none", log_target=True).sum(-1)
    return each.mean() if labels is None else each[labels != IGNORED].mean()


def _endless(data: CalibrationData) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from data.batches()
