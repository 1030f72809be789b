"""What a method is to the rest of the package: a name, settings, and a function that returns a plan."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel

from auxin.edits.plan import Plan
from auxin.edits.structure import config_values, edited_skeleton, refuse_quantized, skeleton_of
from auxin.errors import AuxinError, ConfigError, PlanError
from auxin.models.evaluating import about_inference_tensors, left_as_it_is
from auxin.models.folders import CONFIG_FILE
from auxin.models.loading import load_config, load_config_file, load_model
from auxin.nn.autocast import without_autocast
from auxin.objectives.calibration import Calibration, CalibrationSettings, CorpusCalibration
from auxin.objectives.given_batches import Batch
from auxin.planning.bench import Bench
from auxin.planning.hooks import asked_by
from auxin.settings import Settings

Intent = Literal["grow", "prune", "factorize", "moe", "quantize", "restructure", "adapt"]
Asked = TypeVar("Asked", bound=CalibrationSettings)
Data = Calibration | Iterable[Batch] | Mapping[str, Any]
"""What a method that looks at data can be given: made ready, as batches, or as fields of `CorpusCalibration`."""
RESERVED = ("data", "folder")
"""What no setting of a method may be called, since whoever asks for a plan says by these words what it is made with."""


@dataclass(frozen=True)
class Method:
    """One published technique. A module defines one as `METHOD` (or several as `METHODS`); other packages name theirs
    in the entry point group "auxin.methods". Everything that lists, runs or tests methods goes by these."""

    name: str
    """By which it is called: lower case, digits and hyphens, for example "hypercloning"."""
    title: str
    """What it does, in one line."""
    paper: str
    """Where it comes from, for example "arXiv 2409.12903"."""
    intent: Intent
    """What it is for."""
    settings: type[Settings]
    """Its settings, every field with a docstring."""
    plan: Callable[[Bench, Any], Plan]
    """(bench, settings) -> plan; the bench's model may be on the meta device unless `needs_weights`, and is left as it
    is. Raises PlanError with the reason, and the nearest possible target, for what it can't do. Called by `make_plan`,
    which measures what it takes."""
    examples: Callable[[PreTrainedModel], dict[str, Any]]
    """(model) -> settings that make sense for a small model of that architecture, for tests and the capability matrix;
    PlanError where there are none."""
    needs_weights: bool = False
    """Whether `plan` looks at the weights."""
    promise: str = ""
    """What its plans promise and under which conditions, in a few words; the plan itself says what it is."""
    other_tokens: bool = False
    """Whether a text is other tokens behind its plans, so that losses before and after can't be compared."""
    calibration: Callable[[Any], CalibrationSettings | None] | None = None
    """(settings) -> how much data `plan` wants to look at or to learn from, unless the user says otherwise; None, or no
    function: none. The bench's data is then made of it, and its meter counts what is really drawn."""
    outline: Callable[[Bench, Any], Plan] | None = None
    """(bench with the model on the meta device and no data, settings) -> a plan of the size that the real one is likely
    to have, for a method that needs weights or files of the checkpoint, so that what it makes has a size and a price
    before work starts. It writes no files. Called by `estimate_plan`, which marks it as an estimate."""

    @property
    def is_estimated(self) -> bool:
        """Whether a plan for a model of which there are shapes alone is an estimate."""
        return self.needs_weights or self.outline is not None

    def __post_init__(self) -> None:
        if self.calibration is not None and not self.needs_weights:
            raise TypeError(
                f"the method {self.name!r} looks at data, which says nothing without weights; set needs_weights"
            )
        if taken := [name for name in RESERVED if name in self.settings.model_fields]:
            raise TypeError(
                f"the method {self.name!r} has a setting {taken[0]!r}, a word that `auxin.plan` uses itself; rename it"
            )


def make_plan(method: Method, bench: Bench, settings: Any) -> Plan:
    """The plan that `method` makes at `bench`, with what it took: counted by the bench's meter, not by the method.

    Args:
        method: the method.
        bench: with the data that it asks for; serves one plan.
        settings: of the method.

    Raises:
        PlanError: the model is quantized, or the method looks at weights and those were made within
            torch.inference_mode(), or the method can't do it.
    """
    refuse_quantized(bench.model)
    if method.needs_weights and (reason := about_inference_tensors(bench.model)):
        raise PlanError(reason)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        without_autocast(),
        left_as_it_is(bench.model),
        bench.spent.running(),
    ):
        plan = method.plan(bench, settings)
    if plan.made_for is not None:  # methods give the model's own config, which may tell its ties wrongly
        values = config_values(skeleton_of(bench.model).config)
        # The config of a model that was never saved names no class, and a plan is shown for the class that it is of.
        values["architectures"] = [type(bench.model).__name__]
        plan = plan.model_copy(update={"made_for": values})
    asked_by(plan)  # a wrong hook is found now, and not when the training after begins
    cost = bench.spent.cost(bench.data)
    return plan.model_copy(update={"cost": cost}) if cost.samples or cost.flops else plan


def estimate_plan(method: Method, bench: Bench, settings: Any) -> Plan:
    """The plan of `method` for a model of which there are shapes alone; marked as an estimate where the method looks at
    more (`Method.is_estimated`).

    Args:
        method: the method.
        bench: its model is on the meta device.
        settings: of the method.

    Raises:
        PlanError: the method can't do it, or has no outline.
    """
    if not method.is_estimated:
        return method.plan(bench, settings)
    if method.outline is None:
        raise PlanError(
            f"{method.name} looks at the weights and has no outline, so that the size of what it makes is not known "
            "before the run. Do it before, with `auxin apply`, and start from the result."
        )
    return method.outline(bench, settings).model_copy(update={"estimate": True})


def plan_for(
    method: Method,
    source: str | Path | PreTrainedModel,
    values: Mapping[str, Any],
    data: Data | None = None,
    folder: str | Path = ".",
) -> Plan:
    """The plan that `method` makes for a model, or for that in a folder, which belongs to no run.

    Args:
        method: the method.
        source: a model, which is left as it is, or a checkpoint folder or its config.json, or another file of a config;
            weights are needed only where the method looks at them.
        values: settings of the method by name.
        data: for a method that looks at data: a `Calibration`, batches (token ids, or inputs by name with labels), or
            fields of `CorpusCalibration`. What is not set is what the method asks for, of the training split of the
            standard library's source in the tokens of the folder's tokenizer; a model has none, so that there
            `corpus.tokenizer` has to be set.
        folder: for files that belong to the plan.

    Raises:
        ConfigError: a setting is unknown or wrong, there is data for a method that looks at none, or a model has no
            weights and the method looks at them.
        CheckpointError: the folder can't be read.
        DataError: there is no tokenizer, no text, or no batch.
        PlanError: the method can't do it; where no settings were given, with some that it can be done with.
    """
    settings = method.settings.parse(values, source=method.name)
    asked = _asked(method, settings, data)
    if isinstance(source, PreTrainedModel):
        model, tokenizer = _with_weights(method, source), None
    else:
        model, tokenizer = _model_in(method, Path(source))
    found = None if asked is None else _calibration(method, model, tokenizer, asked)
    try:
        return make_plan(method, Bench(model, found, folder=Path(folder)), settings)
    except PlanError as error:
        example = "" if values else _example(method, model)
        raise PlanError(f"{error} {example}".rstrip()) from error


def _example(method: Method, model: PreTrainedModel) -> str:
    """Settings with which `method` can change `model`, for someone who gave none, in a sentence; empty where there are
    none."""
    try:
        example = method.examples(model)
        estimate_plan(method, Bench(model), method.settings.parse(example))
    except AuxinError:
        return ""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in example.items()}
    # Brackets are patterns to some shells.
    options = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in values.items())
    return f"For example: {options}." if options else ""


def _with_weights(method: Method, model: PreTrainedModel) -> PreTrainedModel:
    if method.needs_weights and any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"{method.name} looks at the model's weights, and those of this {type(model).__name__} are on the meta "
            "device. Give a model with weights."
        )
    return model


def _model_in(method: Method, path: Path) -> tuple[PreTrainedModel, Path]:
    """The model in a folder, on the meta device where shapes are enough, and the folder."""
    if path.is_file() and path.suffix != ".json":
        raise ConfigError(f"{path} is no model. Give a checkpoint's folder, or a config.json.")
    alone = path.is_file() and path.name != CONFIG_FILE
    checkpoint = path.parent if path.is_file() else path
    if alone and method.needs_weights:
        raise ConfigError(
            f"{method.name} looks at the model's weights, and {path} is a config alone. Give a checkpoint's folder."
        )
    config = load_config_file(path) if alone else load_config(checkpoint)
    if method.needs_weights and not any(checkpoint.glob("*.safetensors")):
        raise ConfigError(
            f"{method.name} looks at the model's weights, and {checkpoint} holds no *.safetensors file. Give a whole "
            "checkpoint."
        )
    return load_model(checkpoint) if method.needs_weights else edited_skeleton(config), checkpoint


def _asked(
    method: Method, settings: Any, data: Data | None
) -> Calibration | Iterable[Batch] | CorpusCalibration | None:
    """The data that was given, or how much is to be read; None: none is looked at."""
    if data is None or isinstance(data, Mapping):
        return asked_data(method, settings, CorpusCalibration.parse(data or {}, source="data"))
    if method.calibration is None or method.calibration(settings) is None:
        raise ConfigError(f"{method.name} looks at no data with these settings, and data was given. Leave it out.")
    return data


def _calibration(
    method: Method,
    model: PreTrainedModel,
    tokenizer: Path | None,
    asked: Calibration | Iterable[Batch] | CorpusCalibration,
) -> Calibration:
    if isinstance(asked, Calibration):
        return asked
    if not isinstance(asked, CorpusCalibration):
        return Calibration.of_batches(model, asked)
    if tokenizer is None and (asked.corpus is None or asked.corpus.tokenizer is None):
        raise ConfigError(
            f"{method.name} looks at data, and a model in memory says nothing about its tokenizer. Give data: a list "
            "of batches of token ids, or a corpus with a tokenizer; or give the model's folder instead of the model."
        )
    return Calibration.of_corpus(model, tokenizer or Path(), asked)


def asked_data(method: Method, settings: Any, given: Asked) -> Asked | None:
    """How much data `method` is to look at: what it asks for with `settings`, but what is set in `given`; None: none.

    Raises:
        ConfigError: something is given, and the method looks at no data.
    """
    asked = None if method.calibration is None else method.calibration(settings)
    if asked is not None:
        open_fields = asked.model_fields_set - given.model_fields_set
        return given.model_copy(update={name: getattr(asked, name) for name in open_fields})
    if given.model_fields_set:
        raise ConfigError(
            f"{method.name} looks at no data with these settings, and {', '.join(sorted(given.model_fields_set))} says "
            "something about it. Leave that out."
        )
    return None
