"""Find a recipe: by the name of a built-in one or by its file; and change single values of it."""

import contextlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from auxin.errors import ConfigError, unknown_name
from auxin.models.tokenformer.presets import PRESETS
from auxin.recipes.schema import Recipe
from auxin.settings import read_yaml

BUILTIN = files("auxin.recipes") / "builtin"


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
    if path.suffix in {".yaml", ".yml"} or path.name != name_or_path:
        if not path.is_file():
            raise ConfigError(
                f"Recipe file {name_or_path} does not exist. Give an existing YAML file or a built-in name."
            )
        text = _read(path)
    else:
        resource = BUILTIN / f"{name_or_path}.yaml"
        if not resource.is_file():
            known = [path.name.removesuffix(".yaml") for path in BUILTIN.iterdir() if path.name.endswith(".yaml")]
            raise ConfigError(unknown_name("recipe", name_or_path, known) + " A file needs its .yaml suffix.")
        text = resource.read_text(encoding="utf-8")
    values = read_yaml(text, name_or_path)
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path} holds no recipe: expected a mapping with name, title, data and branches.")
    for override in overrides or []:
        apply_override(values, override)
    Recipe.refuse_other_file(values, name_or_path)
    return Recipe.parse(values, source=name_or_path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as UTF-8 text: {error}.") from error


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
    path = Path(model)
    if path.is_dir():
        build: dict[str, Any] = {"checkpoint": model}
        corpus.setdefault("tokenizer", model)
    elif path.suffix == ".json":
        build = _configured(path)
    elif model.lower() in PRESETS:
        build = {"preset": model}
    else:
        raise ConfigError(
            f"--model {model!r} is no folder and no config.json. " + unknown_name("preset", model.lower(), PRESETS)
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
    return Recipe.parse(values)


def _configured(path: Path) -> dict[str, Any]:
    """The fields of a build stage from a config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are ValueErrors
        raise ConfigError(f"--model {path} can't be read: {error}. Give a model's config.json.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"--model {path} has no model_type: it is no config of a transformers model.")
    # A saved config also says where its model was from, which a new one is not.
    own = {k: v for k, v in config.items() if k not in ("model_type", "vocab_size", "auto_map") and k[:1] != "_"}
    return {"model_type": config["model_type"], "config": own}


def apply_override(values: dict[str, Any], override: str, option: str = "--set") -> None:
    """Set one value in place; `override` is "dotted.key=value" with the value in YAML; list items go by their index.
    Messages name the `option` that it was given with."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{option} {override!r} is no key=value. Write {option} {key or 'KEY'}=VALUE, without spaces around the =."
        )
    *path, last = key.split(".")
    target: Any = values
    for part in path:
        try:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{option} {override!r}: {part!r} is no index of a list of {len(target)}.") from error
        if not isinstance(target, dict | list):
            raise ConfigError(f"{option} {override!r}: {part!r} holds the value {target!r}, not a group of values.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: what looks like a date and is none
        reason = str(getattr(error, "problem", None) or error)
        raise ConfigError(f"{option} {override!r}: the value {text!r} is not valid YAML: {reason}.") from error
    if isinstance(value, str):
        # YAML 1.1 takes 1e-3 for text, as it wants a dot in the mantissa.
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(target, list):
        try:
            target[int(last)] = value
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{option} {override!r}: {last!r} is no index of a list of {len(target)}.") from error
    else:
        target[last] = value
