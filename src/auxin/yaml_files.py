"""YAML as recipes, plans and `--set` are written in it: one way to read and to write it, whose errors name the line and
the column.

What can be said is what JSON can say: text, numbers, true and false, null, lists and mappings. Every key stands once,
depth and size are bounded, and an alias (`*name`) is a copy of what it names, so that changing one changes no other.
`1e-3` is a number, as in YAML 1.2 and in JSON; the rest is YAML 1.1.
"""

import copy
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.reader import Reader

from auxin.errors import ConfigError, reason, shown
from auxin.files import write_text

SMALL = 2**18
"""Characters of what people write: a recipe of two hundred branches has fewer."""
LARGE = 2**28
"""Characters of what programs write: a plan that says of every unit of a large model where it comes from has fewer."""
MOST_REPEATED = 100_000
"""Values that aliases stand for, those within them counted. What stands without an alias is bounded by the text."""
DEEPEST = 64
"""Lists and mappings within each other."""
LARGEST_NUMBER = 2**1023
"""Whole numbers are smaller, so that each has a float; fields have bounds of their own."""


def read_yaml(text: str, source: str, largest: int = SMALL) -> Any:
    """What the YAML in `text` says.

    Args:
        text: one document; an empty one says None.
        source: where the text comes from; messages begin with it.
        largest: characters that it may have.

    Raises:
        ConfigError: it is no YAML, says what JSON can't, has a key twice, or is too large or too deep.
    """
    if len(text) > largest:
        raise ConfigError(
            f"{source} is too large: it has {len(text):,} characters, and {largest:,} are the most. Was another "
            "file meant?"
        )
    if wrong := Reader.NON_PRINTABLE.search(text):
        line, column = text.count("\n", 0, wrong.start()), wrong.start() - text.rfind("\n", 0, wrong.start()) - 1
        raise ConfigError(
            f"{source} is not valid YAML: {_place(line, column)}: the character {wrong.group()!r} can't stand there. "
            "Remove it, or write it as an escape between double quotes."
        )
    reading = _Reading(text)
    try:
        return reading.document()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {_in_words(error)}.") from error
    finally:
        reading.dispose()


def read_yaml_file(path: str | Path, largest: int = SMALL) -> Any:
    """What the YAML in the file `path` says.

    Raises:
        ConfigError: as `read_yaml`, or the file can't be read.
    """
    path, name = Path(path), shown(str(path), quoted=False)
    wanted, content = "Give the path of a YAML file.", b""
    try:
        other = "a folder" if path.is_dir() else "no regular file" if path.exists() and not path.is_file() else None
        if other is None:
            with path.open("rb") as file:
                content = file.read(4 * largest + 1)  # a character has four bytes at most
    except FileNotFoundError as error:
        raise ConfigError(f"{name} does not exist. Give the path of an existing YAML file.") from error
    except (OSError, ValueError) as error:  # a ValueError: a path with a null character
        raise ConfigError(f"{name} can't be read: {reason(error)}. {wanted}") from error
    if other is not None:
        raise ConfigError(f"{name} is {other}. {wanted}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(content) > 4 * largest:
            raise ConfigError(
                f"{name} is too large: {largest:,} characters are the most. Was another file meant?"
            ) from error
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name} can't be read: the byte 0x{content[error.start]:02x} in line {line} is no UTF-8 text. Give a YAML "
            "file, saved as UTF-8."
        ) from error
    return read_yaml(text, name, largest)


def write_yaml_file(path: Path, values: Any) -> None:
    """Write `values` as YAML that `read_yaml_file` reads again; a reader sees the old file or the whole new one."""
    write_text(path, yaml.dump(values, Dumper=_Dumper, sort_keys=False))


_TAG = "tag:yaml.org,2002:"
_IN_WORDS = {"int": "whole number", "float": "number", "bool": "true or false", "null": "null", "timestamp": "date"}
_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*\.?|[0-9]*\.[0-9_]+)[eE][-+]?[0-9]+$")


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that would be read as a number."""


class _Events:
    """Makes values of a parser's events, one after the other, so that it stops at the first that is wrong."""

    get_event: Any
    peek_event: Any
    check_event: Any
    resolve: Any
    yaml_constructors: Any

    def __init__(self, text: str) -> None:
        super().__init__(text)  # type: ignore[call-arg] # of the parser
        self._named: dict[str, tuple[Any, int, int] | None] = {}
        """By an anchor its value, the values in it and how deep they are; None while it is being read."""
        self._count = self._repeated = self._depth = self._height = 0

    def document(self) -> Any:
        """The value of the only document."""
        self.get_event()
        if self.check_event(yaml.StreamEndEvent):
            return None
        self.get_event()
        value = self._value()
        self.get_event()
        if not self.check_event(yaml.StreamEndEvent):
            _refuse("a second document begins here, and one is all that is read. Remove it", self.peek_event())
        return value

    def _value(self) -> Any:
        event = self.get_event()
        if isinstance(event, yaml.AliasEvent):
            return self._copied(event)
        self._count += 1
        before, self._height, outer = self._count, 0, self._height
        if event.anchor is not None:
            self._named[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, self._tag(event, yaml.ScalarNode, event.value))
        else:
            self._depth += 1
            self._bounded(event, 0)
            is_list = isinstance(event, yaml.SequenceStartEvent)
            value = self._list(event) if is_list else self._mapping(event)
            self._depth -= 1
            self._height += 1
        if event.anchor is not None:
            self._named[event.anchor] = (value, self._count - before + 1, self._height)
        self._height = max(outer, self._height)
        return value

    def _copied(self, event: Any) -> Any:
        alias = f"the alias *{shown(event.anchor, quoted=False)}"
        if event.anchor not in self._named:
            known = shown(", ".join(self._named) or "none", quoted=False)
            _refuse(f"{alias} stands for nothing that is written above. Anchors (&name) before it: {known}", event)
        named = self._named[event.anchor]
        if named is None:
            _refuse(f"{alias} stands within what it stands for, which would have no end. Write the values out", event)
        value, size, height = named
        self._count += size
        self._repeated += size
        if self._repeated > MOST_REPEATED:
            _refuse(f"aliases stand for more than {MOST_REPEATED:,} values. Use fewer", event)
        self._bounded(event, height)
        self._height = max(self._height, height)
        return copy.deepcopy(value)

    def _bounded(self, event: Any, height: int) -> None:
        if self._depth + height > DEEPEST:
            _refuse(f"lists and mappings are nested more than {DEEPEST} deep here", event)

    def _list(self, event: Any) -> list[Any]:
        self._tag(event, yaml.SequenceNode, None)
        values = []
        while not self.check_event(yaml.SequenceEndEvent):
            values.append(self._value())
        self.get_event()
        return values

    def _mapping(self, event: Any) -> dict[Any, Any]:
        self._tag(event, yaml.MappingNode, None)
        own: dict[Any, Any] = {}
        lines: dict[Hashable, int] = {}
        merged: list[dict[Any, Any]] = []
        while not self.check_event(yaml.MappingEndEvent):
            key_event = self.peek_event()
            is_merge = isinstance(key_event, yaml.ScalarEvent) and key_event.value == "<<" and key_event.implicit[0]
            key = self._value()
            if isinstance(key, list | dict):
                _refuse("a key has to be a single value, and this is a list or a mapping", key_event)
            if key in lines:
                _refuse(f"the key {shown(key)} stands in line {lines[key]} already. Remove one of the two", key_event)
            lines[key] = key_event.start_mark.line + 1
            value_event = self.peek_event()
            value = self._value()
            if is_merge:
                merged += self._to_merge(value, value_event)
            else:
                own[key] = value
        self.get_event()
        for other in merged:  # what stands earlier goes first, and what the mapping says itself before all
            own = {**other, **own}
        return own

    @staticmethod
    def _to_merge(value: Any, event: Any) -> list[dict[Any, Any]]:
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(each, dict) for each in found):
            _refuse("<< takes a mapping, or a list of mappings", event)
        return found

    def _tag(self, event: Any, kind: Any, value: Any) -> str:
        """What an event is by its tag or its looks: "int", "str", "seq", ..."""
        tag = event.tag
        if tag is None or tag == "!":
            tag = self.resolve(kind, value, event.implicit)
        name = str(tag).removeprefix(_TAG)
        wanted = {yaml.SequenceNode: {"seq"}, yaml.MappingNode: {"map"}}.get(kind)
        if wanted is None:
            wanted = {*_IN_WORDS, "str", "value", "merge"}
        if name not in wanted:
            _refuse(f"the tag {shown(_written(tag), quoted=False)} can't stand here. Leave it out", event)
        return name

    def _scalar(self, event: Any, name: str) -> Any:
        if name in ("str", "value", "merge"):
            return event.value
        node = yaml.ScalarNode(f"{_TAG}{name}", event.value, event.start_mark, event.end_mark)
        if name == "timestamp":
            _refuse(
                f"{shown(event.value, quoted=False)} would be a date, and nothing takes one. Put it in quotes", event
            )
        try:
            value = self.yaml_constructors[node.tag](self, node)
            if name == "int" and abs(value) >= LARGEST_NUMBER:
                raise ValueError("too large")
        # What the constructors do with what only looks like a number, or is called one: int(""), {}["x"], 5,000 digits.
        except (ValueError, LookupError, ArithmeticError) as error:
            _refuse(
                f"{shown(event.value)} is no {_IN_WORDS[name]} that can be read. Mend it, or put it in quotes",
                event,
                error,
            )
        return value


class _InPython(_Events, yaml.SafeLoader):
    """By the parser that is there everywhere."""


READERS: list[Any] = [_InPython]
if yaml.__with_libyaml__:

    class _InC(_Events, yaml.CSafeLoader):
        """By one that reads the same, ten times as fast."""

    READERS.append(_InC)
_Reading = READERS[-1]

for _kind in (_Dumper, *READERS):
    _kind.add_implicit_resolver(f"{_TAG}float", _EXPONENT, list("-+.0123456789"))


def _refuse(problem: str, event: Any, cause: Exception | None = None) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark) from cause


def _written(tag: str) -> str:
    """A tag as it is written."""
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag


def _place(line: int, column: int) -> str:
    """Counted from 1, as editors do."""
    return f"line {line + 1}, column {column + 1}"


def _in_words(error: yaml.MarkedYAMLError) -> str:
    """The parser's message in one line, behind its place."""
    mark = error.problem_mark or error.context_mark
    assert mark is not None  # every error that is raised while reading has a place
    words = str(error.problem or error.context).strip()
    if error.problem and error.context:
        words += f", {error.context.strip()}"
        if error.context_mark is not None and error.context_mark.line != mark.line:
            words += f" that begins in line {error.context_mark.line + 1}"
    return f"{_place(mark.line, mark.column)}: {words}"
