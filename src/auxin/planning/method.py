"""What a method is to the rest of the package: a name, settings, and a function that returns a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import PreTrainedModel

from auxin.edits.plan import Plan
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.models.loading import load_config, load_model
from auxin.objectives.calibration import Calibration, CalibrationSettings, CorpusCalibration
from auxin.planning.bench import Bench
from auxin.settings import Settings

Intent = Literal["grow", "prune", "factorize", "moe", "quantize", "restructure", "adapt"]
Asked = TypeVar("Asked", bound=CalibrationSettings)


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


def make_plan(method: Method, bench: Bench, settings: Any) -> Plan:
    """The plan that `method` makes at `bench`, with what it took: counted by the bench's meter, not by the method.

    Args:
        method: the method.
        bench: with the data that it asks for; serves one plan.
        settings: of the method.

    Raises:
        PlanError: the method can't do it.
    """
    with bench.spent.running():
        plan = method.plan(bench, settings)
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
    source: str | Path,
    values: dict[str, Any],
    data: dict[str, Any] | None = None,
    folder: str | Path = ".",
) -> Plan:
    """The plan that `method` makes for the model in a folder, which belongs to no run.

    Args:
        method: the method.
        source: a checkpoint folder, or its config.json; weights are needed only where the method looks at them.
        values: settings of the method by name.
        data: fields of `CorpusCalibration`, for a method that looks at data; what is not set is what the method asks
            for, of the training split of the standard library's source in the tokens of the folder's tokenizer.
        folder: for files that belong to the plan.

    Raises:
        ConfigError: a setting is unknown or wrong, or there is data for a method that looks at none.
        CheckpointError: the folder can't be read.
        DataError: there is no tokenizer, or no text.
        PlanError: the method can't do it.
    """
    path = Path(source)
    if path.is_file() and path.name != "config.json":
        raise ConfigError(f"{path} is no model. Give a checkpoint's folder, or a config.json.")
    checkpoint = path.parent if path.is_file() else path
    settings = method.settings.parse(values, source=method.name)
    asked = asked_data(method, settings, CorpusCalibration.parse(data or {}, source="data"))
    config = load_config(checkpoint)
    if method.needs_weights and not any(checkpoint.glob("*.safetensors")):
        raise ConfigError(
            f"{method.name} looks at the model's weights, and {checkpoint} holds no *.safetensors file. Give a whole "
            "checkpoint."
        )
    model = load_model(checkpoint) if method.needs_weights else edited_skeleton(config)
    found = None if asked is None else Calibration.of_corpus(model, checkpoint, asked)
    return make_plan(method, Bench(model, found, folder=Path(folder)), settings)


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
