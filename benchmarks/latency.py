"""What a table of parts tells of a model's latency, held against the latency of the model as a whole.

Small decoders of several widths, built in code, with weights of no meaning; several removals of each. The table is made
before, of the whole model's parts alone; then the model and the smaller one are run as wholes, in turns. Both times are
CPU time where one thread is used, so that a busy machine matters little, and medians. Seed 0 draws what goes.

    python benchmarks/latency.py [--quick]

The whole takes some ten minutes on two idle cores. Results: benchmarks/results/latency.json, docs/results/latency.md
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import asked_quick, made_by, made_by_line, publish
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import auxin
from auxin.models.loading import skeleton
from auxin.planning.removed_sublayers import without_layers, without_sublayers
from auxin.planning.target import Removal, Target, removal
from auxin.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "latency.json"
PAGE = ROOT / "docs" / "results" / "latency.md"
PHASES = {"forward": 128, "decoding": 256}
"""Tokens, by phase."""


def llama(width: int, layers: int) -> PreTrainedModel:
    """A skeleton with two query heads to each key-value head."""
    heads = width // 32
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    config = LlamaConfig(
        vocab_size=8000, num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=32, **sizes
    )
    return skeleton(config, LlamaForCausalLM)


def gpt2(width: int, layers: int) -> PreTrainedModel:
    """A skeleton whose heads go with the residual."""
    config = GPT2Config(vocab_size=8000, n_positions=512, n_embd=width, n_layer=layers, n_head=width // 64)
    return skeleton(config, GPT2LMHeadModel)


MODELS = {
    "Llama, width 128, 8 layers": lambda: llama(128, 8),
    "Llama, width 256, 8 layers": lambda: llama(256, 8),
    "Llama, width 512, 8 layers": lambda: llama(512, 8),
    "GPT-2, width 256, 8 layers": lambda: gpt2(256, 8),
}


def removals(model: PreTrainedModel) -> dict[str, Removal]:
    """What is taken away, by what is said of it."""
    if isinstance(model, GPT2LMHeadModel):
        stack, attention = "transformer.h", "attn"
        settings: dict[str, dict[str, Any]] = {
            "half of the units": {"ffn": 0.5},
            "a third of the units": {"ffn": 0.34},
            "half of heads and residual": {"heads": 0.5, "hidden": 0.5},
        }
    else:
        stack, attention = "model.layers", "self_attn"
        settings = {
            "half of the units": {"ffn": 0.5},
            "half of the heads": {"heads": 0.5, "uniform": False},
            "heads and units, other ones in each layer": {"heads": 0.6, "ffn": 0.57, "uniform": False},
            "half of the residual": {"hidden": 0.5},
            "heads, units and residual": {"heads": 0.5, "ffn": 0.5, "hidden": 0.75, "uniform": False},
        }
    found = {name: auxin.plan(model, "random", **values).edits for name, values in settings.items()}
    found["half of the layers"] = without_layers(model, [f"{stack}.{number}" for number in range(0, 8, 2)])
    gone = [f"{stack}.{number}.{attention}" for number in range(1, 8, 2)]
    found["every other attention"] = without_sublayers(model, gone)
    return {name: removal(model, edits) for name, edits in found.items()}


def rows_of(name: str, model: PreTrainedModel, removed: dict[str, Removal], phase: str) -> list[dict[str, Any]]:
    """What was told and measured of one model."""
    table = Target.parse({"latency": 0.5, "phase": phase, "sequence_length": PHASES[phase], "device": "cpu"}).table(
        model
    )
    rows = []
    for what, done in removed.items():
        told = table.predicted(done.after, done.modules)
        measured = table.measured(done.after)
        assert measured is not None
        rows.append(
            {
                "model": name,
                "phase": phase,
                "removed": what,
                "predicted": [table.whole, told],
                "measured": list(measured),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def errors(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """How far off the table was: of the times, as a share of them, and of the share that is left, in points."""
    return {
        "before": [100 * (row["predicted"][0] / row["measured"][0] - 1) for row in rows],
        "after": [100 * (row["predicted"][1] / row["measured"][1] - 1) for row in rows],
        "share": [100 * (share(row["predicted"]) - share(row["measured"])) for row in rows],
    }


def share(times: list[float]) -> float:
    """What is left."""
    return times[1] / times[0]


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["rows"]
    table = markdown_table(
        ["model", "phase", "removed", "told, ms", "measured, ms", "left as told", "left as measured", "off, points"],
        [
            [
                row["model"],
                row["phase"],
                row["removed"],
                *(f"{row[kind][0]:.3g} -> {row[kind][1]:.3g}" for kind in ("predicted", "measured")),
                *(f"{share(row[kind]):.1%}" for kind in ("predicted", "measured")),
                f"{100 * (share(row['predicted']) - share(row['measured'])):+.1f}",
            ]
            for row in rows
        ],
        words=3,
    )
    found = {phase: errors([row for row in rows if row["phase"] == phase]) for phase in PHASES}
    of_errors = markdown_table(
        ["phase", "time before", "time after", "what is left"],
        [
            [phase, off(of["before"], "%"), off(of["after"], "%"), off(of["share"], " points")]
            for phase, of in found.items()
        ],
    )
    lines = [
        "# Latency as a table of parts tells it, and as it is",
        "",
        "What [a target of latency](../pruning.md#a-latency) goes by: the parts of a model are timed once, the latency",
        "of what is left is told from them, and both models are then run as wholes, in turns. Float32, one thread, a",
        f"batch of 1; forward passes over {PHASES['forward']} tokens, decoding after {PHASES['decoding']}.",
        "",
        f"Others used the machine: {results['load']:.0f} processes were ready to run on its {results['cores']} cores",
        "when it ended. CPU time leaves out what they took, but not that they emptied the caches.",
        "",
        "How far the table was off, the median of the sizes of the errors and the largest:",
        "",
        *of_errors,
        "",
        *table,
        "",
        made_by_line(results),
    ]
    return "\n".join(lines) + "\n"


def off(values: list[float], unit: str) -> str:
    """The median of the sizes and the largest."""
    sizes = [abs(value) for value in values]
    return f"{statistics.median(sizes):.1f}{unit} (at most {max(sizes):.1f})"


def main() -> None:
    """Measure and publish."""
    quick = asked_quick(__doc__)
    torch.set_num_threads(1)
    models = dict(list(MODELS.items())[:1]) if quick else MODELS
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUXIN_CACHE"] = folder
        rows = []
        for name, make in models.items():
            model = make()
            removed = removals(model)
            rows += [row for phase in PHASES for row in rows_of(name, model, removed, phase)]
    results = {
        **made_by("python benchmarks/latency.py"),
        "rows": rows,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[1],
        "cores": os.cpu_count(),
    }
    publish(results, RESULTS, page(results), PAGE, quick)


if __name__ == "__main__":
    main()
