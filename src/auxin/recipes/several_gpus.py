"""What the training stages of a recipe would take on several GPUs: memory of each, what goes between them, and the time
of a step. Computed on shapes and from data sheets; nothing of it is measured."""

import math
from dataclasses import dataclass
from typing import Literal

from auxin.errors import ConfigError, unknown_name
from auxin.recipes.price import pass_memory, price_recipe, reference_bytes, trained_skeleton
from auxin.recipes.process_costs import Layout, ProcessCosts, converted_bytes, process_costs
from auxin.recipes.references import reference_shapes
from auxin.recipes.schema import Recipe, TrainStage
from auxin.recipes.stage_models import stage_configs
from auxin.settings import Settings
from auxin.training.hardware import PEAK_FLOPS
from auxin.training.progress import hours
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import samples_per_pass

Strategy = Literal["replicated", "sharded", "hybrid"]
UTILIZATION = 0.4
"""Share of a GPU's peak that a training step is taken to reach."""
NODE, NETWORK = 8, 50e9
"""GPUs of a machine, and the bytes per second that each sends to other machines: 400 Gb/s, as in clusters that are sold
for training."""
AGAIN = 4 / 3
"""Times as long that a step computes whose layers are computed again: a forward pass is a third of it."""
RESERVED = 0.1
"""Share of a GPU's memory that is left for temporaries, fragments and the system."""


@dataclass(frozen=True)
class Gpu:
    """One kind, by its data sheet."""

    name: str
    memory: float
    """Bytes."""
    link: float
    """Bytes per second that it sends to others of its machine, in one direction."""

    @property
    def peak(self) -> float:
        """FLOPs per second, dense, in bfloat16."""
        return dict(PEAK_FLOPS)[self.name]


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("B200", 180e9, 900e9),
        Gpu("H200", 141e9, 450e9),
        Gpu("H100", 80e9, 450e9),
        Gpu("A100", 80e9, 300e9),
        Gpu("MI300X", 192e9, 448e9),
        Gpu("L40S", 48e9, 32e9),
        Gpu("L4", 24e9, 32e9),
        Gpu("A10", 24e9, 32e9),
    )
}
"""By the name that `--gpu` takes: NVLink or Infinity Fabric where a kind has it, else PCIe."""


class Shared(Settings):
    """A training stage on several GPUs, by one strategy."""

    branch: str
    stage: str
    strategy: Strategy
    group: int
    """GPUs that have a copy between them."""
    state: int
    """Bytes of weights, gradients and moments that a process holds between steps, in float32, and of a teacher."""
    activations: int
    """Bytes that the backward pass keeps of the forward pass of a micro-batch, in float32: an upper bound for
    bfloat16."""
    total: int
    """Bytes at once, with what is whole while it computes or is added up, and weights in bfloat16."""
    micro_batch: int
    """Samples of a forward pass."""
    largest: int
    """Samples of the largest forward pass that fits; 0 where none does."""
    sent: float
    """Bytes that each process sends in a step."""
    sent_between: float
    """Of them, those between the copies of a hybrid, over the network alone where each machine has one."""
    steps: int
    """Of the stage."""
    compute_seconds: float
    """Of a step, at `UTILIZATION` of the GPU's peak; with what layers compute again."""
    link_seconds: float
    """Of what is sent in it, at the links' full speed."""

    @property
    def seconds(self) -> float:
        """Of a step: copies send behind the backward pass, pieces of a layer while another computes."""
        both = (self.compute_seconds, self.link_seconds)
        return sum(both) if self.strategy == "replicated" else max(both)


def find_gpu(name: str) -> Gpu:
    """The kind called `name`; ConfigError where none is known."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu: {unknown_name('GPU', name, GPUS)}")
    return GPUS[name.lower()]


def price_shared(recipe: Recipe, gpus: int, gpu: Gpu) -> list[Shared]:
    """Every training stage of `recipe` on so many GPUs, by each strategy; on shapes alone.

    Raises:
        ConfigError, PlanError: the recipe can't be run as it stands, or a batch has fewer samples than there are GPUs.
    """
    with recipe.at():
        form = recipe.form()
    structures = stage_configs(recipe, form)
    price = price_recipe(recipe, memory=False, form=form, structures=structures)
    found = []
    for stage in price.stages:
        one = recipe.branch(stage.branch).stage(stage.stage)
        if not isinstance(one, TrainStage):
            continue
        branch = recipe.branch(stage.branch)
        settings = recipe.training_settings(one, flops=stage.flops if one.flops_of is not None else None)
        with recipe.at(branch, one):
            if settings.batch_size < gpus:
                raise ConfigError(
                    f"batch_size: {settings.batch_size} samples can't be shared by {gpus} GPUs. Raise it, or give "
                    "fewer."
                )
        model = trained_skeleton(structures[stage.branch][stage.stage], one.lora)
        references = reference_shapes(recipe, structures, branch, one, settings.objective)
        objective = settings.objective.bind(model.config, form, references)
        teachers = reference_bytes(references)
        micro = samples_per_pass(settings, gpus)
        passes = math.ceil(math.ceil(settings.batch_size / micro) / gpus)
        again = settings.activation_checkpointing
        kept = {samples: pass_memory(model, objective, samples, again).activations for samples in {1, 2, micro}}
        compute = stage.flops / stage.steps / (gpus * gpu.peak * UTILIZATION)
        for strategy, layout in layouts(settings, gpus).items():
            costs = process_costs(model, layout, passes)
            converted = 0 if settings.precision == "float32" else converted_bytes(model, layout, again)
            room = costs.room(gpu.memory * (1 - RESERVED) - teachers) - converted
            largest = 0 if room < kept[1] else 1 + int((room - kept[1]) / max(1, kept[2] - kept[1]))
            found.append(
                Shared(
                    branch=stage.branch,
                    stage=stage.stage,
                    strategy=strategy,
                    group=layout.group,
                    state=costs.state + teachers,
                    activations=kept[micro],
                    total=costs.at_once(kept[micro] + converted) + teachers,
                    micro_batch=micro,
                    largest=largest,
                    sent=costs.sent,
                    sent_between=costs.between if strategy == "hybrid" else 0.0,
                    steps=stage.steps,
                    compute_seconds=compute * (AGAIN if again else 1.0),
                    link_seconds=link_seconds(costs, layout, gpu),
                )
            )
    return found


def layouts(settings: TrainingSettings, gpus: int) -> dict[Strategy, Layout]:
    """By strategy; a hybrid where there are several machines, or the settings say how many have a copy."""
    found: dict[Strategy, Layout] = {
        "replicated": Layout(gpus, 1),
        "sharded": Layout(gpus, gpus, settings.gather_once),
    }
    group = settings.processes_per_copy or NODE
    if group < gpus and gpus % group == 0:
        found["hybrid"] = Layout(gpus, group, settings.gather_once)
    return found


def link_between(gpus: int, gpu: Gpu) -> float:
    """Bytes per second that one of so many sends to the next. Rings leave and enter a machine by all of its network
    cards, each by another (as NCCL lays them), so that they go as fast as those together, or as the machine's links."""
    return gpu.link if gpus <= NODE else min(gpu.link, NODE * NETWORK)


def link_seconds(costs: ProcessCosts, layout: Layout, gpu: Gpu) -> float:
    """Of what a process sends in a step. Where machines have a copy each, every process adds its piece up with those of
    the other machines by a network card of its own."""
    within = costs.within / link_between(layout.group, gpu)
    if layout.group == 1:
        return costs.between / link_between(layout.processes, gpu)
    apart = layout.processes > NODE
    return within + costs.between / (min(gpu.link, NETWORK) if apart else gpu.link)


def shared_table(prices: list[Shared], gpu: Gpu) -> list[list[str]]:
    """The stages as a table, its header first; columns in the order of what matters."""
    rows = [["stage", "strategy", "memory", "fits", "time, about", "of a step", "sent in it", "a pass", "at most"]]
    for one in prices:
        fits = "yes" if one.total <= gpu.memory * (1 - RESERVED) else "no"
        rows.append(
            [
                *(f"{one.branch}/{one.stage}", one.strategy, f"{one.total / 2**30:.2f} GiB", fits),
                *(hours(one.steps * one.seconds), f"{1000 * one.seconds:,.2f} ms", f"{one.sent / 2**20:,.1f} MiB"),
                *(str(one.micro_batch), f"{one.largest:,}"),
            ]
        )
    return rows


def shared_notes(prices: list[Shared], gpus: int, gpu: Gpu) -> list[str]:
    """What is said below the table: what it rests on, and what it recommends."""
    limit = gpu.memory * (1 - RESERVED)
    lines = [
        "",
        f"Computed, not measured: {gpus} x {gpu.name} of {gpu.memory / 1e9:.0f} GB, a tenth left free; weights, "
        "gradients and AdamW's moments in float32, activations counted so, too, and what products take of weights in "
        f"bfloat16; {UTILIZATION:.0%} of {gpu.peak / 1e12:,.0f} TFLOPs in bfloat16; {network(gpus, gpu)}. Small models "
        "wait for kernels to be launched, which is not counted. A pass: samples of a forward pass; at most: of the "
        "largest that fits.",
    ]
    if any(one.strategy == "hybrid" for one in prices):
        group = next(one.group for one in prices if one.strategy == "hybrid")
        lines.append(f"hybrid: {group} GPUs have a copy between them, pieces of which are added up with other copies.")
    for name in dict.fromkeys((one.branch, one.stage) for one in prices):
        fitting = [one.strategy for one in prices if (one.branch, one.stage) == name and one.total <= limit]
        if not fitting:
            lines.append(
                f"{'/'.join(name)} does not fit. Set activation_checkpointing: true, micro_batch_size lower, or give "
                "more or larger GPUs."
            )
    seconds = {
        strategy: sum(one.steps * one.seconds for one in prices if one.strategy == strategy)
        for strategy in dict.fromkeys(one.strategy for one in prices)
        if all(one.total <= limit for one in prices if one.strategy == strategy)
    }
    if seconds:
        best = min(seconds, key=lambda strategy: seconds[strategy])
        others = [strategy for strategy in seconds if strategy != best]
        than = f", in less time than by {' or '.join(others)}" if others else ", and by no other strategy"
        lines.append(f"Recommended: strategy: {best}. Everything fits{than}.")
    return lines


def network(gpus: int, gpu: Gpu) -> str:
    """How fast one sends to the next, in words."""
    if gpus <= NODE:
        return f"{gpu.link / 1e9:.0f} GB/s from one to the next, in one machine"
    machine = f"{gpu.link / 1e9:.0f} GB/s from one to the next in a machine of {NODE}"
    return f"{machine}, and {NETWORK / 1e9:.0f} GB/s by each of its {NODE} network cards"
