"""What a recipe file says: stages in branches, and what the branches are compared by."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from auxin.data import CorpusSettings
from auxin.errors import ConfigError, unknown_name
from auxin.methods.grow.tokenformer import TokenGrowth
from auxin.objectives import ObjectiveSettings
from auxin.settings import Settings
from auxin.training import TrainingSettings

STAGE_NAME = r"^[a-z0-9][a-z0-9._-]*$"
"""A stage's name is part of a folder's."""

OBJECTIVE_FIELDS = tuple(ObjectiveSettings.model_fields)
"""Settings of training that all stages have alike: losses under another objective can't be compared."""

BUDGETS = ("steps", "tokens", "flops", "flops_of")


class BuildStage(Settings):
    """Start a branch: with a new model, or with a checkpoint whose moments and books are carried along."""

    kind: Literal["build"]
    """Says that this is a build stage."""
    name: str = Field(default="build", pattern=STAGE_NAME)
    """Lower case letters, digits, dots, _ and -; unique in its branch."""
    preset: str | None = None
    """A TokenFormer preset by name ("124m", "pile-450m", ...)."""
    model_type: str | None = None
    """A transformers model type ("tokenformer", "gpt_neox", "llama", "t5", ...), configured by `config`."""
    config: dict[str, Any] = {}
    """Fields of the model's config; the vocabulary and the special tokens come from the corpus."""
    pad_to_multiple_of: int = Field(default=1, ge=1)
    """Rows of the embedding table are padded to a multiple of this; rows beyond the tokenizer's are unused, but for the
    sentinels of span corruption."""
    checkpoint: Path | None = None
    """A checkpoint folder to start from; any local Hugging Face causal language model, or an encoder-decoder."""
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
    name: str = Field(pattern=STAGE_NAME)
    """Lower case letters, digits, dots, _ and -; unique in its branch."""
    flops_of: str | None = None
    """Train until this branch's total training FLOPs (its ancestors and earlier stages included) equal that one's."""
    settings: dict[str, Any] = {}
    """Fields of TrainingSettings that this stage sets, its budget (steps, tokens or flops) among them. The objective is
    the same for all stages and stands in the recipe's `training`."""
    fresh_optimizer: bool = False
    """Forget the moments of the stage before (default: they are carried along)."""
    tau_anneal_steps: int = Field(default=0, ge=0)
    """After a growth with the regime "annealed": steps over which the score scale goes to the grown size's."""
    old_tokens_rate: float = Field(default=1.0, ge=0.0, le=1.0)
    """Learning rate of a TokenFormer's tokens from before the last growth, relative to the new ones'; 0 freezes
    them."""
    old_rate: float = Field(default=1.0, ge=0.0, le=1.0)
    """Learning rate of everything from before the last growth, embeddings and norms included, relative to what is new;
    0 freezes it, as LLaMA Pro does with all but its new layers."""
    old_rate_steps: int | None = Field(default=None, ge=1)
    """Steps of this stage for which `old_tokens_rate` and `old_rate` hold; None: all."""
    exact_rates: bool = False
    """After a growth that carried the moments: rates at which AdamW goes on exactly as it would have in the small model
    (readers of n copies learn n times slower). Copies then never part, so this is for comparing and checking."""


class GrowStage(Settings):
    """Grow the model by a method of `auxin methods`; the optimizer's moments follow."""

    kind: Literal["grow"]
    """Says that this is a grow stage."""
    name: str = Field(default="grow", pattern=STAGE_NAME)
    """Lower case letters, digits, dots, _ and -; unique in its branch."""
    method: str | None = None
    """The method's name ("hypercloning", "llama-pro", ...)."""
    settings: dict[str, Any] = {}
    """The method's settings; a seed that is not set here is the recipe's."""
    calibration: dict[str, Any] = {}
    """Fields of CalibrationSettings: how much of the run's training split a method that looks at data sees. What is not
    set is what the method asks for. Held-out documents are never among it."""
    to: str | None = None
    """Of a TokenFormer: a preset to grow to."""
    tokens: TokenGrowth | None = None
    """Of a TokenFormer: token counts after the growth, and the regime; short for the method "tokenformer"."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ("method", "to", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a grow stage takes exactly one of method, to (a preset) and tokens; given: {given or 'none'}"
            )
        if self.settings and self.method is None:
            raise ValueError("settings go with method")
        if self.calibration and self.method is None:
            raise ValueError("calibration goes with method")
        return self


class EvaluateStage(Settings):
    """Measure the loss on the whole held-out split and write it into the ledger."""

    kind: Literal["evaluate"]
    """Says that this is an evaluate stage."""
    name: str = Field(default="evaluate", pattern=STAGE_NAME)
    """Lower case letters, digits, dots, _ and -; unique in its branch."""


Stage = Annotated[BuildStage | TrainStage | GrowStage | EvaluateStage, Field(discriminator="kind")]


class Branch(Settings):
    """A line of stages: from scratch, or forked from a stage of another branch."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Lower case letters, digits, _ and -; names the branch's folder."""
    title: str
    """How tables and plots call it."""
    fork: str | None = None
    """"branch/stage": start from what that stage left."""
    stages: list[Stage] = Field(min_length=1)
    """Done in this order; the first is a build, unless the branch is a fork."""

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        builds = [index for index, stage in enumerate(self.stages) if stage.kind == "build"]
        if builds != ([] if self.fork else [0]):
            raise ValueError("a branch begins with one build stage, or with `fork` and no build stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names of a branch must differ; given: {names}")
        return self


class Recipe(Settings):
    """Branches to train and compare on the same data."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Lower case letters, digits, dots, _ and -."""
    title: str
    """Heading of the report."""
    description: str = ""
    """A paragraph for the report."""
    seed: int = Field(default=0, ge=0)
    """Seeds the initial weights, the data order and the growths of every branch."""
    corpus: CorpusSettings
    """The text that all branches learn and are measured on."""
    training: dict[str, Any] = {}
    """Fields of TrainingSettings shared by all train stages."""
    branches: list[Branch] = Field(min_length=1)
    """Run in this order; a branch may refer to those above it."""
    main_branch: str | None = None
    """The branch that the others are compared with; default: the first."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known: dict[str, Branch] = {}
        for branch in self.branches:
            if branch.name in known:
                raise ValueError(f"branch names must differ; {branch.name!r} stands twice")
            if branch.fork is not None:
                self._check_fork(branch, known)
            for stage in branch.stages:
                for field in ("like", "parameters_of", "flops_of"):
                    other = getattr(stage, field, None)
                    if other is not None and other not in known:
                        message = unknown_name("branch", other, known)
                        raise ValueError(f"{branch.name}/{stage.name}: {field}: {message} Name a branch written above.")
                if isinstance(stage, TrainStage):
                    self._check_objective(branch, stage)
                    self.training_settings(stage, flops=1.0)
            known[branch.name] = branch
        if self.main_branch is not None and self.main_branch not in known:
            raise ValueError("main_branch: " + unknown_name("branch", self.main_branch, known))
        return self

    def _check_objective(self, branch: Branch, stage: TrainStage) -> None:
        if own := [name for name in OBJECTIVE_FIELDS if name in stage.settings]:
            raise ValueError(
                f"{branch.name}/{stage.name}: settings: {own[0]} ({stage.settings[own[0]]!r}) is the same for all "
                f"stages, whose losses could not be compared otherwise. Write it as training.{own[0]} of the recipe."
            )

    @property
    def objective(self) -> ObjectiveSettings:
        """What all train stages learn, and what every evaluation measures.

        Raises:
            ConfigError: a wrong value.
        """
        values = {name: self.training[name] for name in OBJECTIVE_FIELDS if name in self.training}
        return ObjectiveSettings.parse(values, source="training")

    def _check_fork(self, branch: Branch, known: dict[str, Branch]) -> None:
        parent, _, stage = str(branch.fork).partition("/")
        if parent not in known:
            raise ValueError(
                f"{branch.name}: fork: {unknown_name('branch', parent, known)} Name a branch written above."
            )
        stages = [candidate.name for candidate in known[parent].stages]
        if stage not in stages:
            raise ValueError(f"{branch.name}: fork: {unknown_name('stage', stage, stages)}")

    def training_settings(self, stage: TrainStage, flops: float | None = None) -> TrainingSettings:
        """The full settings of a train stage.

        Args:
            stage: the stage; its settings override the recipe's.
            flops: the budget of a stage that has `flops_of`, in FLOPs of this stage.

        Raises:
            ConfigError: an unknown or wrong field, or not exactly one budget.
        """
        values: dict[str, Any] = {"seed": self.seed, **self.training, **stage.settings}
        given = [name for name in BUDGETS[:3] if values.get(name) is not None]
        if stage.flops_of is not None:
            given.append("flops_of")
            values["flops"] = flops
        if len(given) != 1:
            raise ConfigError(f"{stage.name}: give exactly one of {', '.join(BUDGETS)}; given: {given or 'none'}")
        return TrainingSettings.parse(values, source=f"train stage {stage.name!r}")
