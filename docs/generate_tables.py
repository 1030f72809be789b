"""Write the tables of the documentation that come from code or measurements, between their markers in the pages.

    python docs/generate_tables.py           rewrites what is out of date
    python docs/generate_tables.py --check   changes nothing, exits with 1 when something is out of date

A table stands between `<!-- generated:begin NAME -->` and `<!-- generated:end NAME -->`; NAME is a key of `TABLES`. The
README's table of the demo, between `<!-- demo-table:begin -->` and `<!-- demo-table:end -->`, is that of
docs/results/demo.md.
"""

import argparse
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from auxin.accounting import Electricity
from auxin.data import CorpusSettings, DatasetSettings
from auxin.data.image_source import LabelledImagesSettings
from auxin.data.labelled_source import LabelledTextSettings
from auxin.data.question_source import QuestionAnsweringSettings
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.methods.factorize.structured_ffn import GuideFadeSettings
from auxin.methods.grow.masked import MaskRampSettings
from auxin.methods.grow.tokenformer import OldTokenRatesSettings, TauAnnealSettings, TokenGrowth
from auxin.methods.restructure.clipped_softmax import GammaRampSettings
from auxin.models.tokenformer.presets import PRESETS, VISION_PRESETS, Preset, VisionPreset
from auxin.objectives.calibration import CalibrationSettings
from auxin.objectives.causal import Causal
from auxin.objectives.classification import Classification
from auxin.objectives.distillation import Distillation
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.measures import Accuracy, ExactMatch, Loss, MacroF1, Measure, TokenF1
from auxin.objectives.objective import ObjectiveSettings
from auxin.objectives.question_answering import QuestionAnswering
from auxin.objectives.span_corruption import SpanCorruption
from auxin.planning.hooks import ExactRatesSettings, HookSettings, OldRatesSettings, TrainOnlySettings
from auxin.recipes.schema import Branch, BuildStage, ChangeStage, EvaluateStage, Recipe, TrainStage
from auxin.training import GuardSettings, TrainingSettings
from auxin.training.lora import Lora

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/recipes.md", "docs/tokenformer.md", "docs/vision.md", "docs/results/pattention.md")
DEMO_PAGE = ROOT / "docs" / "results" / "demo.md"
MEASURED = ROOT / "benchmarks" / "results"
SETTINGS: tuple[type[BaseModel], ...] = (
    Recipe,
    Electricity,
    CorpusSettings,
    StreamedTextSettings,
    LabelledTextSettings,
    QuestionAnsweringSettings,
    LabelledImagesSettings,
    Branch,
    BuildStage,
    TrainStage,
    Lora,
    ChangeStage,
    CalibrationSettings,
    EvaluateStage,
    TrainingSettings,
    Causal,
    SpanCorruption,
    Loss,
    Accuracy,
    MacroF1,
    ExactMatch,
    TokenF1,
    OldRatesSettings,
    OldTokenRatesSettings,
    TauAnnealSettings,
    GuideFadeSettings,
    GammaRampSettings,
    MaskRampSettings,
    TrainOnlySettings,
    ExactRatesSettings,
    Classification,
    QuestionAnswering,
    GuardSettings,
    TokenGrowth,
    MaskedLanguage,
    Distillation,
)
"""The settings classes that a recipe is made of."""
MARKED = re.compile(
    r"(<!-- generated:begin (?P<name>\S+) -->\n)(?P<body>.*?)(<!-- generated:end (?P=name) -->)", re.DOTALL
)
DEMO_TABLE = re.compile(r"<!-- demo-table:begin -->\n(?P<table>.*?)<!-- demo-table:end -->", re.DOTALL)
BEYOND_SENSE = 1e18
"""Limits from here on are the machine's and say nothing to a person."""
SEVERAL_KINDS: dict[type[BaseModel], str] = {
    DatasetSettings: "[data](#corpussettings)",
    ObjectiveSettings: "[objective](#objectives)",
    Measure: "[measure](#measures)",
    HookSettings: "[hook](#hooks)",
}
"""Bases of settings of several kinds, and where their kinds are explained."""
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
        lines.append(f"| `{name}` | {preset.family} | " + _preset_numbers(preset, preset.context_length))
    return "\n".join(lines) + "\n"


def vision_presets_table() -> str:
    """One row for each TokenFormer preset of images, with the count that its shape gives."""
    lines = [
        "| preset | layers | width | heads | tokens q, k, v, o | tokens FFN | patch | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, preset in VISION_PRESETS.items():
        lines.append(f"| `{name}` | " + _preset_numbers(preset, preset.patch_size))
    return "\n".join(lines) + "\n"


def _preset_numbers(preset: Preset | VisionPreset, own: int) -> str:
    """The rest of a preset's row; `own` is the size that its kind alone has."""
    sizes = (preset.num_hidden_layers, preset.hidden_size, preset.num_attention_heads)
    numbers = [*sizes, preset.tokens, 4 * preset.tokens, own, preset.config().num_parameters()]
    return " | ".join(f"{number:,}" for number in numbers) + " |"


def pattention_tables() -> str:
    """What benchmarks/pattention.py measured: a table for each device that it has a record of."""
    parts = [
        _pattention_table(json.loads(path.read_text(encoding="utf-8")))
        for device in ("cpu", "cuda")
        if (path := MEASURED / f"pattention-{device}.json").exists()
    ]
    return "\n".join(parts or ["Not measured yet.\n"])


def _pattention_table(record: dict[str, Any]) -> str:
    machine = record["machine"]
    broken = [f"- {message}" for message in record["broken"]] or ["All bounds hold."]
    lines = [
        f"## {machine['gpu'] or 'CPU'}",
        "",
        f"Command: `{' '.join(record['command'])}`. Machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} "
        f"CPU cores, {machine['threads']} threads, load average {record['load_average_at_start']:.1f} at the start. "
        f"{record['dtype']}, {record['clock']} time, {record['repetitions']} repetitions, seed {record['seed']}, "
        f"Python {machine['python']}, torch {machine['torch']}.",
        "",
        f"Bounds on the ratio of forward and backward: eager {record['bounds']['eager']}, compiled "
        f"{record['bounds']['compiled']}.",
        "",
        *broken,
        "",
        "| rows x width x tokens | layer | kind | forward, ms | ratio | forward and backward, ms | ratio (quartiles) "
        "| peak, MiB | beyond dense, bytes |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["results"]:
        forward, both = row["forward"], row["forward_backward"]
        low, high = both["ratio_quartiles"]
        cells = [
            " x ".join(map(str, row["shape"].values())),
            row["name"],
            row["kind"],
            f"{forward['median_seconds'] * 1e3:.2f}",
            f"{forward['ratio_to_dense']:.3f}",
            f"{both['median_seconds'] * 1e3:.2f}",
            f"{both['ratio_to_dense']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['peak_bytes'] / 2**20:.2f}",
            f"{row['peak_bytes_beyond_dense']:+,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets_table,
    "vision-presets": vision_presets_table,
    "pattention": pattention_tables,
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
        ObjectiveSettings: "[objective](objectives.md)",
    }
    if annotation in words:
        return words[annotation]
    if annotation in SEVERAL_KINDS:
        return SEVERAL_KINDS[annotation]
    return f"[{annotation.__name__}](#{annotation.__name__.lower()})"


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "required" if field.default_factory is None else "-"
    if isinstance(default, BaseModel):
        return f"`{default.kind}`" if hasattr(default, "kind") else "its defaults"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (tuple, list)):
        return f"`[{', '.join(str(getattr(item, 'kind', item)) for item in default)}]`"
    return f"`{default}`" if default != "" else "empty"


def filled(text: str) -> str:
    """`text` of a page with every generated part brought up to date."""
    text = MARKED.sub(lambda match: match[1] + "\n" + TABLES[match["name"]]() + "\n" + match[4], text)
    measured = DEMO_TABLE.search(DEMO_PAGE.read_text(encoding="utf-8")) if DEMO_PAGE.exists() else None
    return DEMO_TABLE.sub(lambda match: measured[0], text) if measured else text


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
