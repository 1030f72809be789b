"""Trying one way: plans are made and applied in memory, and what is left is measured on samples that no method saw."""

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.accounting import count_parameters, flops_per_token, serving_memory
from auxin.data.dataset import Dataset, Split, Stream
from auxin.data.loader import batch_order, samples_of
from auxin.edits import executor
from auxin.errors import AuxinError, CheckpointError, DataError, PlanError, first_line
from auxin.files import temporary_folder
from auxin.methods import method as find_method
from auxin.models.evaluating import evaluating
from auxin.objectives.calibration import Calibration
from auxin.objectives.objective import Objective, ObjectiveSettings, held_out_noise
from auxin.planning.bench import Bench
from auxin.planning.target import Target
from auxin.recipes.schema import ChangeStage
from auxin.recipes.stage_models import change_data, change_plan
from auxin.settings import Settings
from auxin.shrinking.candidates import Candidate
from auxin.shrinking.settings import ShrinkSettings


class Trial(Settings):
    """A way that was tried, and what came of it."""

    number: int
    """In the order of trying, from 1."""
    steps: list[dict[str, Any]]
    """The candidate's."""
    refused: str | None = None
    """Why it can't be done; None: it was."""
    losses: list[float] = []
    """The mean loss of each choosing sample."""
    loss: float | None = None
    """The mean loss of a target, a finite number; None where the way was refused."""
    parameters: int | None = None
    flops: float | None = None
    """Per token, or sample, of a forward pass; None where they can't be counted."""
    memory: int | None = None
    """Bytes of the weights and of the cache."""
    seconds: float = 0.0
    """That it took."""

    @property
    def candidate(self) -> Candidate:
        """What was tried."""
        return Candidate.load(self.steps)


@dataclass
class Workbench:
    """The model that is to become smaller, and the samples that methods look at and on which ways are compared."""

    model: PreTrainedModel
    data: Dataset
    objective: ObjectiveSettings
    settings: ShrinkSettings

    def __post_init__(self) -> None:
        have, wanted = samples_of(self.data.split("train")), self.settings.samples + self.settings.choosing_samples
        if have is not None and have < wanted:
            raise DataError(
                f"The training split has {have} samples, and samples = {self.settings.samples} for the methods and "
                f"choosing_samples = {self.settings.choosing_samples} of others need {wanted}. Give more data, or ask "
                "for fewer."
            )

    @cached_property
    def have(self) -> float:
        """Of the model, what the target is given in."""
        return self.settings.target.of(self.model)

    @cached_property
    def choosing_rows(self) -> list[int]:
        """Rows of the training split behind those that methods look at, in the order of the seed."""
        order = batch_order(self.data.split("train"), 1, self.settings.seed)
        first = self.settings.samples
        return [order.batch(position)[0] for position in range(first, first + self.settings.choosing_samples)]

    def changes(self, candidate: Candidate) -> list[dict[str, Any]]:
        """What `candidate` does, as the change stages of a recipe have it: methods, settings, and how much data those
        look at that look at any."""
        found = []
        for step, target in zip(candidate.steps, candidate.targets(self.settings.target, self.have), strict=True):
            method, settings = find_method(step.method), {**step.settings, "target": target}
            change: dict[str, Any] = {"method": step.method, "settings": settings}
            if method.calibration is not None and method.calibration(method.settings.parse(settings)) is not None:
                change["calibration"] = {"samples": self.settings.samples, "seed": self.settings.seed}
            found.append(change)
        return found

    def smaller(self, candidate: Candidate, folder: Path) -> PreTrainedModel:
        """A copy of the model that went through `candidate`.

        Args:
            candidate: what is done.
            folder: for files of plans.

        Raises:
            AuxinError: a method can't do it.
        """
        model = self.model
        for number, change in enumerate(self.changes(candidate)):
            stage = ChangeStage(kind="change", **change)
            asked, data = change_data(stage), None
            if asked is not None:
                data = Calibration.of_split(self.data, model.config, asked, self.objective, self.settings.seed)
            own = folder / str(number)
            own.mkdir()
            plan = change_plan(stage, Bench(model, data, self.settings.seed, own)).beside(own)
            model = copy.deepcopy(model) if model is self.model else model
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notes for who trains on; the run after the search says them
                executor.apply(plan, model)
        return model

    def tried(self, number: int, candidate: Candidate, scratch: Path) -> Trial:
        """Try `candidate`: what it leaves and what that loses, or why it can't be done.

        Args:
            number: of the trial.
            candidate: what is tried.
            scratch: a folder in which a temporary one is made.
        """
        started, found = time.perf_counter(), Trial(number=number, steps=candidate.dump())
        try:
            with temporary_folder(scratch / f"trial-{number}") as folder:
                model = self.smaller(candidate, folder)
            losses, loss = self.losses(model, self.data.split("train"), self.choosing_rows)
            if not math.isfinite(loss):
                raise PlanError(f"The smaller model's loss is {loss:g}.")
            update = {"losses": losses, "loss": loss, **measured_sizes(model, self.settings.target)}
        except (AuxinError, RuntimeError, ArithmeticError) as error:  # one way that fails ends no search
            kind = "" if isinstance(error, AuxinError) else f"{type(error).__name__}: "
            update = {"refused": f"{kind}{first_line(error)}"}
        return found.model_copy(update={**update, "seconds": time.perf_counter() - started})

    def losses(self, model: PreTrainedModel, split: Split | Stream, rows: Sequence[int]) -> tuple[list[float], float]:
        """The mean loss of each of these samples, and that of all their targets."""
        objective = self.objective.bind(model.config, self.data.form)
        sums, counts = [torch.cat(parts) for parts in zip(*self._summed(model, objective, split, rows), strict=True)]
        return (sums / counts).tolist(), float(sums.sum() / counts.sum())

    def _summed(
        self, model: PreTrainedModel, objective: Objective, split: Split | Stream, rows: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        noise, size = held_out_noise(), 8
        with evaluating(model):
            for start in range(0, len(rows), size):
                inputs = objective.inputs(split.rows(rows[start : start + size]), noise)
                counts = objective.sample_targets(inputs)
                losses = objective.losses(model, inputs).double().cpu()
                yield torch.stack([part.sum() for part in losses.split(counts.tolist())]), counts


def measured_sizes(model: PreTrainedModel, target: Target) -> dict[str, Any]:
    """Parameters, FLOPs and memory of `model`, as a trial has them, at the length and batch of `target`."""
    length = target.length(model)
    try:
        flops: float | None = flops_per_token(model, length).forward
    except AuxinError:
        flops = None
    try:
        memory: int | None = serving_memory(model, target.batch_size or 1, length).total
    except AuxinError:
        memory = None
    return {"parameters": count_parameters(model).total, "flops": flops, "memory": memory}


class Records:
    """The trials of a search in a file, a line for each, of which a killed process loses the last one at most.

    Args:
        path: of the file; made when the first trial is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: list[Trial] = []
        if path.exists():
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], 1):  # what is behind the last end of a line is half a trial
                try:
                    self.trials.append(Trial.model_validate_json(line))
                except ValueError as error:
                    raise CheckpointError(
                        f"{path}, line {number}: no trial can be read. Remove this line and those after it; the search "
                        "goes on from there."
                    ) from error
            whole = sum(len(line) + 1 for line in lines[:-1])
            if whole < path.stat().st_size:
                os.truncate(path, whole)

    def add(self, trial: Trial) -> None:
        """Append a trial; it is on the disk when this returns."""
        self.trials.append(trial)
        with self.path.open("ab") as file:
            file.write(json.dumps(trial.model_dump(mode="json")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
