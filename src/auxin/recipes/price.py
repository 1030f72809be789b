"""The price of a recipe before it runs: parameters, data, FLOPs and memory of every stage, and what is emitted where
the time is known."""

from pydantic import computed_field
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.accounting import Electricity, Ledger, count_parameters, training_memory
from auxin.accounting.ledger import LEDGER_FILE
from auxin.accounting.memory import FLOAT32_BYTES, TrainingMemory
from auxin.accounting.recomputation import check_recomputable
from auxin.data.dataset import SampleForm
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError
from auxin.objectives import ObjectiveSettings, References
from auxin.objectives.objective import Objective
from auxin.recipes.references import reference_shapes
from auxin.recipes.schema import Branch, BuildStage, ChangeStage, Recipe, Stage, TrainStage
from auxin.recipes.stage_models import StageConfigs, change_data, estimated_stages, stage_configs
from auxin.settings import Settings
from auxin.training.lora import Lora, add_lora
from auxin.training.progress import hours


class StagePrice(Settings):
    """What one stage will cost."""

    branch: str
    stage: str
    kind: str
    parameters: int
    """Of the model that the stage leaves."""
    steps: int = 0
    units: int = 0
    """Units of data: tokens, examples, ..."""
    flops: float = 0.0
    """Training FLOPs, forward and backward."""
    memory_bytes: int | None = None
    """Of one process that holds the whole model: float32 weights, gradients and moments, and the activations of one
    micro-batch in float32; and the weights of a teacher."""
    seconds: float | None = None
    """Of the stage's steps on this machine, where they were timed."""
    estimate: bool = False
    """Whether these numbers may come out differently: a method before or in this stage, or in a branch that it goes by,
    decides by looking at weights. What such a method looks at is priced as if the larger of the models before and
    after learned from each of its samples once."""


class RecipePrice(Settings):
    """What a recipe will cost; printed as a table."""

    name: str
    unit: str = "token"
    """Of the data, in the singular."""
    stages: list[StagePrice]
    branch_flops: dict[str, float]
    """Training FLOPs of every branch, those before its fork included."""
    electricity: Electricity = Electricity()
    """What computing is taken to draw and to emit; of this machine, where it is not given."""

    def __str__(self) -> str:
        rows = [*self.table()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.notes()])

    def table(self) -> list[list[str]]:
        """The stages as a table, its header first; columns in the order of what matters."""
        rows = [["stage", "time, about", "training FLOPs", "memory", "parameters", "steps", f"{self.unit}s"]]
        for stage in self.stages:
            kind = f"{stage.kind}, an estimate" if stage.estimate else stage.kind
            costs, data = ["", "", ""], ["", ""]
            if stage.units:
                memory = "" if stage.memory_bytes is None else f"{stage.memory_bytes / 2**30:.2f} GiB"
                costs = [hours(stage.seconds), f"{stage.flops:.3g}", memory]
                data = [f"{stage.steps:,}" if stage.steps else "", f"{stage.units:,}"]
            rows.append([f"{stage.branch}/{stage.stage} ({kind})", *costs, f"{stage.parameters:,}", *data])
        return rows

    def notes(self) -> list[str]:
        """What is said below the table."""
        lines = []
        if any(stage.estimate for stage in self.stages):
            lines += [
                "",
                "An estimate: a method looks at weights, and what it makes and costs is known when it has run.",
            ]
        lines += ["", "Training FLOPs of each branch, those before its fork included:"]
        lines += [f"  {name}  {flops:.3g}" for name, flops in self.branch_flops.items()]
        if self.seconds is not None:
            lines += ["", f"The steps of all stages take about {hours(self.seconds)} on this machine. {ON_TOP}"]
        if any(stage.kind == "train" for stage in self.stages):
            lines += [
                f"{self.electricity.arithmetic(self.seconds)}{ASSUMED if self.kilograms_co2e is not None else ''}"
            ]
        return lines

    @property
    def seconds(self) -> float | None:
        """Of the steps of all stages, one after the other; None where they were not timed."""
        timed = [stage.seconds for stage in self.stages if stage.kind == "train"]
        return None if not timed or None in timed else sum(second or 0.0 for second in timed)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kilowatt_hours(self) -> float | None:
        """Energy of these steps; None where time or power is not known."""
        return self.electricity.kilowatt_hours(self.seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kilograms_co2e(self) -> float | None:
        """kg of CO2 equivalents that it takes to make it; None where they are not known."""
        return self.electricity.kilograms(self.seconds)


ON_TOP = "Evaluations, checkpoints, changes and preparing the data come on top."
ASSUMED = ", by what electricity.watts, .pue and .grams_per_kwh say"


def price_recipe(
    recipe: Recipe,
    memory: bool = True,
    form: SampleForm | None = None,
    structures: StageConfigs | None = None,
) -> RecipePrice:
    """Price every stage of `recipe` on shapes alone; nothing is read, trained or written.

    Args:
        recipe: the recipe.
        memory: count the memory too, which takes longer than all the rest.
        form: of the data's samples, where the data is prepared. None: as far as its settings tell; where a tokenizer is
            to be trained, the size asked for counts (a small corpus may not fill it).
        structures: `stage_configs` of both, where they are known.

    Raises:
        ConfigError, PlanError: the recipe can't be run as it stands.
    """
    if form is None:
        with recipe.at():
            form = recipe.form()
    return _Pricing(recipe, structures or stage_configs(recipe, form), memory, form).price()


class _Pricing:
    """Follows a recipe's branches; what a model costs under an objective is counted once, however many stages train
    it."""

    def __init__(self, recipe: Recipe, structures: StageConfigs, memory: bool, form: SampleForm) -> None:
        self.recipe, self.structures, self.memory, self.form = recipe, structures, memory, form
        self.estimated = estimated_stages(recipe)
        self.spent: dict[tuple[str, str], float] = {}
        self.parameters: dict[str, int] = {}
        self.flops: dict[tuple[str, str], float] = {}

    def price(self) -> RecipePrice:
        stages: list[StagePrice] = []
        totals: dict[str, float] = {}
        for branch in self.recipe.branches:
            parent, _, stage = (branch.fork or "").partition("/")
            stages += self._branch(branch, self.spent[parent, stage] if parent else 0.0, totals)
            totals[branch.name] = self.spent[branch.name, branch.stages[-1].name]
        return RecipePrice(
            name=self.recipe.name,
            unit=self.form.unit,
            stages=stages,
            branch_flops=totals,
            electricity=self.recipe.electricity.drawn(),
        )

    def _branch(self, branch: Branch, flops: float, totals: dict[str, float]) -> list[StagePrice]:
        prices = []
        for stage in branch.stages:
            if (
                isinstance(stage, BuildStage)
                and stage.checkpoint is not None
                and (stage.checkpoint / LEDGER_FILE).exists()
            ):
                flops = Ledger.load(stage.checkpoint).total_flops
            with self.recipe.at(branch, stage):
                prices.append(self._stage(branch, stage, flops, totals))
            flops += prices[-1].flops
            self.spent[branch.name, stage.name] = flops
        return prices

    def _stage(self, branch: Branch, stage: Stage, spent: float, totals: dict[str, float]) -> StagePrice:
        config = self.structures[branch.name][stage.name]
        price = StagePrice(
            branch=branch.name,
            stage=stage.name,
            kind=stage.kind,
            parameters=self._parameters(config),
            estimate=self._is_estimate(branch, stage),
        )
        if isinstance(stage, ChangeStage) and (asked := change_data(stage)) is not None:
            form = asked.shortened(self.form, "data.context_length")
            # What is pruned is looked at before, and what is grown may learn as what it becomes.
            models = (self._before(branch, stage), config)
            per_sample = max(self._flops(one, self.recipe.objective, form) for one in models)
            price = price.model_copy(update={"units": form.amount(asked.samples), "flops": asked.samples * per_sample})
        if isinstance(stage, TrainStage):
            return self._trained(branch, price, stage, config, spent, totals)
        if not isinstance(stage, BuildStage) or stage.checkpoint is not None:
            self._check_compared(config)
        return price

    def _check_compared(self, config: PreTrainedConfig) -> None:
        """Refuse a model that can't be measured by what branches are compared by; ConfigError."""
        objective = self.recipe.objective.bind(config, self.form)
        for measure in self.recipe.measures:
            measure.check(objective)

    def _before(self, branch: Branch, stage: Stage) -> PreTrainedConfig:
        """The config of the model that `stage`, which is no build, starts from."""
        place = branch.stages.index(stage)
        name, _, before = (branch.fork or "").partition("/")
        return self.structures[branch.name][branch.stages[place - 1].name] if place else self.structures[name][before]

    def _trained(
        self,
        branch: Branch,
        price: StagePrice,
        stage: TrainStage,
        config: PreTrainedConfig,
        spent: float,
        totals: dict[str, float],
    ) -> StagePrice:
        """`price` with what a train stage costs."""
        budget = remaining_flops(stage, totals[stage.flops_of], spent) if stage.flops_of is not None else None
        settings = self.recipe.training_settings(stage, flops=budget)
        self._check_compared(config)
        references = reference_shapes(self.recipe, self.structures, branch, stage, settings.objective)
        per_sample = self._flops(config, settings.objective, self.form, references, stage.lora)
        with self.recipe.at_setting(stage):
            steps = settings.total_steps(self.form, per_sample)
            if again := settings.activation_checkpointing:
                check_recomputable(trained_skeleton(config, stage.lora))
        samples = steps * settings.batch_size
        memory = None
        if self.memory:
            objective = settings.objective.bind(config, self.form, references)
            skeleton = trained_skeleton(config, stage.lora)
            memory = pass_memory(skeleton, objective, settings.samples_per_forward, again).total
            memory += reference_bytes(references)
        return price.model_copy(
            update={
                "steps": steps,
                "units": self.form.amount(samples),
                "flops": samples * per_sample,
                "memory_bytes": memory,
            }
        )

    def _is_estimate(self, branch: Branch, stage: Stage) -> bool:
        """Whether the stage's model is an estimate, that of the branch that its budget goes by, or one that its
        objective goes by."""
        ends = {one.name: (one.name, one.stages[-1].name) for one in self.recipe.branches}
        others = [ends[name] for name in (getattr(stage, "flops_of", None),) if name is not None]
        if isinstance(stage, TrainStage):
            others += [(name.partition("/")[0], name.partition("/")[2]) for name in self.recipe.references(stage)]
        return not self.estimated.isdisjoint([(branch.name, stage.name), *others])

    def _parameters(self, config: PreTrainedConfig) -> int:
        key = config.to_json_string()
        if key not in self.parameters:
            self.parameters[key] = count_parameters(edited_skeleton(config)).total
        return self.parameters[key]

    def _flops(
        self,
        config: PreTrainedConfig,
        objective: ObjectiveSettings,
        form: SampleForm,
        references: References | None = None,
        lora: Lora | None = None,
    ) -> float:
        """Of learning from one sample."""
        key = config.to_json_string(), f"{objective.model_dump_json()} {form.length} {lora}"
        if key not in self.flops:
            skeleton = trained_skeleton(config, lora)
            self.flops[key] = objective.bind(config, form, references).training_flops(skeleton)
        return self.flops[key]


def trained_skeleton(config: PreTrainedConfig, lora: Lora | None) -> PreTrainedModel:
    """What a stage trains, without weights.

    Raises:
        ConfigError: such a model can't have the LoRA.
    """
    model = edited_skeleton(config)
    if lora is not None:
        add_lora(model, lora, seed=0)
    return model


def pass_memory(model: PreTrainedModel, objective: Objective, samples: int, recompute: bool = False) -> TrainingMemory:
    """Bytes to train `model`, without weights, on so many samples in a forward pass, whose layers the backward pass
    computes again or not."""
    inputs = {**objective.example(samples), **objective.call}
    return training_memory(model, samples, inputs=inputs, recompute=recompute)


def reference_bytes(references: References) -> int:
    """Bytes of the other models that an objective goes by, in float32."""
    return sum(FLOAT32_BYTES * count_parameters(other.model).total for other in references.values())


def remaining_flops(stage: TrainStage, total: float, spent: float) -> float:
    """The budget of a stage with `flops_of`: what is left of that branch's `total` when `spent` was used before.
    Messages begin with the field.

    Raises:
        ConfigError: nothing is left.
    """
    if total <= spent:
        raise ConfigError(
            f"flops_of: {stage.flops_of!r} used no more FLOPs than were used before ({total:.4g} and "
            f"{spent:.4g}). Name a branch that is trained longer, or give steps or tokens."
        )
    return total - spent
