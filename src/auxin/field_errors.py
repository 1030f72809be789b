"""What is wrong with the fields of settings, in words for whoever wrote them, and who need not know pydantic."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from auxin.errors import MOST_NAMES, listed, near_name, shown

MOST_LINES = 6
"""Wrong fields that one message tells of: what follows is most often wrong for the same reason."""

_WANTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a finite number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("string_type", "string_unicode", "string_sub_type"), "text"),
    **dict.fromkeys(("list_type", "tuple_type", "iterable_type", "set_type"), "a list, [a, b]"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"),
        "a mapping, {{field: value}}",
    ),
    **dict.fromkeys(("path_type", "path_parsing"), "a path"),
    "none_required": "null",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of {max_length} characters or less",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or less",
}
"""What a field takes, by the kind of pydantic's error; in braces what the error knows."""
_WRITTEN_AS_TEXT = (bool, int, float, type(None))
"""What YAML takes some words for."""


def wrong_fields(error: ValidationError, cls: type[BaseModel], values: Any) -> list[tuple[str, str]]:
    """Each wrong field of `values`, behind the names of the branch and stage, or of whatever has a name, in which it
    stands; and what is wrong with it."""
    told: dict[tuple[str, str], dict[str, None]] = {}
    for item in error.errors(include_url=False):
        place, parts = _named_place(item["loc"], values), _written_path(item["loc"], values, item["type"])
        for inner, wanted, received in _told(item, cls):
            field = place + ".".join([*parts, *([inner] if inner else [])])
            told.setdefault((field, received), {})[wanted] = None
    return [(field, _joined(list(wanted), received)) for (field, received), wanted in told.items()]


def describe(error: ValidationError, cls: type[BaseModel], source: str | None, values: Any, within: str = "") -> str:
    """Turn a pydantic error on `values` into one line that names each wrong field, its value and the nearest right
    one; the fields lie `within` a dotted one."""
    head = f"{source}: " if source else ""
    return head + in_one_line(wrong_fields(error, cls, values), within)


def wrong_value(error: ValidationError) -> str:
    """What a value that is no field's must be, that of an option say, and what was received."""
    item: Any = error.errors(include_url=False)[0]
    return "".join(_wanted(item["type"], item.get("ctx", {}), item["input"], item["msg"]))


def in_one_line(lines: Sequence[tuple[str, str]], within: str = "") -> str:
    """The first of some wrong fields, each with what is wrong, and how many more there are."""
    fields = [(".".join(part for part in (within, field) if part), text) for field, text in lines[:MOST_LINES]]
    told = [f"{field}: {text}" if field else text for field, text in fields]
    told += [f"and {len(lines) - MOST_LINES:,} more wrong fields"] if len(lines) > MOST_LINES else []
    return "; ".join([*(text.removesuffix(".") for text in told[:-1]), told[-1]])


def _joined(wanted: list[str], received: str) -> str:
    """What several members of a union want, told once."""
    first, *others = wanted
    return " or ".join([first, *(each.removeprefix("must be ") for each in others)]) + received


def _told(item: Any, cls: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """Of one error: the field within the one that it is about, what is wrong, and what was received."""
    kind, context, value = item["type"], item.get("ctx", {}), item["input"]
    if kind == "one_of":
        yield from ((inner, text, "") for inner, text in context["lines"])
    elif kind == "extra_forbidden":
        yield "", "unknown field." + _meant(item["loc"], cls), ""
    elif kind == "missing":
        yield "", "required, but not given.", ""
    elif kind == "invalid_key" or item["loc"][-1:] == ("[key]",):
        yield "", f"{shown(value)} is no name of a field. Names are text", ""
    elif kind == "union_tag_not_found":
        yield context["discriminator"].strip("'"), "required, but not given.", ""
    elif kind == "union_tag_invalid":
        tags = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        hint, known = (
            near_name(context["tag"], tags),
            f" of {', '.join(tags) if len(tags) <= MOST_NAMES // 2 else f'the {len(tags)} kinds'}",
        )
        yield context["discriminator"].strip("'"), f"{shown(context['tag'])} is none{known}.{hint}", ""
    elif kind in ("value_error", "assertion_error"):
        # A check of several fields at once names them itself; repeating the whole mapping would bury its message.
        received = "" if isinstance(value, dict) else f" (received {shown(value)})"
        yield "", str(context.get("error") or item["msg"]), received
    else:
        yield "", *_wanted(kind, context, value, item["msg"])


def _wanted(kind: str, context: Mapping[str, Any], value: Any, message: str) -> tuple[str, str]:
    """What a field takes, and what it got."""
    received = f" (received {shown(value)})"
    if kind in ("too_short", "too_long"):
        length = context.get("actual_length")
        received = f" (received {'more' if length is None else length})"
    if kind == "literal_error":
        known = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        if value not in known:  # as the number 3 in quotes is
            received = f"{received}.{near_name(value, known)}".removesuffix(".")
    if kind == "string_type" and isinstance(value, _WRITTEN_AS_TEXT):
        received += ". Put text that looks like something else in quotes"
    bounds = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in context.items()}
    wanted = _WANTED.get(kind)
    return ("must be " + wanted.format(**bounds) if wanted else message), received


def _meant(loc: Sequence[str | int], cls: type[BaseModel]) -> str:
    """The field that an unknown one was most likely meant to be, or those that there are."""
    name, holders = str(loc[-1]), _holders(cls, loc[:-1])
    elsewhere = {
        inner: f"{field}.{inner}"
        for holder in holders
        for field, settings in getattr(holder, "open_fields", dict)().items()
        for inner in settings.model_fields
    }
    own = list(dict.fromkeys(field for holder in holders for field in holder.model_fields))
    if name in elsewhere:
        return f" Did you mean {elsewhere[name]!r}?"
    if near := near_name(name, set(own) - {name}):
        return near
    for inner in elsewhere:
        if near_name(name, [inner]):
            return f" Did you mean {elsewhere[inner]!r}?"
    return f" Known: {listed(own)}."


def _holders(cls: type[BaseModel], loc: Sequence[str | int]) -> list[type[BaseModel]]:
    """The settings that a place within those of `cls` may hold."""
    found = [cls]
    for part in loc:
        if inner := [model for one in found if part in one.model_fields for model in _models_in(one, str(part))]:
            found = inner
        elif isinstance(part, str):  # which member of a union it is, by its kind
            found = [one for one in found if part in (*_kinds(one), one.__name__)] or found
    return found


def _models_in(cls: type[BaseModel], field: str) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    open_ones = [cls.model_fields[field].annotation]
    while open_ones:
        annotation = open_ones.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            open_ones += get_args(annotation)
    return found


def _kinds(cls: type[BaseModel]) -> Iterable[str]:
    return get_args(cls.model_fields["kind"].annotation) if "kind" in cls.model_fields else ()


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
        path.append(shown(str(part), quoted=False) or "''")
    return path


def _named_place(loc: Sequence[str | int], values: Any) -> str:
    """The names of what lies around a place, two of them at most: "grown/base: " for a stage of a branch."""
    names: list[str] = []
    node = values
    for part in loc:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list | tuple) and isinstance(part, int) and part < len(node):
            node = node[part]
            name = node.get("name", node.get("kind") if names else None) if isinstance(node, dict) else None
            names += [shown(name, quoted=False)] if name and isinstance(name, str) else []
    return "/".join(names[:2]) + ": " if names else ""
