"""The base of every settings class: strict, immutable, with errors that name the field and the nearest right one."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from auxin.errors import ConfigError
from auxin.files import write_text


class Settings(BaseModel):
    """Immutable settings that refuse unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: Any, source: str | None = None) -> Self:
        """Validate `values` (a mapping); raise ConfigError, one line per wrong field, instead of pydantic's error.

        Args:
            values: the mapping to validate.
            source: where the values come from (a file's name), put in front of the message.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe(error, cls, source, values)) from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and validate a YAML file; a missing file, a folder or broken YAML is a ConfigError too."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist. Give the path of an existing YAML file.") from error
        except IsADirectoryError as error:
            raise ConfigError(f"{path} is a folder. Give the path of a YAML file.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        values = read_yaml(text, str(path))
        if isinstance(values, dict):
            cls.refuse_other_file(values, str(path))
        return cls.parse(values, source=str(path))

    @classmethod
    def refuse_other_file(cls, values: dict[str, Any], path: str) -> None:
        """Raise ConfigError when the mapping in the file `path` has no field that these settings need: another file was
        given by mistake, and a line for each field of it would bury that."""
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        if len(required) > 1 and not any(name in values for name in required):
            raise ConfigError(f"{path} is no {cls.__name__.lower()}: it has none of {', '.join(required)}.")

    def to_yaml(self, path: str | Path) -> None:
        """Write the settings, defaults left out, as YAML; a reader sees the old file or the whole new one."""
        write_text(Path(path), yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False))


def read_yaml(text: str, source: str) -> Any:
    """What the YAML in `text` says; ConfigError that begins with `source` when it is broken."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: what looks like a date and is none
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is not valid YAML: it is nested too deeply.") from error


def describe(error: ValidationError, cls: type[BaseModel], source: str | None, values: Any) -> str:
    """Turn a pydantic error on `values` into lines that name each wrong field, its value and the nearest right one."""
    head = f"{source}: " if source else ""
    return head + "; ".join(f"{field}: {text}" if field else text for field, text in wrong_fields(error, cls, values))


def wrong_fields(error: ValidationError, cls: type[BaseModel], values: Any) -> list[tuple[str, str]]:
    """Each wrong field of `values`, and what is wrong with it."""
    lines: list[tuple[str, str]] = []
    for item in error.errors():
        field = ".".join(_written_path(item["loc"], values, item["type"]))
        context = item.get("ctx", {})
        if item["type"] == "one_of":
            lines += [(".".join(part for part in (field, inner) if part), text) for inner, text in context["lines"]]
        elif item["type"] == "extra_forbidden":
            near = _nearest(item["loc"][-1], _field_names(cls) - {item["loc"][-1]})
            if not near and len(item["loc"]) == 1:
                near = f" Known: {', '.join(cls.model_fields)}."
            lines.append((field, f"unknown field.{near}"))
        elif item["type"] == "missing":
            lines.append((field, "required, but not given."))
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            field = ".".join(part for part in (field, context["discriminator"].strip("'")) if part)
            if "tag" not in context:
                lines.append((field, "required, but not given."))
                continue
            near = _nearest(context["tag"], _QUOTED.findall(context["expected_tags"]))
            lines.append((field, f"{context['tag']!r} is none of {context['expected_tags']}.{near}"))
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] in ("list_type", "tuple_type"):  # one word for both: what is written is YAML
                message = "Input should be a list, [a, b]"
            # A check of several fields at once names them itself; repeating the whole mapping would bury its message.
            received = "" if isinstance(item["input"], dict) else f" (received {item['input']!r})"
            if item["type"] == "literal_error" and (near := _nearest(item["input"], _QUOTED.findall(item["msg"]))):
                received += "." + near
            lines.append((field, message + received))
    return lines


_QUOTED = re.compile(r"'([^']*)'")


def _nearest(name: Any, known: Iterable[str]) -> str:
    near = get_close_matches(str(name), sorted(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _written_path(loc: Sequence[str | int], values: Any, kind: str) -> list[str]:
    """`loc` without what pydantic puts in between: a union's member says nothing to the person who wrote the values."""
    path = []
    node = values
    for number, part in enumerate(loc):
        is_key = isinstance(node, dict) and part in node
        is_index = isinstance(node, list | tuple) and isinstance(part, int) and part < len(node)
        is_missing = kind == "missing" and number == len(loc) - 1
        if is_key or is_index:
            node = node[part]
        elif isinstance(node, dict | list | tuple | str | int | float | None) and not is_missing:
            continue
        path.append(str(part))
    return path


def _field_names(cls: type[BaseModel], seen: frozenset[type] = frozenset()) -> set[str]:
    """The names of all fields of `cls` and of the models nested in it."""
    names: set[str] = set()
    for name, field in cls.model_fields.items():
        names.add(field.alias or name)
        names |= _nested_names(field.annotation, seen | {cls})
    return names


def _nested_names(annotation: Any, seen: frozenset[type]) -> set[str]:
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel) and annotation not in seen:
            return _field_names(annotation, seen)
        return set()
    names: set[str] = set()
    for argument in getattr(annotation, "__args__", ()):
        names |= _nested_names(argument, seen)
    return names
