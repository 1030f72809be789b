"""Settings of one training stage."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from auxin.data.dataset import SampleForm
from auxin.errors import ConfigError
from auxin.objectives import ObjectiveSettings
from auxin.objectives.causal import Causal
from auxin.objectives.objective import OBJECTIVES
from auxin.settings import Settings
from auxin.words.one_of import OneOf


class GuardSettings(Settings):
    """What counts as a bad step, and what to do about it.

    A non-finite loss or gradient is always bad. A finite loss is bad when it lies more than `spike_multiple` robust
    standard deviations (1.4826 times the median absolute deviation) above the median of the last `window` good losses.
    """

    action: Literal["skip", "rewind"] = "skip"
    """skip: leave this batch's update out and go on. rewind: go back to the weights of the last periodic checkpoint (or
    of the start) and go on with the batch after the bad one."""
    spike_multiple: float | None = Field(default=10.0, gt=0)
    """Robust standard deviations above the median that a loss may lie; None looks for non-finite values only."""
    window: int = Field(default=128, ge=2)
    """Good losses that are remembered."""
    minimum_history: int = Field(default=32, ge=2)
    """Good losses needed before a finite loss can be called a spike."""
    minimum_spread: float = Field(default=0.02, ge=0)
    """Least standard deviation to reckon with, in nats, so that a very smooth run is not stopped by a ripple."""
    maximum_events: int = Field(default=3, ge=0)
    """Training stops when more bad steps than this lie within `window` batches."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minimum_history > self.window:
            raise ValueError(
                f"minimum_history ({self.minimum_history}) is larger than window ({self.window}), so that no spike "
                "could be found. Lower it."
            )
        return self


LARGEST = 10**15
"""Of a budget: a hundred times the tokens of the largest trainings of today, and a time that can still be written."""
MOST_SAMPLES = 10**6
"""In a step."""
MOST_WORKERS = 1000
BUDGETS = ("steps", "tokens", "samples", "flops")
"""Fields of which exactly one is a stage's budget."""


class TrainingSettings(Settings):
    """How to train; the budget is exactly one of `steps`, `tokens`, `samples` and `flops`."""

    objective: Annotated[ObjectiveSettings, OneOf(OBJECTIVES)] = Causal()
    """What is learnt: `causal`, or `{kind: span_corruption, noise_density: 0.2}`; see the page on objectives."""
    steps: int | None = Field(default=None, ge=1, le=LARGEST)
    """Optimizer steps."""
    tokens: int | None = Field(default=None, ge=1, le=LARGEST)
    """Training tokens, for data whose unit they are: tokens of text, also where an objective hides some; rounded to
    whole steps, at least one."""
    samples: int | None = Field(default=None, ge=1, le=LARGEST)
    """Samples to train on, counted as often as they are seen: contexts of packed text, labelled texts, images; rounded
    to whole steps, at least one."""
    flops: float | None = Field(default=None, gt=0, le=1e30)
    """Training FLOPs (forward and backward); rounded to whole steps, at least one."""
    batch_size: int = Field(default=32, ge=1, le=MOST_SAMPLES)
    """Samples per optimizer step: contexts of packed text, labelled texts, images."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward pass; gradients are accumulated over the batch, every target weighing the same. None is
    `batch_size`."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warmup, stable, linear decay. All start with the warmup, so a stage after a growth re-warms."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warmup at the start of this stage."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps over which wsd decays at the end; 0 leaves the model in the stable phase, to be trained on."""
    minimum_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where decay and cosine end, as a fraction of `learning_rate`."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms, biases and other vectors have none."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest L2 norm of all gradients together; None does not clip."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products (autocast; weights stay float32). auto: bfloat16 on CUDA where it has it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    compile: bool = False
    """Run the model through torch.compile."""
    activation_checkpointing: bool = False
    """Keep the inputs of layers alone, and compute each layer again in the backward pass: less memory, up to a third
    more time, the same numbers to the bit. What is computed again is not counted in FLOPs."""
    strategy: Literal["auto", "replicated", "sharded", "hybrid", "tensor"] = "auto"
    """How the model lies in several processes that torchrun has started. replicated: a copy in each. sharded:
    parameters, gradients and moments in pieces (FSDP2). hybrid: in the pieces of each machine, so that layers are
    gathered within a machine. tensor: in pieces, each of which computes its part of a layer for the whole batch (tensor
    parallelism). auto: sharded on CUDA where nothing stands against it, else replicated. Without meaning for one
    process."""
    processes_per_copy: int | None = Field(default=None, ge=1)
    """Processes that have a copy between them where the strategy is hybrid; they divide all. None: those of a
    machine."""
    gather_once: bool = False
    """In pieces (sharded, hybrid): layers stay whole from the first forward pass of a step to its last backward pass,
    in place of being gathered twice in each. Less is sent; a process holds all weights whole in a step."""
    num_workers: int = Field(default=0, ge=0, le=MOST_WORKERS)
    """Processes that read batches ahead of the training; 0 reads them in the training's own. The order of samples does
    not depend on it."""
    evaluation_interval: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the validation split; None evaluates only at the start and at the end."""
    evaluation_batches: int | None = Field(default=None, ge=1)
    """Micro-batches of the evaluations from the start to the end, always the same ones; None is the whole split, which
    is measured at the end in any case."""
    checkpoint_interval: int | None = Field(default=500, ge=1)
    """Steps between periodic checkpoints; None writes one at the start and one at the end only."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; the guard's rewind target stays in any case."""
    log_interval: int = Field(default=10, ge=1)
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the data order, of dropout and of an objective's noise in training; held-out noise is always the same."""
    guard: GuardSettings = GuardSettings()
    """Protection against bad steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"the budget needs exactly one of {', '.join(BUDGETS)}, not {given or 'none of them'}.")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) is larger than batch_size ({self.batch_size}). Lower it."
            )
        if self.processes_per_copy is not None and self.strategy != "hybrid":
            raise ValueError(
                f"processes_per_copy ({self.processes_per_copy}) has a meaning for strategy: hybrid alone, not for "
                f"{self.strategy}. Leave it out."
            )
        if self.gather_once and self.strategy in ("replicated", "tensor"):
            raise ValueError(
                f"gather_once has no meaning for strategy: {self.strategy}, which gathers nothing. Leave it out."
            )
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"adam_betas {self.adam_betas} must lie in [0, 1).")
        return self

    @classmethod
    def parse_but_budget(cls, values: Mapping[str, Any], source: str | None = None, within: str = "") -> Self:
        """As `parse`, of values that may have no budget, or several: what is wrong with the others is found, of which a
        misspelt budget is one."""
        return cls.parse({**values, **dict.fromkeys(BUDGETS), "steps": 1}, source, within)

    @property
    def samples_per_forward(self) -> int:
        """The micro-batch size in effect."""
        return self.micro_batch_size or self.batch_size

    def total_steps(self, form: SampleForm, flops_per_sample: float) -> int:
        """Optimizer steps that the budget buys: the nearest whole number, at least one.

        Args:
            form: of the samples.
            flops_per_sample: training FLOPs of one.

        Raises:
            ConfigError: the schedule's warmup and decay do not fit into the steps, or the budget is in another unit
                than the data's.
        """
        if self.steps is not None:
            steps = self.steps
        else:
            steps = max(1, round(self._samples(form, flops_per_sample) / self.batch_size))
        decay = self.decay_steps(steps)
        if self.warmup_steps + decay > steps:
            raise ConfigError(
                f"warmup_steps: {self.warmup_steps} of warmup and {decay} of decay do not fit into the {steps} steps "
                "of this stage. Lower warmup_steps or decay_fraction, or raise the budget."
            )
        return steps

    def _samples(self, form: SampleForm, flops_per_sample: float) -> float:
        """Samples that a budget other than steps buys."""
        if self.samples is not None:
            return self.samples
        if self.flops is not None:
            return self.flops / flops_per_sample
        assert self.tokens is not None
        if form.unit != "token":
            raise ConfigError(
                f"tokens: {self.tokens} is no budget for data that is counted in {form.unit}s. Give samples, steps or "
                "flops."
            )
        return self.tokens / form.units

    def decay_steps(self, total_steps: int) -> int:
        """Steps of the decay phase of wsd; 0 for the other schedules."""
        return round(self.decay_fraction * total_steps) if self.schedule == "wsd" else 0
