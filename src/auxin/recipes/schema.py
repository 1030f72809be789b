"""What a recipe file says: stages in branches, and what the branches are compared by."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from auxin.accounting import Electricity
from auxin.data.dataset import DATASETS, DatasetSettings, SampleForm
from auxin.data.settings import CorpusSettings
from auxin.errors import AuxinError, ConfigError, placed, shown, unknown_name
from auxin.methods.grow.tokenformer import TokenGrowth
from auxin.objectives.measures import REGISTRY as MEASURES
from auxin.objectives.measures import Loss, Measure
from auxin.objectives.objective import OBJECTIVES, ObjectiveSettings
from auxin.planning.hooks import ONE_HOOK, HookSettings
from auxin.recipes.former_words import former_words
from auxin.settings import Settings
from auxin.training import TrainingSettings
from auxin.training.lora import Lora
from auxin.training.settings import BUDGETS
from auxin.words.one_of import OneOf, parse_one


def _called(letters: str, in_words: str) -> AfterValidator:
    """A name that is part of a folder's."""

    def check(name: str) -> str:
        if not re.fullmatch(rf"[a-z0-9][{letters}]{{0,{LONGEST_NAME - 1}}}", name):
            raise ValueError(
                f"a name begins with a lower case letter or a digit and has {in_words}, {LONGEST_NAME} at most"
            )
        return name

    return AfterValidator(check)


LONGEST_NAME = 100
MOST_BRANCHES = 200
MOST_STAGES = 200
StageName = Annotated[str, _called("a-z0-9._-", "lower case letters, digits, dots, _ and -")]
BranchName = Annotated[str, _called("a-z0-9_-", "lower case letters, digits, _ and -")]

ONE_OBJECTIVE = OneOf(OBJECTIVES)


class BuildStage(Settings):
    """Start a branch: with a new model, or with a checkpoint whose moments and books are carried along."""

    kind: Literal["build"]
    """Says that this is a build stage."""
    name: StageName = "build"
    """Lower case letters, digits, dots, _ and -; unique in its branch."""
    preset: str | None = None
    """A TokenFormer preset by name ("124m", "pile-450m", "vit-b16-86m", ...)."""
    model_type: str | None = None
    """A transformers model type ("tokenformer", "vision_tokenformer", "llama", "t5", ...), configured by `config`."""
    config: dict[str, Any] = {}
    """Fields of the model's config; the vocabulary and the special tokens come from the data."""
    pad_to_multiple_of: int = Field(default=1, ge=1)
    """Rows of the embedding table are padded to a multiple of this; rows beyond the tokenizer's are unused, but for
    those that an objective needs (the sentinels of span corruption)."""
    checkpoint: Path | None = None
    """A checkpoint folder to start from; any local Hugging Face model that can learn the recipe's objective."""
    like: str | None = None
    """Build the structure that this branch ends with: the final size from scratch."""
    parameters_of: str | None = None
    """With `model_type`: choose the width at which the parameter count comes nearest to this branch's final one."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("preset", "model_type", "checkpoint", "like") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a build stage takes exactly one of preset, model_type, checkpoint and like; given: {given or 'none'}"
            )
        if self.parameters_of is not None and self.model_type is None:
            raise ValueError("parameters_of goes with model_type")
        return self


class TrainStage(Settings):
    """Train for a budget; what is not set here comes from the recipe's `training`."""

    kind: Literal["train"]
    """Says that this is a train stage."""
    name: StageName
    """Lower case letters, digits, dots, _ and -; unique in its branch."""
    flops_of: str | None = None
    """Train until this branch's total training FLOPs (its ancestors and earlier stages included) equal that one's."""
    settings: dict[str, Any] = {}
    """Fields of TrainingSettings that this stage sets, its budget (steps, tokens, samples or flops) among them, and its
    objective where it is another one than the recipe's. Branches are compared by the recipe's measures all the same."""
    fresh_optimizer: bool = False
    """Forget the moments of the stage before (default: they are carried along)."""
    hooks: list[Annotated[HookSettings, ONE_HOOK]] = []
    """What takes part in the training beside the loop: `{kind: old_rates, ratio: 0}` and so on. Hooks that the change
    before brings along need not be named."""
    lora: Lora | None = None
    """Train small matrices beside the model's in place of all of it, and merge them at the end: `{rank: 8}`. The
    optimizer's moments of before are left behind, and what follows begins without any."""

    @classmethod
    def open_fields(cls) -> dict[str, type[Settings]]:
        """Settings of the training are not the stage's own."""
        return {"settings": TrainingSettings}

    @model_validator(mode="after")
    def _own_fields_beside(self) -> Self:
        for name in self.settings:
            if name in type(self).model_fields and name not in TrainingSettings.model_fields:
                raise ValueError(f"settings.{name}: {name} is a field of the stage. Write it beside settings")
        return self

    @model_validator(mode="after")
    def _hooks_once(self) -> Self:
        for number, hook in enumerate(self.hooks):
            if hook in self.hooks[:number]:
                raise ValueError(f"hooks: {hook.kind} stands twice with the same settings. Leave one out")
        return self


class ChangeStage(Settings):
    """Change the model by a method of `auxin methods`: grow it, prune it, ...; the optimizer's moments follow."""

    kind: Literal["change"]
    """Says that this is a change stage."""
    name: StageName = "change"
    """Lower case letters, digits, dots, _ and -; unique in its branch."""
    method: str | None = None
    """The method's name ("hypercloning", "llama-pro", ...)."""
    settings: dict[str, Any] = {}
    """The method's settings; a seed that is not set here is the recipe's."""
    calibration: dict[str, Any] = {}
    """Fields of CalibrationSettings: how much of the run's training split a method that looks at data sees. What is not
    set is what the method asks for. Held-out documents are never among it."""
    to: str | None = None
    """Of a TokenFormer: a preset to grow to; short for the method "tokenformer"."""
    tokens: TokenGrowth | None = None
    """Of a TokenFormer: token counts after the growth, and the regime; short for the method "tokenformer"."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ("method", "to", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a change stage takes exactly one of method, to (a preset) and tokens; given: {given or 'none'}"
            )
        if self.settings and self.method is None:
            raise ValueError("settings go with method")
        if self.calibration and self.method is None:
            raise ValueError("calibration goes with method")
        return self


class EvaluateStage(Settings):
    """Measure on the whole held-out split and write it into the ledger."""

    kind: Literal["evaluate"]
    """Says that this is an evaluate stage."""
    name: StageName = "evaluate"
    """Lower case letters, digits, dots, _ and -; unique in its branch."""


Stage = Annotated[BuildStage | TrainStage | ChangeStage | EvaluateStage, Field(discriminator="kind")]


class Branch(Settings):
    """A line of stages: from scratch, or forked from a stage of another branch."""

    name: BranchName
    """Lower case letters, digits, _ and -; names the branch's folder."""
    title: str
    """How tables and plots call it."""
    fork: str | None = None
    """"branch/stage": start from what that stage left."""
    stages: list[Stage] = Field(min_length=1, max_length=MOST_STAGES)
    """Done in this order; the first is a build, unless the branch is a fork."""

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        builds = [index for index, stage in enumerate(self.stages) if stage.kind == "build"]
        if builds != ([] if self.fork else [0]):
            raise ValueError("a branch begins with one build stage, or with `fork` and no build stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names of a branch must differ; given: {shown(names)}")
        return self

    def stage(self, name: str) -> Stage:
        """The stage of that name, which the branch has."""
        return next(stage for stage in self.stages if stage.name == name)


class Recipe(Settings):
    """Branches to train and compare on the same data."""

    name: StageName
    """Lower case letters, digits, dots, _ and -."""
    title: str
    """Heading of the report."""
    description: str = ""
    """A paragraph for the report."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds the initial weights, the data order and the growths of every branch."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63, strict=True)]] | None = Field(default=None, min_length=1)
    """Instead of `seed`: every branch runs with each of these, and what it reaches is their mean and its interval."""
    data: Annotated[DatasetSettings, OneOf(DATASETS, default="text", settings=lambda kind: kind.settings)]
    """What all branches learn and are measured on: `{kind: text, ...}`, which is the default kind, or another kind."""
    training: dict[str, Any] = {}
    """Fields of TrainingSettings shared by all train stages. Its objective is the recipe's: what new models are built
    for, and what a loss is measured of."""
    measures: list[Annotated[Measure, OneOf(MEASURES)]] = Field(default=[Loss()], min_length=1)
    """What is measured on the held-out split. Branches are compared by the first; the others are measured at the end of
    each train stage."""
    branches: list[Branch] = Field(min_length=1, max_length=MOST_BRANCHES)
    """Run in this order; a branch may refer to those above it."""
    main_branch: str | None = None
    """The branch that the others are compared with; default: the first."""
    electricity: Electricity = Electricity()
    """What the price before a run takes computing to draw and to emit."""
    _source: str = PrivateAttr(default="")

    @classmethod
    def open_fields(cls) -> dict[str, type[Settings]]:
        """Settings of the training and of the data are not the recipe's own."""
        return {"training": TrainingSettings, "data": CorpusSettings}

    @model_validator(mode="before")
    @classmethod
    def _no_former_words(cls, values: Any) -> Any:
        """Say the new word for one that recipes had before."""
        if found := former_words(values):
            raise ValueError("; ".join(found))
        return values

    @model_validator(mode="after")
    def _measures_once(self) -> Self:
        kinds = [measure.kind for measure in self.measures]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"measures must differ; given: {shown(kinds)}")
        return self

    @model_validator(mode="after")
    def _one_kind_of_seeds(self) -> Self:
        if self.seeds is not None and self.seed:
            raise ValueError(f"seed ({self.seed}) and seeds ({self.seeds}) contradict each other. Give one of them")
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ; given: {shown(self.seeds)}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # What is wrong here is said of here, and not of the stages that share it.
        has_budget = any(self.training.get(name) is not None for name in BUDGETS)
        check = TrainingSettings.parse if has_budget else TrainingSettings.parse_but_budget
        check(self.training, within="training")
        if self.objective.references():
            raise ValueError(
                f"training.objective: {self.objective.kind!r} goes by another model, and what branches are built for "
                "and compared by can't. Set it in the settings of a train stage"
            )
        known: dict[str, Branch] = {}
        for branch in self.branches:
            if branch.name in known:
                raise ValueError(f"branch names must differ; {branch.name!r} stands twice")
            if branch.fork is not None:
                self._check_fork(branch, known)
            for stage in branch.stages:
                with placed(f"{branch.name}/{stage.name}: "):
                    self._check_names(branch, stage, known)
            known[branch.name] = branch
        if self.main_branch is not None and self.main_branch not in known:
            raise ValueError("main_branch: " + unknown_name("branch", self.main_branch, known))
        return self

    def _check_names(self, branch: Branch, stage: Stage, known: dict[str, Branch]) -> None:
        """Refuse a stage that goes by a branch which is not among those above, `known`, and wrong training settings."""
        for field in ("like", "parameters_of", "flops_of"):
            other = getattr(stage, field, None)
            if other is not None and other not in known:
                raise ConfigError(f"{field}: {_unknown_branch(other, known)}")
        if isinstance(stage, TrainStage):
            self._check_references(branch, stage, {**known, branch.name: branch})

    def _check_references(self, branch: Branch, stage: TrainStage, known: dict[str, Branch]) -> None:
        """Refuse an objective that goes by a stage which is not done before this one."""
        for reference in self.references(stage):
            name, slash, other = reference.partition("/")
            if name not in known:
                continue  # the folder of a checkpoint, which is looked at when it is needed
            stages = [candidate.name for candidate in known[name].stages]
            before = stages[: stages.index(stage.name)] if name == branch.name else stages
            if not slash:
                raise ConfigError(f"settings.objective: {_no_stage_named(name, before)}")
            if other not in before:
                raise ConfigError(f"settings.objective: {reference!r}: {unknown_name('earlier stage', other, before)}")

    def references(self, stage: TrainStage) -> tuple[str, ...]:
        """The other models that the objective of a train stage goes by, as "branch/stage" or a checkpoint's folder."""
        return self.training_settings(stage, flops=1.0).objective.references()

    def checkpoints(self) -> list[tuple[str, Path]]:
        """Every checkpoint outside of the run that is named, behind the stage and the field that name it."""
        own = {branch.name for branch in self.branches}
        found: list[tuple[str, Path]] = []
        for branch in self.branches:
            for stage in branch.stages:
                if isinstance(stage, BuildStage) and stage.checkpoint is not None:
                    found.append((f"{branch.name}/{stage.name}: checkpoint", stage.checkpoint))
                elif isinstance(stage, TrainStage):
                    outside = [name for name in self.references(stage) if name.partition("/")[0] not in own]
                    found += [(f"{branch.name}/{stage.name}: settings.objective", Path(name)) for name in outside]
        return found

    @property
    def objective(self) -> ObjectiveSettings:
        """What new models are built for, what stages learn that say nothing else, and what losses are measured of.

        Raises:
            ConfigError: a wrong value.
        """
        values = self.training.get("objective", "causal")
        found: ObjectiveSettings = parse_one(ONE_OBJECTIVE, values, "training.objective")
        return found

    def read_from(self, source: str) -> Self:
        """The same recipe, of which messages say that it is written in `source`, a file."""
        found = self.model_copy()
        found._source = source
        return found

    def at(self, branch: Branch | None = None, stage: Stage | None = None) -> AbstractContextManager[None]:
        """Within the context, the message of an AuxinError begins with where it is written what the error is about: the
        recipe's file, and "branch/stage: " of a stage. What is raised within names the field."""
        source = f"{self._source}: " if self._source else ""
        return placed(source if branch is None or stage is None else f"{source}{branch.name}/{stage.name}: ")

    def form(self) -> SampleForm:
        """What the data's samples look like, as far as the settings tell.

        Raises:
            DataError: the tokenizer that they name can't be read.
        """
        with placed("data."):
            return self.data.form()

    def of_seed(self, seed: int) -> Self:
        """The recipe of a run with one seed."""
        return self.model_copy(update={"seed": seed, "seeds": None})

    def branch(self, name: str) -> Branch:
        """The branch that is called `name`.

        Raises:
            ConfigError: there is none.
        """
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise ConfigError(unknown_name("branch", name, [branch.name for branch in self.branches]))

    def needed(self, wanted: Sequence[str] | None) -> list[str]:
        """The names of the `wanted` branches (None: all) and of those that must be finished before, in order.

        Raises:
            ConfigError: one of them is not in the recipe.
        """
        chosen = {branch.name for branch in self.branches} if wanted is None else set()
        open_ones = list(wanted or [])
        while open_ones:
            name = open_ones.pop()
            if name not in chosen:
                chosen.add(name)
                open_ones += self.depends_on(self.branch(name))
        return [branch.name for branch in self.branches if branch.name in chosen]

    def depends_on(self, branch: Branch) -> set[str]:
        """The names of the branches that have to be finished before `branch` can begin: it is forked from them, or its
        stages go by their ends."""
        names = {branch.fork.partition("/")[0]} if branch.fork is not None else set()
        for stage in branch.stages:
            named = {getattr(stage, field, None) for field in ("like", "parameters_of", "flops_of")}
            if isinstance(stage, TrainStage):
                named |= {reference.partition("/")[0] for reference in self.references(stage)}
            names |= {other.name for other in self.branches if other.name in named}
        return names - {branch.name}

    def _check_fork(self, branch: Branch, known: dict[str, Branch]) -> None:
        parent, slash, stage = str(branch.fork).partition("/")
        if parent not in known:
            raise ValueError(f"{branch.name}: fork: {_unknown_branch(parent, known)}")
        stages = [candidate.name for candidate in known[parent].stages]
        if not slash:
            raise ValueError(f"{branch.name}: fork: {_no_stage_named(parent, stages)}")
        if stage not in stages:
            raise ValueError(f"{branch.name}: fork: {unknown_name('stage', stage, stages)}")

    def training_settings(self, stage: TrainStage, flops: float | None = None) -> TrainingSettings:
        """The full settings of a train stage. Messages begin with the field.

        Args:
            stage: the stage; its settings override the recipe's.
            flops: the budget of a stage that has `flops_of`, in FLOPs of this stage.

        Raises:
            ConfigError: an unknown or wrong field, or not exactly one budget.
        """
        values: dict[str, Any] = {"seed": self.seed, **self.training, **stage.settings}
        given = [_holder(stage, name) + name for name in BUDGETS if values.get(name) is not None]
        if stage.flops_of is not None:
            given.append("flops_of")
            values["flops"] = flops
        if len(given) != 1:
            TrainingSettings.parse_but_budget(values, within="settings")
            raise ConfigError(
                f"settings: give exactly one of {', '.join(BUDGETS)}, or flops_of beside settings; given: "
                f"{', '.join(given) or 'none'}"
            )
        return TrainingSettings.parse(values, within="settings")

    @staticmethod
    @contextmanager
    def at_setting(stage: TrainStage) -> Iterator[None]:
        """Within the context, the message of an AuxinError that begins with a field of `stage`'s training settings gets
        the field in front that holds it: the stage's `settings`, or the recipe's `training`."""
        try:
            yield
        except AuxinError as error:
            error.args = (_holder(stage, str(error).partition(":")[0]) + str(error), *error.args[1:])
            raise


def _holder(stage: TrainStage, name: str) -> str:
    """What stands before the field `name` of the training settings of `stage`."""
    return "settings." if name in stage.settings else "training."


def _no_stage_named(branch: str, stages: Sequence[str]) -> str:
    """Say that a branch alone was named where one of its `stages` has to be."""
    known = ", ".join(f"{branch}/{stage}" for stage in stages)
    return f"{branch!r} names a branch and no stage. Give BRANCH/STAGE" + (f", one of {known}." if known else ".")


def _unknown_branch(name: str, known: Iterable[str]) -> str:
    """Say that no branch above is called `name`."""
    if not known:
        return f"no branch stands above this one, so that none can be {shown(name)}. Move this branch below that one"
    return f"{unknown_name('branch', name, known)} Name a branch written above."
