"""The price of a recipe before it runs: parameters, tokens, FLOPs and memory of every stage."""

from transformers import PreTrainedConfig

from auxin.accounting import FlopsPerToken, Ledger, count_parameters, training_memory
from auxin.accounting.ledger import LEDGER_FILE
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError
from auxin.objectives import ObjectiveSettings
from auxin.objectives.calibration import CalibrationSettings
from auxin.objectives.objective import is_encoder_decoder, objective_flops
from auxin.recipes.schema import Branch, BuildStage, GrowStage, Recipe, Stage, TrainStage
from auxin.recipes.stage_models import StageConfigs, estimated_stages, growth_data, stage_configs
from auxin.settings import Settings


class StagePrice(Settings):
    """What one stage will cost."""

    branch: str
    stage: str
    kind: str
    parameters: int
    """Of the model that the stage leaves."""
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    """Training FLOPs, forward and backward."""
    memory_bytes: int | None = None
    """Of one process that holds the whole model: float32 weights, gradients and moments, and the activations of one
    micro-batch in float32 without checkpointing."""
    estimate: bool = False
    """Whether these numbers may come out differently: a method before or in this stage, or in a branch that it goes by,
    decides by looking at weights. What such a method looks at is priced as if it learned from each of its samples
    once."""


class RecipePrice(Settings):
    """What a recipe will cost; printed as a table."""

    name: str
    stages: list[StagePrice]
    branch_flops: dict[str, float]
    """Training FLOPs of every branch, those before its fork included."""

    def __str__(self) -> str:
        rows = [("branch", "stage", "parameters", "steps", "tokens", "training FLOPs", "memory")]
        for stage in self.stages:
            costs = ("", "", "", "")
            if stage.tokens:
                memory = "" if stage.memory_bytes is None else f"{stage.memory_bytes / 2**30:.2f} GiB"
                costs = (f"{stage.steps:,}" if stage.steps else "", f"{stage.tokens:,}", f"{stage.flops:.3g}", memory)
            kind = f"{stage.kind}, an estimate" if stage.estimate else stage.kind
            rows.append((stage.branch, f"{stage.stage} ({kind})", f"{stage.parameters:,}", *costs))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        if any(stage.estimate for stage in self.stages):
            lines += [
                "",
                "An estimate: a method looks at weights, and what it makes and costs is known when it has run.",
            ]
        lines += ["", "Training FLOPs of each branch, those before its fork included:"]
        return "\n".join([*lines, *(f"  {name}  {flops:.3g}" for name, flops in self.branch_flops.items())])


def price_recipe(recipe: Recipe, memory: bool = True, vocabulary: dict[str, int] | None = None) -> RecipePrice:
    """Price every stage of `recipe` on shapes alone; nothing is read, trained or written.

    Args:
        recipe: the recipe.
        memory: count the memory too, which takes longer than all the rest.
        vocabulary: config fields that the corpus decides, where they are known. None: where the recipe loads a
            tokenizer, models keep their own vocabulary size; where it trains one, the size asked for counts (a small
            corpus may not fill it).

    Raises:
        ConfigError, PlanError: the recipe can't be run as it stands.
    """
    known = None if vocabulary is None else vocabulary.get("vocab_size")
    if vocabulary is None:
        vocabulary = {} if recipe.corpus.tokenizer is not None else {"vocab_size": recipe.corpus.vocab_size}
    return _Pricing(recipe, stage_configs(recipe, vocabulary), memory, known).price()


class _Pricing:
    """Follows a recipe's branches; a model is counted once however many stages train it."""

    def __init__(self, recipe: Recipe, structures: StageConfigs, memory: bool, tokenizer_size: int | None) -> None:
        self.recipe, self.structures, self.memory, self.tokenizer_size = recipe, structures, memory, tokenizer_size
        self.estimated = estimated_stages(recipe)
        self.spent: dict[tuple[str, str], float] = {}
        self.costs: dict[str, tuple[int, FlopsPerToken]] = {}

    def price(self) -> RecipePrice:
        stages: list[StagePrice] = []
        totals: dict[str, float] = {}
        for branch in self.recipe.branches:
            parent, _, stage = (branch.fork or "").partition("/")
            stages += self._branch(branch, self.spent[parent, stage] if parent else 0.0, totals)
            totals[branch.name] = self.spent[branch.name, branch.stages[-1].name]
        return RecipePrice(name=self.recipe.name, stages=stages, branch_flops=totals)

    def _branch(self, branch: Branch, flops: float, totals: dict[str, float]) -> list[StagePrice]:
        prices = []
        for stage in branch.stages:
            config = self.structures[branch.name][stage.name]
            parameters, per_token = self._cost(config)
            if (
                isinstance(stage, BuildStage)
                and stage.checkpoint is not None
                and (stage.checkpoint / LEDGER_FILE).exists()
            ):
                flops = Ledger.load(stage.checkpoint).total_flops
            price = StagePrice(
                branch=branch.name,
                stage=stage.name,
                kind=stage.kind,
                parameters=parameters,
                estimate=self._is_estimate(branch, stage),
            )
            if isinstance(stage, GrowStage) and (asked := growth_data(stage)) is not None:
                tokens = asked.samples * self._length(f"{branch.name}/{stage.name}: ", asked)
                price = price.model_copy(update={"tokens": tokens, "flops": tokens * per_token.training})
                flops += price.flops
            if not isinstance(stage, BuildStage):
                self._check_objective(f"{branch.name}/{stage.name}: ", config)
            if isinstance(stage, TrainStage):
                budget = None
                if stage.flops_of is not None:
                    budget = remaining_flops(stage, totals[stage.flops_of], flops)
                settings = self.recipe.training_settings(stage, flops=budget)
                length = self.recipe.corpus.context_length
                steps = settings.total_steps(length, per_token.training)
                tokens = steps * settings.batch_size * length
                price = price.model_copy(
                    update={
                        "steps": steps,
                        "tokens": tokens,
                        "flops": tokens * per_token.training,
                        "memory_bytes": self._memory(config, settings.sequences_per_forward),
                    }
                )
                flops += price.flops
            self.spent[branch.name, stage.name] = flops
            prices.append(price)
        return prices

    def _is_estimate(self, branch: Branch, stage: Stage) -> bool:
        """Whether the stage's model is an estimate, or that of the branch that its budget goes by."""
        other = next((one for one in self.recipe.branches if one.name == getattr(stage, "flops_of", None)), None)
        return (branch.name, stage.name) in self.estimated or (
            other is not None and (other.name, other.stages[-1].name) in self.estimated
        )

    def _length(self, where: str, asked: CalibrationSettings) -> int:
        """Tokens of a sample."""
        try:
            return asked.checked_length(self.recipe.corpus.context_length, "corpus.context_length")
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error

    def _cost(self, config: PreTrainedConfig) -> tuple[int, FlopsPerToken]:
        key = config.to_json_string()
        if key not in self.costs:
            model = edited_skeleton(config)
            # A model that nothing trains may be of any kind.
            objective = self.recipe.objective if is_encoder_decoder(config) else ObjectiveSettings()
            self.costs[key] = (
                count_parameters(model).total,
                objective_flops(model, objective, self.recipe.corpus.context_length),
            )
        return self.costs[key]

    def _memory(self, config: PreTrainedConfig, micro_batch_size: int) -> int | None:
        if not self.memory:
            return None
        length = self.recipe.corpus.context_length
        lengths = self.recipe.objective.lengths(length)
        encoder, decoder = (length, None) if lengths is None else (lengths.inputs, lengths.targets)
        return training_memory(edited_skeleton(config), micro_batch_size, encoder, decoder).total

    def _check_objective(self, where: str, config: PreTrainedConfig) -> None:
        objective, length = self.recipe.objective, self.recipe.corpus.context_length
        try:
            objective.check_architecture(config)
            objective.check_positions(config, length, "corpus.context_length")
            if self.tokenizer_size is not None:
                objective.corruption(config, self.tokenizer_size, length)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error


def remaining_flops(stage: TrainStage, total: float, spent: float) -> float:
    """The budget of a stage with `flops_of`: what is left of that branch's `total` when `spent` was used before.

    Raises:
        ConfigError: nothing is left.
    """
    if total <= spent:
        raise ConfigError(
            f"{stage.name}: flops_of: {stage.flops_of!r} used no more FLOPs than were used before ({total:.4g} and "
            f"{spent:.4g}). Name a branch that is trained longer, or give steps or tokens."
        )
    return total - spent
