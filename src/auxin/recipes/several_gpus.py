"""What the training stages of a recipe would take on several GPUs: memory of each, what goes between them, and the time
of a step. Computed on shapes and from data sheets; nothing of it is measured."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from auxin.accounting.memory import ADAM_MOMENTS, FLOAT32_BYTES
from auxin.errors import ConfigError, PlanError, unknown_name
from auxin.models.layers import layer_paths
from auxin.recipes.price import pass_memory, price_recipe, reference_bytes, trained_skeleton
from auxin.recipes.references import reference_shapes
from auxin.recipes.schema import Recipe, TrainStage
from auxin.recipes.stage_models import stage_configs
from auxin.settings import Settings
from auxin.training.hardware import PEAK_FLOPS
from auxin.training.progress import hours
from auxin.training.strategies import samples_per_pass

UTILIZATION = 0.4
"""Share of a GPU's peak that a training step is taken to reach."""
NODE, NETWORK = 8, 50e9
"""GPUs of a machine, and the bytes per second that each sends to other machines: 400 Gb/s, as in clusters that are sold
for training."""
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
    strategy: Literal["replicated", "sharded"]
    state: int
    """Bytes of weights, gradients and moments that a process holds between steps, in float32."""
    gathered: int
    """Bytes that are whole while they compute: what lies outside of the layers; two layers, of which one comes while
    the other computes, and one's gradients; and all gradients, where a step has several passes. 0 for copies."""
    activations: int
    """Bytes that the backward pass keeps of the forward pass of a micro-batch, in float32: an upper bound for
    bfloat16."""
    micro_batch: int
    """Samples of a forward pass."""
    largest: int
    """Samples of the largest forward pass that fits; 0 where none does."""
    sent: float
    """Bytes that each process sends in a step."""
    steps: int
    """Of the stage."""
    compute_seconds: float
    """Of a step, at `UTILIZATION` of the GPU's peak."""
    link_seconds: float
    """Of what is sent in it, at the link's full speed."""

    @property
    def total(self) -> int:
        """Bytes at once."""
        return self.state + self.gathered + self.activations

    @property
    def seconds(self) -> float:
        """Of a step: copies send behind the backward pass, pieces while others compute."""
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
        for strategy in ("replicated", "sharded"):
            state, gathered, sent = held_and_sent(model, gpus, passes, strategy == "sharded")
            room = gpu.memory * (1 - RESERVED) - state - gathered - teachers - kept[1]
            largest = 0 if room < 0 else 1 + int(room / max(1, kept[2] - kept[1]))
            found.append(
                Shared(
                    branch=stage.branch,
                    stage=stage.stage,
                    strategy=strategy,
                    state=state + teachers,
                    gathered=gathered,
                    activations=kept[micro],
                    micro_batch=micro,
                    largest=largest,
                    sent=sent,
                    steps=stage.steps,
                    compute_seconds=stage.flops / stage.steps / (gpus * gpu.peak * UTILIZATION),
                    link_seconds=sent / link_between(gpus, gpu),
                )
            )
    return found


def link_between(gpus: int, gpu: Gpu) -> float:
    """Bytes per second that one of so many sends to the next: by the network, where one machine does not hold them."""
    return gpu.link if gpus <= NODE else min(gpu.link, NETWORK)


def held_and_sent(model: PreTrainedModel, gpus: int, passes: int, sharded: bool) -> tuple[int, int, float]:
    """Bytes that the process that holds most has between steps, that it has whole while it computes, and that it sends
    in a step of so many passes; in float32.

    In a ring each of N processes sends (N - 1) / N of what is gathered or added up, and twice that where all are to
    have the sum. FSDP2 gathers a layer for the forward and once more for the backward pass of each micro-batch, what
    lies outside of the layers once, and adds gradients up in the last pass of a step.
    """
    trained = FLOAT32_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = FLOAT32_BYTES * sum(p.numel() for p in model.parameters())
    ring = (gpus - 1) / gpus
    if not sharded:
        return whole + (1 + ADAM_MOMENTS) * trained, 0, 2 * ring * trained
    state = sum(
        FLOAT32_BYTES * _piece(parameter, gpus) * (2 + ADAM_MOMENTS if parameter.requires_grad else 1)
        for parameter in model.parameters()
    )
    layers = [FLOAT32_BYTES * sum(p.numel() for p in layer.parameters()) for layer in _layers(model)]
    outside = whole - sum(layers)
    sent = ring * (passes * (2 * sum(layers) + outside) + trained)
    return state, outside + 3 * max(layers, default=0) + (trained if passes > 1 else 0), sent


def _piece(parameter: nn.Parameter, gpus: int) -> int:
    """Values of the largest piece: rows are not cut."""
    if parameter.ndim == 0:
        return 1
    return math.ceil(parameter.shape[0] / gpus) * (parameter.numel() // max(1, parameter.shape[0]))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    try:
        return [model.get_submodule(path) for path in layer_paths(model)]
    except PlanError:
        return []


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
        f"gradients and AdamW's moments in float32, activations counted so, too; {UTILIZATION:.0%} of "
        f"{gpu.peak / 1e12:,.0f} TFLOPs in bfloat16; {link_between(gpus, gpu) / 1e9:.0f} GB/s from one to the next "
        f"({'in one machine' if gpus <= NODE else 'between machines of eight'}). Small models wait for kernels to be "
        "launched, which is not counted. A pass: samples of a forward pass; at most: of the largest that fits.",
    ]
    for name in dict.fromkeys((one.branch, one.stage) for one in prices):
        both = {one.strategy: one for one in prices if (one.branch, one.stage) == name}
        fitting = [one for one in both.values() if one.total <= limit]
        if not fitting:
            lines.append(f"{'/'.join(name)} does not fit. Set micro_batch_size lower, or give more or larger GPUs.")
        elif len(fitting) == 1:
            lines.append(f"{'/'.join(name)} fits by {fitting[0].strategy} alone.")
    if all(one.total <= limit for one in prices):
        best = {name: sum(one.seconds for one in prices if one.strategy == name) for name in ("replicated", "sharded")}
        lines.append(f"Everything fits either way; {min(best, key=lambda name: best[name])} takes less time.")
    return lines
