"""The base of every settings class: strict, immutable, with errors that name the field and the nearest right one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from auxin.errors import ConfigError, shown
from auxin.field_errors import describe
from auxin.yaml_files import SMALL, read_yaml_file, write_yaml_file


class Settings(BaseModel):
    """Immutable settings that refuse unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    largest_file: ClassVar[int] = SMALL
    """Characters of a YAML file of these settings."""

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """`true` is no 1, which pydantic takes it for; also in lists and mappings, and in those within them."""
        for name, value in values.items() if isinstance(values, dict) else ():
            found = _truth_in(value)  # asked first: of most fields there is none, and annotations take longer to read
            if found is not None and name in cls.model_fields and _is_of_numbers(cls.model_fields[name].annotation):
                where, truth = found
                raise ValueError(f"{name}{where}: must be a number (received {str(truth).lower()})")
        return values

    @classmethod
    def open_fields(cls) -> "dict[str, type[Settings]]":
        """Fields that hold any mapping, each with the settings whose fields it is meant for: one of these that is given
        to this class instead is told where it belongs."""
        return {}

    @classmethod
    def parse(cls, values: Any, source: str | None = None, within: str = "") -> Self:
        """Validate `values` (a mapping); raise ConfigError, one line per wrong field, instead of pydantic's error.

        Args:
            values: the mapping to validate.
            source: where the values come from (a file's name), put in front of the message.
            within: the dotted field that holds them, put in front of each field's name.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe(error, cls, source, values, within)) from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and validate a YAML file; a missing file, a folder or broken YAML is a ConfigError too."""
        values = read_yaml_file(path, cls.largest_file)
        cls.refuse_other_file(values, str(path))
        return cls.parse(values, source=str(path))

    @classmethod
    def refuse_other_file(cls, values: Any, path: str) -> None:
        """Raise ConfigError when what the file `path` says has no field that these settings need: another file was
        given by mistake, and a line for each field of it would bury that."""
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        if not isinstance(values, dict):
            what = "is empty" if values is None else f"holds {shown(values)}"
            needs = f" with {', '.join(required)}" if required else ""
            raise ConfigError(f"{path} is no {cls.__name__.lower()}: it {what}. Give a file with a mapping{needs}.")
        if len(required) > 1 and not any(name in values for name in required):
            raise ConfigError(f"{path} is no {cls.__name__.lower()}: it has none of {', '.join(required)}.")

    def to_yaml(self, path: str | Path) -> None:
        """Write the settings, defaults left out, as YAML; a reader sees the old file or the whole new one."""
        write_yaml_file(Path(path), self.model_dump(mode="json", exclude_defaults=True))


def _is_of_numbers(annotation: Any) -> bool:
    """Whether a field, or each entry of it, is a number, or one or a name: nothing that true and false could be."""
    parts = list(_parts(annotation))
    names = [part for part in parts if isinstance(part, str) or part is str]
    return len(parts) > len(names) and all(part in (int, float) for part in parts if part not in names)


def _truth_in(value: Any) -> tuple[str, bool] | None:
    """The first true or false that is `value`, or that lists and mappings in it hold, keys too, behind its place in
    them (".1.0", empty for the value itself); None where there is none."""
    if isinstance(value, bool):
        return "", value
    if isinstance(value, dict):
        if (key := next((key for key in value if isinstance(key, bool)), None)) is not None:
            return "", key
        entries: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    else:
        return None
    for name, one in entries:
        if (found := _truth_in(one)) is not None:
            return f".{name}{found[0]}", found[1]
    return None


def _parts(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of, but None, "..." and what is said beside a type: classes, and what a Literal
    lists."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        inner = inner[:1]
    for part in inner:
        yield from _parts(part)
    if not inner and annotation not in (type(None), ...):
        yield annotation
