"""Write the tables of the documentation that come from the code, between their markers in the pages.

    python docs/generate_tables.py           rewrites what is out of date
    python docs/generate_tables.py --check   changes nothing, exits with 1 when something is out of date

A table stands between `<!-- generated:begin NAME -->` and `<!-- generated:end NAME -->`; NAME is a key of `TABLES`.
"""

import argparse
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from auxin.data import CorpusSettings
from auxin.methods.grow.tokenformer import TokenGrowth
from auxin.models.tokenformer.presets import PRESETS
from auxin.recipes.schema import Branch, BuildStage, EvaluateStage, GrowStage, Recipe, TrainStage
from auxin.training import GuardSettings, TrainingSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/recipes.md", "docs/tokenformer.md")
SETTINGS: tuple[type[BaseModel], ...] = (
    Recipe,
    CorpusSettings,
    Branch,
    BuildStage,
    TrainStage,
    GrowStage,
    EvaluateStage,
    TrainingSettings,
    GuardSettings,
    TokenGrowth,
)
"""The settings classes that a recipe is made of."""
MARKED = re.compile(
    r"(<!-- generated:begin (?P<name>\S+) -->\n)(?P<body>.*?)(<!-- generated:end (?P=name) -->)", re.DOTALL
)
BEYOND_SENSE = 1e18
"""Limits from here on are the machine's and say nothing to a person."""
SYMBOLS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def fields_table(settings: type[BaseModel]) -> str:
    """One row for each field: name, type, default and the docstring under it in the code."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in settings.model_fields.items():
        if not field.description:
            sys.exit(f"{settings.__name__}.{name} has no docstring. Write one line under the field.")
        meaning = re.sub(r"\bNone\b", "`null`", " ".join(field.description.split()))
        cells = (f"`{name}`", _type(field), _default(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def presets_table() -> str:
    """One row for each TokenFormer preset, with the count that its shape gives."""
    lines = [
        "| preset | family | layers | width | heads | tokens q, k, v, o | tokens FFN | context | parameters |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, preset in PRESETS.items():
        sizes = (preset.num_hidden_layers, preset.hidden_size, preset.num_attention_heads)
        numbers = [*sizes, preset.tokens, 4 * preset.tokens, preset.context_length, preset.config().num_parameters()]
        lines.append(f"| `{name}` | {preset.family} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets_table,
    **{settings.__name__: (lambda settings=settings: fields_table(settings)) for settings in SETTINGS},
}


def _type(field: FieldInfo) -> str:
    limits = [
        f"{symbol} {limit:g}"
        for item in field.metadata
        for name, symbol in SYMBOLS.items()
        if (limit := getattr(item, name, None)) is not None and limit < BEYOND_SENSE
    ]
    return ", ".join([_name(field.annotation), *limits])


def _name(annotation: Any) -> str:
    """A type in the words of someone who writes YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if all(isinstance(argument, type) and issubclass(argument, BaseModel) for argument in arguments):
            return "stage"
        return " or ".join(_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_name(arguments[0])}"
    if origin is tuple:
        return f"list of {_name(arguments[0])}" if arguments[-1] is Ellipsis else f"{len(arguments)} numbers"
    if origin is dict:
        return "mapping"
    if origin is not None:  # Annotated
        return _name(arguments[0])
    words = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "`true` or `false`",
        type(None): "`null`",
        Path: "path",
    }
    if annotation in words:
        return words[annotation]
    return f"[{annotation.__name__}](#{annotation.__name__.lower()})"


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "required" if field.default_factory is None else "-"
    if isinstance(default, BaseModel):
        return "its defaults"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (tuple, list)):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default}`" if default != "" else "empty"


def filled(text: str) -> str:
    """`text` of a page with every generated part brought up to date."""
    return MARKED.sub(lambda match: match[1] + "\n" + TABLES[match["name"]]() + "\n" + match[4], text)


def main() -> None:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(page)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print("out of date:" if check else "rewritten:", ", ".join(stale))
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
