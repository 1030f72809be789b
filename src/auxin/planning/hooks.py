"""What takes part in the training that follows an edit: the loop's hook, and those that hold old entries back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting import Ledger, StageRecord
from auxin.edits.continuation import continue_exactly
from auxin.edits.executor import Receipt
from auxin.edits.module_store import leading
from auxin.edits.plan import Plan
from auxin.errors import CheckpointError, ConfigError, PlanError
from auxin.planning.lineage import changes_since_training, last_changes, old_shapes
from auxin.settings import Settings
from auxin.words.one_of import OneOf, kinds_of, parse_one
from auxin.words.paths import path_pattern
from auxin.words.registry import Registry


@dataclass(frozen=True)
class HookContext:
    """What a hook is made from."""

    place: str
    """Where it was asked for, for messages."""
    ledger: Ledger
    """Of the model that is trained."""


class Hook(Protocol):
    """Takes part in the training loop. Its methods are called in the order of the hooks given."""

    def attach(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Called once, before the first step, with the model on its device."""

    def before_step(self, step: int) -> None:
        """Called before the forward pass of optimizer step `step` (0-based, of this stage); also for the step that
        would come next, where the guard left the last one's update out, so that what follows from the step alone ends
        as it should."""

    def after_step(self, step: int) -> None:
        """Called right after the optimizer's update; not called when the guard left the update out."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed hook needs, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""


class Ramp:
    """The base of hooks that move something in the first steps of a stage, by the step alone, also where the guard left
    updates out.

    Args:
        steps: optimizer steps that it takes, counted from the start of the training stage.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ConfigError(f"{type(self).__name__}: steps must be at least 1, received {steps}.")
        self.steps = steps

    def move(self, step: int) -> None:
        """Set what is moved to what step `step` (0-based, `steps` at most) sees."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Set what this step sees, as after the one before."""
        if step <= self.steps:
            self.move(step)

    def after_step(self, step: int) -> None:
        """Set what the next step sees."""
        self.before_step(step + 1)

    def state_dict(self) -> dict[str, Any]:
        """How many steps it takes."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the hook that gave `state`."""
        self.steps = state["steps"]


class HookSettings(Settings):
    """The base of every kind of hook as data; each has a field `kind: Literal["its_name"]`, under which a subclass is
    known once its module is imported. Kinds of other packages are named in the entry point group "auxin.hooks"."""

    kind: str
    """Which hook this is."""
    goes_first: ClassVar[bool] = False
    """Whether it has to be attached before the others, as one that regroups the optimizer's parameters has."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Add the kind to the registry."""
        for kind in kinds_of(cls):
            HOOKS.add(kind, cls)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a model of `config`, for which the hook has no meaning, before any work; PlanError. What only `made`
        or `attach` can see is theirs to refuse."""

    def made(self, context: HookContext) -> Hook:
        """The hook.

        Raises:
            ConfigError, PlanError: it has no meaning for the model of `context`.
        """
        raise NotImplementedError


def asked_by(plan: Plan) -> list[HookSettings]:
    """The hooks that `plan` brings along; ConfigError when one is of an unknown kind."""
    return [
        parse_one(ONE_HOOK, values, f"plan by {plan.method}: hooks.{number}")
        for number, values in enumerate(plan.hooks)
    ]


def hooks_of(plan: Plan, receipt: Receipt | None = None) -> list[Hook]:
    """The hooks that `plan`, which was applied, brings along, for whoever trains the model in a loop of their own: call
    `attach` once, `before_step` and `after_step` around every step.

    Args:
        plan: the plan.
        receipt: of its application, for a hook that needs it.
    """
    record = StageRecord(
        name="change",
        kind="change",
        parameters=0 if receipt is None else receipt.parameters_after,
        plan=plan.model_dump(mode="json"),
        receipt=None if receipt is None else receipt.model_dump(mode="json", exclude={"plan"}),
    )
    context = HookContext(f"plan by {plan.method}: hooks", Ledger(stages=[record]))
    return made_hooks(asked_by(plan), context)


def made_hooks(asked: Sequence[HookSettings], context: HookContext) -> list[Hook]:
    """The hooks that `asked` say, in their order but for those that go first.

    Raises:
        ConfigError, PlanError: one has no meaning for the model of `context`.
    """
    return [hook.made(context) for hook in sorted(asked, key=lambda hook: not hook.goes_first)]


def _hooks_in(loaded: Any) -> Iterator[tuple[str, type[HookSettings]]]:
    # Those of modules add themselves; an entry point names one.
    if isinstance(loaded, type) and issubclass(loaded, HookSettings):
        for kind in kinds_of(loaded):
            yield kind, loaded


HOOKS: Registry[type[HookSettings]] = Registry("hook", "auxin.methods", _hooks_in)
"""Every kind of hook, by name; those of a method stand in its module."""
ONE_HOOK = OneOf(HOOKS)


class OldRatesSettings(HookSettings):
    """What was there before the last change, embeddings and norms included, learns at another rate."""

    kind: Literal["old_rates"] = "old_rates"
    """Says that this is the rate of old entries."""
    ratio: float = Field(ge=0.0, le=1.0)
    """Learning rate of old entries relative to what is new; 0 freezes them, as LLaMA Pro does with all but its new
    layers."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of the stage for which this holds; None: all."""

    def made(self, context: HookContext) -> Hook:
        """For the entries before the last changes that no training lies between."""
        plans = last_changes(context.ledger, f"{context.place}: old_rates")
        return OldRates(self.ratio, old_shapes(plans), self.steps)


class TrainOnlySettings(HookSettings):
    """Train nothing but some modules or parameters."""

    kind: Literal["train_only"] = "train_only"
    """Says that this freezes all but some parts."""
    paths: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """Dotted paths of modules or parameters, `*` for any one part: "model.layers.*.mlp", "lm_head.weight"."""

    def made(self, context: HookContext) -> Hook:
        """For these paths."""
        return TrainOnly(self.paths)


class ExactRatesSettings(HookSettings):
    """After a growth that carried the moments: rates at which AdamW goes on exactly as it would have in the small model
    (readers of n copies learn n times slower). Copies then never part, so this is for comparing and checking."""

    kind: Literal["exact_rates"] = "exact_rates"
    """Says that the optimizer goes on exactly."""
    goes_first: ClassVar[bool] = True

    def made(self, context: HookContext) -> Hook:
        """For the change right before."""
        record = context.ledger.stages[-1]
        if record.kind != "change" or record.receipt is None or len(changes_since_training(context.ledger)) != 1:
            raise ConfigError(
                f"{context.place}: exact_rates is for the training right after one change, with its receipt, and this "
                f"one follows {record.name!r} ({record.kind}). Leave it out, or give the receipt."
            )
        return ExactRates(Receipt.model_validate({**record.receipt, "plan": record.plan}))


class OldRates:
    """Training hook: old entries move by `ratio` times what the optimizer moves them, weight decay included.

    With a ratio of 0 they are frozen, bit by bit; their moments go on being collected, so that they are right when the
    entries are set free. Costs a copy of the old entries during the step.

    Args:
        ratio: 0 (frozen) to 1 (as all others).
        old_shapes: by a parameter's name the shape of its old entries, which are the first ones along every axis.
        steps: optimizer steps of the stage for which this holds; None: all.

    Raises:
        ConfigError: ratio or steps out of range.
    """

    def __init__(self, ratio: float, old_shapes: Mapping[str, tuple[int, ...]], steps: int | None = None) -> None:
        if not 0 <= ratio <= 1:
            raise ConfigError(f"{type(self).__name__}: ratio must lie in 0..1, received {ratio}.")
        if steps is not None and steps < 0:
            raise ConfigError(f"{type(self).__name__}: steps must not be negative, received {steps}.")
        self.ratio, self.old_shapes, self.steps = ratio, dict(old_shapes), steps
        self._old: list[Tensor] = []
        self._before: list[Tensor] = []

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the old entries; PlanError when the model lacks a parameter or it is smaller than its old entries."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, old in self.old_shapes.items():
            shape = tuple(parameters[name].shape) if name in parameters else None
            if shape is None or len(shape) != len(old) or any(a > b for a, b in zip(old, shape, strict=True)):
                raise PlanError(
                    f"{type(self).__name__}: {name} has shape {shape} in the model (None: it does not exist), which "
                    f"has no room for old entries of {old}. Give the hook of the growth that made this model."
                )
        self._old = [leading(parameters[name].detach(), old) for name, old in self.old_shapes.items()]

    def before_step(self, step: int) -> None:
        """Remember the old entries."""
        self._before = []  # of a step whose update was left out
        if self.ratio < 1 and (self.steps is None or step < self.steps):
            self._before = [entries.clone() for entries in self._old]

    def after_step(self, step: int) -> None:
        """Put the old entries back, or part of the way."""
        if self._before:
            for entries, before in zip(self._old, self._before, strict=True):
                entries.copy_(before if self.ratio == 0 else torch.lerp(before, entries, self.ratio))
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """Ratio and steps."""
        return {"ratio": self.ratio, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the hook that gave `state`."""
        self.ratio, self.steps = state["ratio"], state.get("steps")


class TrainOnly:
    """Training hook: only the modules and parameters at `paths` are trained, all others stay to the last bit.

    Frozen parameters get no gradient, no weight decay and no optimizer state, which saves their share of time and
    memory; moments that they had are not saved with the stage. They stay frozen on the model when the stage is over:
    load its checkpoint, or call `model.requires_grad_(True)`, to train all of it again.

    Args:
        paths: dotted paths of modules or parameters, `*` for any one part: "model.layers.4", "lm_head.weight",
            "model.layers.*.mlp".
    """

    def __init__(self, paths: Sequence[str]) -> None:
        if not paths or isinstance(paths, str):
            raise ConfigError(f"TrainOnly: paths must be a list of at least one path, received {paths!r}.")
        self.paths = list(paths)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Freeze the rest; ConfigError when a path means nothing in this model."""
        patterns = [path_pattern(path, after=r"(\..*)?") for path in self.paths]
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        every = [name for aliases in names.values() for name in aliases]
        for path, pattern in zip(self.paths, patterns, strict=True):
            if not any(pattern.fullmatch(name) for name in every):
                raise ConfigError(
                    f"TrainOnly: {path} is no module with parameters and no parameter of this model, which has for "
                    f"example {every[-1]}. Give the paths of the model that is trained."
                )
        for parameter in model.parameters():
            aliases = names[id(parameter)]
            trained = any(pattern.fullmatch(name) for pattern in patterns for name in aliases)
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None
                optimizer.state.pop(parameter, None)

    def before_step(self, step: int) -> None:
        """Nothing: what is frozen gets no gradient."""

    def after_step(self, step: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The paths."""
        return {"paths": self.paths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the resumed run freezes what the started one did."""
        if state["paths"] != self.paths:
            raise CheckpointError(
                f"TrainOnly: the run was started with paths {state['paths']}, but is resumed with {self.paths}. Give "
                "the same."
            )


class ExactRates:
    """Training hook: AdamW goes on as it would have in the model before the growth, see `continue_exactly`.

    For a stage whose optimizer takes over the moments that were carried through the growth. The rates hold for the
    whole stage, relative to its schedule. Clipped gradients have another norm than before; without clipping and noise
    the small model's steps are taken exactly, so that copies never part.

    Args:
        receipt: of the growth.
    """

    def __init__(self, receipt: Receipt) -> None:
        self.receipt = receipt

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Regroup the optimizer; PlanError when there is no exact way to go on."""
        continue_exactly(optimizer, model, self.receipt)

    def before_step(self, step: int) -> None:
        """Nothing: the loop keeps the groups' rates relative to each other."""

    def after_step(self, step: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the groups follow from the receipt."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
