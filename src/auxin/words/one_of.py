"""Fields that hold one of several settings classes, found by their kind in a registry."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from auxin.errors import AuxinError, ConfigError, shown
from auxin.field_errors import in_one_line, wrong_fields
from auxin.settings import Settings
from auxin.words.registry import Registry


class OneOf:
    """Annotation of a field that holds one of several settings classes, told apart by their `kind`.

        objective: Annotated[ObjectiveSettings, OneOf(OBJECTIVES)]

    takes `{kind: causal}`, the kind's name alone where it needs no settings, or the settings themselves.

    Args:
        registry: of the things by name.
        default: the kind of a mapping that names none; None: it has to.
        settings: (thing) -> its settings class, where the registry holds something else.
    """

    def __init__(
        self,
        registry: Registry[Any],
        default: str | None = None,
        settings: Callable[[Any], type[Settings]] | None = None,
    ) -> None:
        self.registry, self.default, self.settings = registry, default, settings

    def parse(self, values: Any) -> Any:
        """The settings that `values` are, or say.

        Raises:
            PydanticCustomError: a kind or a field that does not exist, or a wrong value.
        """
        if isinstance(values, Settings):
            return values
        values = {"kind": values} if isinstance(values, str) else values
        if not isinstance(values, Mapping):
            raise _one_of(
                [("", f"{shown(values)} is neither a mapping with `kind` nor the name of a {self.registry.kind}.")]
            )
        kind = values.get("kind", self.default)
        if not isinstance(kind, str):
            known = ", ".join(self.registry.all())
            raise _one_of([("kind", f"required, but not given. There are: {known}.")])
        try:
            thing = self.registry.find(kind)
        except AuxinError as error:
            raise _one_of([("kind", str(error))]) from error
        cls = thing if self.settings is None else self.settings(thing)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _one_of(wrong_fields(error, cls, values)) from error

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate by `parse`; write the kind even where defaults are left out."""

        def written(value: Any, info: core_schema.SerializationInfo) -> dict[str, Any]:
            values = value.model_dump(mode=info.mode, exclude_defaults=info.exclude_defaults)
            return {"kind": value.kind, **values}

        return core_schema.no_info_plain_validator_function(
            self.parse, serialization=core_schema.plain_serializer_function_ser_schema(written, info_arg=True)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The name of a kind that is installed, or a mapping with it; the fields of the kinds are not spelled out."""
        kinds = {"enum": list(self.registry.all())}
        required = {"required": ["kind"]} if self.default is None else {}
        return {"anyOf": [kinds, {"type": "object", "properties": {"kind": kinds}, **required}]}


def kinds_of(settings: type[Settings]) -> tuple[str, ...]:
    """The kinds that settings with a field `kind: Literal[...]` are found by."""
    return get_args(settings.model_fields["kind"].annotation)


def parse_one(one_of: OneOf, values: Any, source: str) -> Any:
    """The settings that `values` say, outside of a field; ConfigError that begins with `source`."""
    try:
        return one_of.parse(values)
    except PydanticCustomError as error:
        raise ConfigError(in_one_line(error.context["lines"], source)) from error  # type: ignore[index]


def _one_of(lines: list[tuple[str, str]]) -> PydanticCustomError:
    return PydanticCustomError("one_of", "one of several settings", {"lines": lines})
