"""Find a recipe: by the name of a built-in one or by its file; and change single values of it."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from auxin.errors import ConfigError, reason, shown, unknown_name
from auxin.models.tokenformer.presets import PRESETS, VISION_PRESETS
from auxin.recipes.folder import RECIPE_FILE
from auxin.recipes.schema import Recipe
from auxin.training import TrainingSettings
from auxin.training.settings import BUDGETS
from auxin.yaml_files import DEEPEST, read_yaml, read_yaml_file

BUILTIN = files("auxin.recipes") / "builtin"
SUFFIXES = (".yaml", ".yml")
"""Of recipes in files."""


def builtin_recipes() -> dict[str, Recipe]:
    """The recipes that come with the package, by name."""
    found = sorted(path.name for path in BUILTIN.iterdir() if path.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): load_recipe(name.removesuffix(".yaml")) for name in found}


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe.

    Args:
        name_or_path: a built-in recipe's name, or a YAML file (anything with a suffix or a folder in it).
        overrides: "key=value" changes with dotted keys, values in YAML ("seed=1", "training.learning_rate=1e-3").

    Raises:
        ConfigError: no such recipe, broken YAML, or a field that is unknown or wrong.
    """
    path = Path(name_or_path)
    if path.suffix in SUFFIXES or path.name != name_or_path:
        _refuse_folder(path)
        values = read_yaml_file(path)
    else:
        known = [found.name.removesuffix(".yaml") for found in BUILTIN.iterdir() if found.name.endswith(".yaml")]
        if name_or_path not in known:
            _refuse_folder(path)
            _refuse_other_suffix(path)
            raise ConfigError(unknown_name("recipe", name_or_path, known) + " A file needs its .yaml suffix.")
        values = read_yaml((BUILTIN / f"{name_or_path}.yaml").read_text(encoding="utf-8"), name_or_path)
    Recipe.refuse_other_file(values, name_or_path)
    for override in overrides or []:
        apply_override(values, override)
    return Recipe.parse(values, source=name_or_path).read_from(name_or_path)


def _refuse_folder(path: Path) -> None:
    """ConfigError where the path of a recipe is that of a folder; of a run's, the message names its recipe."""
    if os.path.isdir(path):  # says no where pathlib raises: of a name that is too long
        within = path / RECIPE_FILE
        meant = f"the recipe in it, {within}," if within.is_file() else "the path of a YAML file"
        name = shown(str(path), quoted=False)
        raise ConfigError(f"{name} is a folder. Give {meant} or the name of a built-in recipe.")


def _refuse_other_suffix(path: Path) -> None:
    """ConfigError where the path of a recipe is that of a file whose name does not say that it is one."""
    if os.path.isfile(path):
        name = shown(str(path), quoted=False)
        model = f" The model of a config is trained by: auxin train --model {name}" if path.suffix == ".json" else ""
        raise ConfigError(
            f"{name} is no recipe by its name. Give a file whose suffix is .yaml, or the name of a built-in one.{model}"
        )


def training_recipe(
    model: str, corpus: dict[str, Any], training: dict[str, Any], seed: int = 0, overrides: list[str] | None = None
) -> Recipe:
    """The recipe of one branch that trains one model.

    Args:
        model: a preset's name, a checkpoint's folder (its moments, books and tokenizer are taken over), or a
            `config.json`.
        corpus: fields of CorpusSettings; None values are left out.
        training: fields of TrainingSettings, the budget among them; None values are left out.
        seed: the recipe's seed.
        overrides: as for `load_recipe`.

    Raises:
        ConfigError: there is no such model, or a field is unknown or wrong.
    """
    corpus = {key: value for key, value in corpus.items() if value is not None}
    path, presets = Path(model), {*PRESETS, *VISION_PRESETS}
    if path.is_dir():
        build: dict[str, Any] = {"checkpoint": model}
        corpus.setdefault("tokenizer", model)
    elif path.suffix == ".json":
        build = _configured(path)
    elif model.lower() in presets:
        build = {"preset": model}
    elif path.is_file():
        run = f" A recipe is run by: auxin run {model}" if path.suffix in SUFFIXES else ""
        raise ConfigError(
            f"--model {shown(model)} is a file, and not of a model. Give a checkpoint's folder, a config.json or a "
            f"preset's name.{run}"
        )
    else:
        raise ConfigError(
            f"--model {shown(model)} is no folder and no config.json. " + unknown_name("preset", model.lower(), presets)
        )
    stages = [
        {"kind": "build", **build},
        {"kind": "train", "name": "train"},
    ]
    values = {
        "name": "train",
        "title": f"Train {path.name}",
        "seed": seed,
        "data": corpus,
        "training": {key: value for key, value in training.items() if value is not None},
        "branches": [{"name": "main", "title": path.name, "stages": stages}],
    }
    for override in overrides or []:
        apply_override(values, override)
    if not any(override.startswith("branches") for override in overrides or []):  # which may set a budget as well
        _refuse_other_budgets(values["training"])
    return Recipe.parse(values)


def _refuse_other_budgets(training: Any) -> None:
    """ConfigError that names the options where the `training` of a recipe of options has none or several budgets, and
    nothing else is wrong with it."""
    if not isinstance(training, dict):
        return  # refused as a field of the recipe
    given = [name for name in BUDGETS if training.get(name) is not None]
    if len(given) != 1:
        TrainingSettings.parse_but_budget(training, within="training")
        told = ", ".join(f"{name} = {shown(training[name])}" for name in given) or "none"
        raise ConfigError(
            "How long to train is said by exactly one of --steps, --tokens, --flops and --set training.samples=NUMBER; "
            f"given: {told}."
        )


def _configured(path: Path) -> dict[str, Any]:
    """The fields of a build stage from a config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are ValueErrors
        raise ConfigError(f"--model {path} can't be read: {reason(error)}. Give a model's config.json.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"--model {path} has no model_type: it is no config of a transformers model.")
    # A saved config also says where its model was from, which a new one is not.
    own = {k: v for k, v in config.items() if k not in ("model_type", "vocab_size", "auto_map") and k[:1] != "_"}
    return {"model_type": config["model_type"], "config": own}


def apply_override(values: dict[str, Any], override: str, option: str = "--set") -> None:
    """Set one value in place; `override` is "dotted.key=value" with the value in YAML; list items go by their index.
    Messages name the `option` that it was given with."""
    key, equals, text = override.partition("=")
    given = f"{option} {shown(override)}"
    *path, last = key.split(".")
    if not equals or not all([*path, last]):
        example = key if all(key.split(".")) and shown(key, quoted=False) == key else "KEY"
        raise ConfigError(f"{given} is no key=value. Write {option} {example}=VALUE, without spaces around the =.")
    if len(path) > DEEPEST:
        raise ConfigError(f"{given}: the key has {len(path) + 1} parts, and {DEEPEST} are the most.")
    target: Any = values
    for number, part in enumerate(path):
        target = target.setdefault(part, {}) if isinstance(target, dict) else target[_index(part, target, given)]
        if target is None:
            raise ConfigError(f"{given}: {'.'.join(path[: number + 1])!r} is null. Set it as a whole, to a mapping.")
        if not isinstance(target, dict | list):
            raise ConfigError(
                f"{given}: {'.'.join(path[: number + 1])!r} holds the value {shown(target)}, not a group of values."
            )
    value = read_yaml(text, f"{given}: the value {shown(text)}")
    if isinstance(target, list):
        target[_index(last, target, given)] = value
    else:
        target[last] = value


def _index(part: str, target: list[Any], given: str) -> int:
    """The number of the list's item that `part` names."""
    if not (part.isascii() and part.isdigit() and len(part) < 10 and int(part) < len(target)):
        there = f"Its last is {len(target) - 1}" if target else "Set the list as a whole"
        raise ConfigError(f"{given}: {shown(part)} is no index of a list of {len(target)}. {there}.")
    return int(part)
