"""How long a recipe will take on this machine: a few steps of its models are timed, with weights of no meaning."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from transformers import PreTrainedModel

from auxin.accounting.machine import available_memory, choose_device
from auxin.accounting.recomputation import recomputed
from auxin.data.dataset import SampleForm
from auxin.models.weights_of_no_meaning import fill
from auxin.nn.autocast import without_autocast
from auxin.objectives import References
from auxin.recipes.price import RecipePrice, StagePrice, price_recipe, trained_skeleton
from auxin.recipes.references import reference_shapes
from auxin.recipes.schema import Recipe, TrainStage
from auxin.recipes.stage_models import StageConfigs, stage_configs
from auxin.training.gradients import BatchGradients
from auxin.training.optimizer import build_optimizer
from auxin.training.ranks import ALONE
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import Copies

PATIENCE = 10.0
"""Seconds that all timing may take, about; one model gets a third of what is left of them."""
TIMED = 3
"""Micro-batches that are timed, after a first one that warms up."""
COSTLY = {"objective", "batch_size", "micro_batch_size", "precision", "device", "activation_checkpointing"}
"""Settings that a step's time depends on."""
MOST_MEMORY = 0.8
"""Share of the machine's memory that a model may fill to be timed."""


class Timer:
    """Times stages; models that it has timed are not timed again.

    Args:
        threads: of the processes that will train; None: this one's.
        patience: seconds that all timing may take, about.
    """

    def __init__(self, threads: int | None = None, patience: float = PATIENCE) -> None:
        self._threads, self._left = threads, patience
        self._speeds: dict[tuple[str, str], float | None] = {}

    def price(self, recipe: Recipe) -> RecipePrice:
        """`price_recipe` with the seconds of every train stage, as far as they can be told.

        A stage whose model is too large, or for which there was no time left, is taken to train as many FLOPs per
        second as the largest model that was timed.
        """
        with recipe.at():
            form = recipe.form()
        structures = stage_configs(recipe, form)
        speeds = {}
        with _threads(self._threads):
            price = price_recipe(recipe, form=form, structures=structures)
            for stage in sorted(price.stages, key=lambda stage: stage.parameters):
                if stage.kind == "train":
                    speeds[stage.branch, stage.stage] = self._speed(recipe, stage, structures, form)
        known = [speed for speed in speeds.values() if speed is not None]
        stages = [
            stage.model_copy(update={"seconds": stage.flops / (speeds[key] or known[-1])})
            if (key := (stage.branch, stage.stage)) in speeds and known
            else stage
            for stage in price.stages
        ]
        return price.model_copy(update={"stages": stages})

    def _speed(self, recipe: Recipe, stage: StagePrice, structures: StageConfigs, form: SampleForm) -> float | None:
        """Training FLOPs per second of `stage`; None where they were not timed."""
        config, branch = structures[stage.branch][stage.stage], recipe.branch(stage.branch)
        found = branch.stage(stage.stage)
        assert isinstance(found, TrainStage)
        settings = recipe.training_settings(found, flops=stage.flops if found.flops_of is not None else None)
        same = settings.model_dump(include=COSTLY)
        key = config.to_json_string(), f"{same} {found.lora}"
        if key not in self._speeds:
            began, room = time.perf_counter(), self._left / 3
            per_step = stage.flops / stage.steps
            self._speeds[key] = None
            if not _fits(stage, settings) or room <= 0:
                return None
            micro = per_step * settings.samples_per_forward / settings.batch_size
            if micro / _fastest(choose_device(settings.device)) * (1 + TIMED) < room:
                # Memory that was promised may not be there, a model may not run on such weights; training will tell.
                with suppress(RuntimeError):
                    references = reference_shapes(recipe, structures, branch, found, settings.objective)
                    model = trained_skeleton(config, found.lora)
                    seconds = seconds_per_step(model, settings, form, room, references)
                    self._speeds[key] = per_step / seconds
            self._left -= time.perf_counter() - began
        return self._speeds[key]


def seconds_per_step(
    model: PreTrainedModel,
    settings: TrainingSettings,
    form: SampleForm,
    room: float,
    references: References | None = None,
) -> float:
    """How long an optimizer step of `settings` takes, the warm-up left out.

    Args:
        model: on the meta device; it gets random weights.
        settings: of the stage.
        form: of the samples.
        room: seconds after which no further micro-batch is begun.
        references: other models that the objective goes by, as it: a teacher answers in every step.
    """
    device = choose_device(settings.device)
    objective = settings.objective.bind(model.config, form, references)
    for one in (model, *(reference.model for reference in (references or {}).values())):
        fill(one)
    torch.nn.Module.to(model, device).train()
    optimizer = build_optimizer(model, settings)
    example = {name: value.to(device) for name, value in objective.example(settings.samples_per_forward).items()}
    # What compiling takes is no part of a step, and more than anybody waits for.
    gradients = BatchGradients(model, objective, settings.model_copy(update={"compile": False}), Copies(ALONE))
    started = time.perf_counter()
    times: list[float] = []
    with objective.learning(model), without_autocast(), recomputed(model, settings.activation_checkpointing):
        while not times or (len(times) <= TIMED and time.perf_counter() - started < room):
            began = time.perf_counter()
            gradients.add(example, 1.0)
            _wait(device)
            times.append(time.perf_counter() - began)
    optimizer.step()  # the first one allocates the moments
    began = time.perf_counter()
    optimizer.step()
    _wait(device)
    forwards = settings.batch_size / settings.samples_per_forward
    timed = times[1:] or times
    return forwards * sum(timed) / len(timed) + time.perf_counter() - began


def _fits(stage: StagePrice, settings: TrainingSettings) -> bool:
    """Whether the model has room; on a GPU that shows when it is tried."""
    memory = available_memory()
    if choose_device(settings.device).type == "cuda":
        memory = torch.cuda.mem_get_info()[0]
    return memory is None or stage.memory_bytes is None or stage.memory_bytes < MOST_MEMORY * memory


def _fastest(device: torch.device) -> float:
    """FLOPs per second of a plain product: no model trains faster by much."""
    a = torch.ones(1024, 1024, device=device)
    a @ a
    _wait(device)
    began = time.perf_counter()
    a @ a
    _wait(device)
    return 2 * 1024**3 / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
