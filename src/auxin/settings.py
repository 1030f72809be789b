"""The base of every settings class: strict, immutable, with errors that name the field and the nearest right one."""

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
            raise ConfigError(describe(error, cls, source)) from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and validate a YAML file; a missing file or broken YAML is a ConfigError too."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist. Give the path of an existing YAML file.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        return cls.parse(values, source=str(path))

    def to_yaml(self, path: str | Path) -> None:
        """Write the settings, defaults left out, as YAML; a reader sees the old file or the whole new one."""
        write_text(Path(path), yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False))


def describe(error: ValidationError, cls: type[BaseModel], source: str | None) -> str:
    """Turn a pydantic error into lines that name each wrong field, its value and, if unknown, the nearest right one."""
    lines = []
    for item in error.errors():
        # Discriminators of unions appear in `loc` as tags; they say nothing to the person who wrote the file.
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = get_close_matches(str(item["loc"][-1]), _field_names(cls), n=1)
            lines.append(f"{field}: unknown field." + (f" Did you mean {near[0]!r}?" if near else ""))
        elif item["type"] == "missing":
            lines.append(f"{field}: required, but not given.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # A check of several fields at once names them itself; repeating the whole mapping would bury its message.
            received = "" if isinstance(item["input"], dict) else f" (received {item['input']!r})"
            lines.append((f"{field}: " if field else "") + message + received)
    head = f"{source}: " if source else ""
    return head + "; ".join(lines)


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
