"""What a method is to the rest of the package: a name, settings, and a function that returns a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from auxin.edits.plan import Plan
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError
from auxin.models.loading import load_config, load_model
from auxin.planning.hooks import Hook
from auxin.settings import Settings

Intent = Literal["grow", "prune", "factorize", "moe", "quantize", "restructure", "adapt"]


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
    plan: Callable[[PreTrainedModel, Any], Plan]
    """(model, settings) -> plan; the model may be on the meta device unless `needs_weights`. Raises PlanError with the
    reason, and the nearest possible target, for what it can't do."""
    examples: Callable[[PreTrainedModel], dict[str, Any]]
    """(model) -> settings that make sense for a small model of that architecture, for tests and the capability matrix;
    PlanError where there are none."""
    needs_weights: bool = False
    """Whether `plan` looks at the weights."""
    promise: str = ""
    """What its plans promise and under which conditions, in a few words; the plan itself says what it is."""
    write_files: Callable[[Plan, Path, Path], None] | None = None
    """(plan, source, new) writes what else belongs into the new checkpoint's folder, for example a tokenizer; called
    after the weights are there and before the folder appears under its name."""
    hooks: Callable[[Plan], list[Hook]] | None = None
    """(plan) -> what takes part in the training after the growth, for a method that is only complete with it."""
    tokens: Callable[[Any], int] | None = None
    """(settings) -> tokens of text that `plan` trains the grown model on, for a method that learns; a recipe's books
    count them."""
    outline: Callable[[PreTrainedModel, Any], Plan] | None = None
    """(model on the meta device, settings) -> a plan that has the shapes of the real one and can't be applied; for a
    method that needs weights, so that what it makes has a size and a price before work starts."""


def plan_for(method: Method, source: str | Path, values: dict[str, Any]) -> Plan:
    """The plan that `method` makes for the model in a folder.

    Args:
        method: the method.
        source: a checkpoint folder, or its config.json; weights are needed only where the method looks at them.
        values: settings of the method by name.

    Raises:
        ConfigError: a setting is unknown or wrong.
        CheckpointError: the folder can't be read.
        PlanError: the method can't do it.
    """
    path = Path(source)
    if path.is_file() and path.name != "config.json":
        raise ConfigError(f"{path} is no model. Give a checkpoint's folder, or a config.json.")
    folder = path.parent if path.is_file() else path
    settings = method.settings.parse(values, source=method.name)
    config = load_config(folder)
    if method.needs_weights and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{method.name} looks at the model's weights, and {folder} holds no *.safetensors file. Give a whole "
            "checkpoint."
        )
    return method.plan(load_model(folder) if method.needs_weights else edited_skeleton(config), settings)
