"""The rows of the benchmark that prunes SmolLM2, its page and its picture."""

import random
import re
import statistics
from dataclasses import dataclass, field
from typing import Any

from drawing import COLOURS
from local_tasks import CHOICES
from measuring import made_by_line
from pruning_pictures import removals_svg

from auxin.accounting.results import perplexity_of
from auxin.report.markdown import markdown_table
from auxin.report.svg import GREY, document, text

KINDS = ("english", "python")
LAYERS = 30
WHOLE = "layer"
"""What stands for both kinds where a layer goes."""
PATH = re.compile(r"model\.layers\.(\d+)(?:\.(self_attn|mlp))?\b")
JS = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp) \(js ([\d.e-]+)\)")
CURVE = "finercut-20"
"""The longest search whose distances are drawn."""
KIND_COLOURS = {"self_attn": COLOURS[0], "mlp": COLOURS[2]}
PARTS = 16
"""How many of the 60 attentions and feed-forward parts go where parts are counted: as many as eight layers have."""


@dataclass(frozen=True)
class Trial:
    """Lengths, the same for every row."""

    samples: int = 4
    """Contexts that methods look at, half of them of each kind."""
    length: int = 128
    """Tokens of each of them."""
    windows: int = 8
    """Held-out windows of each kind, spread evenly over the held-out text."""
    window: int = 256
    """Tokens of a held-out window."""
    questions: int = 80
    """Of each task."""
    seed: int = 0
    """What draws the questions."""


QUICK = Trial(samples=2, length=16, windows=1, window=32, questions=12)


@dataclass(frozen=True)
class Row:
    """A method with its settings; without a method nothing goes, and `random` parts do where it is their number."""

    title: str
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    """Of parts that chance draws."""
    times: int = 1
    """As many times the contexts that the others look at; 0: none."""


ROWS = {
    "whole": Row("the whole model"),
    "finercut": Row("FinerCut", "finercut", {"removed": PARTS}),
    "finercut-at-once": Row("FinerCut, all at once", "finercut", {"removed": PARTS, "one_shot": True}),
    "finercut-layers": Row("FinerCut, 8 whole layers", "finercut", {"removed": PARTS // 2, "candidates": "layers"}),
    "shortgpt": Row("ShortGPT, 8 layers", "shortgpt", {"removed": PARTS // 2}),
    "random-0": Row("chance, draw 0", seed=0),
    "random-1": Row("chance, draw 1", seed=1),
    "random-2": Row("chance, draw 2", seed=2),
    "finercut-attention-8": Row("FinerCut, 8 attentions", "finercut", {"removed": 8, "candidates": "attention"}),
    "finercut-attention-16": Row("FinerCut, 16 attentions", "finercut", {"removed": PARTS, "candidates": "attention"}),
    **{
        f"{method}-{size}": Row(title, method, {"target": {"parameters": (100 - size) / 100}})
        for size in (10, 20)
        for method, title in {
            "finercut": "FinerCut",
            "shortgpt": "ShortGPT",
            "wanda-structured": "Wanda, heads and units",
            "taylor": "Taylor, heads and units",
        }.items()
    },
    **{
        f"fluctuation-{size}": Row(
            "FLAP, heads and units", "fluctuation", {"target": {"parameters": (100 - size) / 100}, "uniform": False}
        )
        for size in (10, 20)
    },
    **{
        f"products-{size}": Row(
            "Greenformers, 16 times as many samples",
            "greenformers",
            {"target": {"parameters": (100 - size) / 100}},
            times=16,
        )
        for size in (10, 20)
    },
    "products-by-weights-20": Row(
        "Greenformers, by weights", "greenformers", {"target": {"parameters": 0.8}, "solver": "svd"}, times=0
    ),
    "embedding-10": Row(
        "the embedding as a product, 128 times as many samples",
        "factorised-embedding",
        {"target": {"parameters": 0.9}},
        times=128,
    ),
    "embedding-alike-10": Row(
        "the same, all tokens alike",
        "factorised-embedding",
        {"target": {"parameters": 0.9}, "frequencies": False},
        times=0,
    ),
}
SECTIONS = {
    "As many parts": [name for name in ROWS if "target" not in ROWS[name].settings],
    **{
        f"{size} % of the parameters": ["whole", *(name for name in ROWS if name.endswith(f"-{size}"))]
        for size in (10, 20)
    },
}


def accuracy(row: dict[str, Any], task: str) -> float:
    """Share of a task's questions that are answered rightly."""
    return statistics.mean(row["right"][task])


def retained(row: dict[str, Any], whole: dict[str, Any]) -> float:
    """The mean over the tasks of a model's accuracy as a share of the whole model's."""
    return statistics.mean(accuracy(row, task) / accuracy(whole, task) for task in whole["right"])


def retained_interval(row: dict[str, Any], whole: dict[str, Any], draws: int = 1000) -> tuple[float, float]:
    """95 % of what other questions might have given: both models' answers to questions drawn anew, with replacement."""
    generator = random.Random(0)
    found = []
    for _ in range(draws):
        picked = {task: generator.choices(range(len(right)), k=len(right)) for task, right in whole["right"].items()}
        one, other = (
            {task: [model["right"][task][number] for number in numbers] for task, numbers in picked.items()}
            for model in (row, whole)
        )
        found.append(retained({"right": one}, {"right": other}))
    found.sort()
    return found[round(0.025 * draws)], found[round(0.975 * draws) - 1]


def table(rows: dict[str, dict[str, Any]], names: list[str]) -> list[str]:
    """A table of rows, the best answers first."""
    whole = rows["whole"]
    tasks = list(whole["right"])
    there = sorted((name for name in names if name in rows), key=lambda name: -retained(rows[name], whole))
    header = ["what goes", "parameters", *KINDS, *tasks, "retained", "reading", "a token", "peak MB"]
    lines = []
    for name in there:
        row = rows[name]
        low, high = retained_interval(row, whole)
        spans = "" if name == "whole" else f" ({low:.0%} to {high:.0%})"
        lines.append(
            [
                ROWS[name].title,
                f"{row['parameters'] / 1e6:.1f}M",
                *(f"{perplexity_of(row['loss'][kind]):.4g}" for kind in KINDS),
                *(f"{accuracy(row, task):.0%}" for task in tasks),
                f"{retained(row, whole):.0%}{spans}",
                *(f"{row[f'{what}_seconds'] / whole[f'{what}_seconds']:.2f}" for what in ("reading", "writing")),
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
        )
    return markdown_table(header, lines)


def gone(row: dict[str, Any]) -> list[tuple[int, str]]:
    """The layers and kinds of the parts that went, in their order, as the plan's finding has them."""
    said = next((one for one in row["findings"] if one.startswith("Removed, in this order: ")), "")
    paths = PATH.findall(said)
    return [(int(layer), kind or WHOLE) for layer, kind in paths]


def picture(rows: dict[str, dict[str, Any]]) -> str:
    """Which parts went: for each search a square for every attention and, below it, for every feed-forward part, the
    first layer at the left; filled where it went."""
    left, cell, height, top = 200, 18, 44, 84
    names = [name for name in ROWS if name in rows and gone(rows[name])]
    right = left + LAYERS * cell
    body = [
        text(16, 28, "Which parts of SmolLM2-135M-Instruct went", size=16, weight=600),
        text(16, 50, "● attention", size=12, colour=KIND_COLOURS["self_attn"]),
        text(110, 50, "● feed-forward part", size=12, colour=KIND_COLOURS["mlp"]),
        text(left, top - 10, "first layer", size=11),
        text(right, top - 10, "last layer", size=11, anchor="end"),
    ]
    for number, name in enumerate(names):
        y = top + number * height
        body.append(text(left - 10, y + 16, f"{ROWS[name].title}{size_of(name)}", size=12, anchor="end"))
        taken = set(gone(rows[name]))
        for layer in range(LAYERS):
            for line, (kind, colour) in enumerate(KIND_COLOURS.items()):
                went = (layer, kind) in taken or (layer, WHOLE) in taken
                shape = f'x="{left + layer * cell}" y="{y + 14 * line}" width="{cell - 3}" height="11" rx="2"'
                filled = f'fill="{colour}"' if went else f'fill="none" stroke="{GREY}" stroke-opacity="0.5"'
                body.append(f"<rect {shape} {filled}/>")
    return document("Which parts went", right + 16, top + len(names) * height, body)


def curve(rows: dict[str, dict[str, Any]]) -> str:
    """The distance from the whole model over the parts that FinerCut's search took, as the plan's finding has it."""
    letters = {"self_attn": "A", "mlp": "F"}
    said = next(one for one in rows[CURVE]["findings"] if one.startswith("Removed, in this order: "))
    found = [(f"{letters[kind]} {layer}", float(value)) for layer, kind, value in JS.findall(said)]
    note = (
        "Jensen-Shannon divergence of the output from the whole model's, in nats, over the number of parts that are "
        "gone; below, the last one: attention (A) or feed-forward part (F) of a layer."
    )
    return removals_svg("What FinerCut's removals do to SmolLM2-135M-Instruct, one after the other", note, found)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows, trial = results["rows"], results["trial"]
    lines = [
        "# Pruning SmolLM2-135M-Instruct, without training",
        "",
        f"Methods looked at {trial['samples']} contexts of {trial['length']} tokens, half English, half Python. "
        "Nothing was trained.",
        "",
        f"- Perplexity: {trial['windows']} held-out windows of {trial['window']} tokens of each kind.",
        f"- Tasks ([what they ask](../../benchmarks/local_tasks.py)): share of {trial['questions']} questions each "
        f"that is answered rightly; a guess is right in {1 / CHOICES:.0%}. Retained: the mean over the tasks of that "
        "share against the whole model's, with 95 % over questions (bootstrap).",
        f"- Reading {trial['window']} tokens, and writing one behind them: processor time on one thread, against the "
        "whole model's. Peak: memory beyond the weights while they are read.",
        "",
        made_by_line(results),
    ]
    for heading, names in SECTIONS.items():
        if "whole" in rows and len([name for name in names if name in rows]) > 1:
            lines += ["", f"## {heading}", "", *table(rows, names)]
    found = {name: rows[name] for name in rows if name in ROWS}
    if any(gone(row) for row in found.values()):
        lines += ["", "## Which parts went", "", "![Which parts each search took](../images/smollm2_pruning.svg)", ""]
        if CURVE in found:
            lines += ["![The distance over the number of parts gone](../images/smollm2_pruning_curve.svg)", ""]
        for name, row in found.items():
            if taken := gone(row):
                kinds = {"self_attn": "attention", "mlp": "feed-forward"}
                order = ", ".join(f"{kinds.get(kind, kind)} {layer}" for layer, kind in taken)
                lines.append(f"- {ROWS[name].title}{size_of(name)}: {order}.")
    return "\n".join(lines) + "\n"


def size_of(name: str) -> str:
    """What a row that goes by size adds to its title."""
    return f", {name.rpartition('-')[2]} %" if "target" in ROWS[name].settings else ""
