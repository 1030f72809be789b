"""What learned gates (the method `vtrans`) leave of a small Llama on bytes: with and without gates on the residual and
on whole attentions and feed-forward parts, beside other methods; what training the weights with them gives and takes,
on all of the data and on a small part; and where the heads attend that go.

    python benchmarks/vtrans.py --seeds 0

A seed takes some fifteen minutes of one idle core. Writes docs/results/vtrans.md and its numbers; with --page the page
alone, of the numbers that there are.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from excerpt import Excerpt, source_code, spread_rows
from measuring import made_by, made_by_line, write_results
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import auxin
from auxin.accounting.statistics import Estimate
from auxin.analysis import measure
from auxin.analysis.attention_targets import AttentionTargets, Target
from auxin.edits import Plan, SliceParameter
from auxin.objectives.calibration import Calibration
from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, train

LENGTH, BATCH, STEPS, GATE_STEPS, FULL_STEPS = 64, 16, 800, 200, 600
MENDING = 100
"""Training steps that mend what is pruned."""
PART, WEIGHT_RATE = 0.03, 1e-3
SIZES = (0.75, 0.6, 0.5, 0.35)
"""Shares of the parameters that stay."""
ROOT = Path(__file__).resolve().parents[1]
UNMASKED = "heads, units"
"""What goes where the embedding is left as wide as it is."""
STREAMS: dict[str, dict[str, Any]] = {
    UNMASKED: {"streams": ["heads", "ffn"]},
    "heads, units, residual": {"streams": ["heads", "ffn", "hidden"]},
    "heads, units, whole parts": {"streams": ["heads", "ffn"], "sublayers": 0.5},
    "heads, units, residual, whole parts": {"streams": ["heads", "ffn", "hidden"], "sublayers": 0.5},
}
"""What gates are on, by its name in the tables."""
OTHERS: dict[str, dict[str, Any]] = {"taylor": {}, "optin": {"group_size": 4}, "magnitude": {}, "random": {}}
"""Methods beside it, where they can take the same, with their settings."""
WITHOUT_DATA = ("magnitude", "random")
"""Those of them that look at none."""
OF_HEADS: tuple[Target, ...] = ("current", "previous", "first")
"""Where heads may attend."""
COLUMNS = (("seconds", 0), ("loss", 3), ("mended", 3))
"""Of the table of trained weights, with their decimals."""


def texts() -> Excerpt:
    """Bytes of Python's standard library; every tenth context is held out."""
    data = b"".join(data for _, data in islice(source_code(), 60))
    rows = np.frombuffer(data[: len(data) // LENGTH * LENGTH], dtype=np.uint8).reshape(-1, LENGTH).astype(np.int64)
    held_out = np.arange(len(rows)) % 10 == 9
    return Excerpt(rows[~held_out], spread_rows(rows[held_out], 256), 256)


def trained(data: Excerpt, seed: int) -> PreTrainedModel:
    """A Llama of 300,000 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=8, head_dim=16,
        num_key_value_heads=8, max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    learn(model, data, STEPS, 3e-3, seed)
    return model.eval()


def learn(model: PreTrainedModel, data: Excerpt, steps: int, rate: float, seed: int) -> None:
    """Train a model, with a decay at the end."""
    settings = TrainingSettings(
        steps=steps, batch_size=BATCH, learning_rate=rate, warmup_steps=steps // 20, decay_fraction=0.3, seed=seed,
        checkpoint_interval=None, tensorboard=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, folder, progress=False)


def loss(model: PreTrainedModel, rows: np.ndarray) -> float:
    """Held-out loss in nats per byte."""
    ids = torch.from_numpy(rows)
    with torch.no_grad():
        found: float = model(input_ids=ids, labels=ids).loss.item()
    return found


def planned(model: PreTrainedModel, method: str, **asked: Any) -> tuple[Plan, float]:
    """A plan and the processor seconds that it takes, where nothing that it measures is known before."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AUXIN_CACHE"] = cache
        start = time.process_time()
        plan = auxin.plan(model, method, **asked)
        return plan, time.process_time() - start


def changed(plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
    """What a plan leaves of a copy of the model."""
    smaller = copy.deepcopy(model)
    auxin.apply(plan, smaller)
    return smaller


def kept_heads(plan: Plan, layer: int, heads: int) -> list[int]:
    """The heads of a layer that stay."""
    name = f"model.layers.{layer}.self_attn.q_proj.weight"
    edits = (edit for edit in plan.edits if isinstance(edit, SliceParameter) and edit.matches(name) and not edit.axis)
    return next((edit.index for edit in edits), list(range(heads)))


def targets(model: PreTrainedModel, plan: Plan, data: Calibration) -> list[dict[str, Any]]:
    """Where heads attend that go, and those that stay: mean shares."""
    found = measure(AttentionTargets(), model, data, cache=False)
    shares: dict[bool, list[list[float]]] = {True: [], False: []}
    for layer, item in enumerate(found.stacks[0].attentions):
        stays = kept_heads(plan, layer, len(item.heads))
        for number, head in enumerate(item.heads):
            shares[number in stays].append([head.share(name) for name in OF_HEADS])
    return [
        {
            "heads": word,
            "number": len(shares[kept]),
            **dict(zip(OF_HEADS, np.mean(shares[kept], axis=0).tolist(), strict=True)),
        }
        for word, kept in (("go", False), ("stay", True))
    ]


def batches(rows: np.ndarray, steps: int, seed: int) -> list[torch.Tensor]:
    """Batches of eight, drawn from some rows."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.from_numpy(rows)[torch.randint(len(rows), (steps, 8), generator=generator)])


def sizes(
    model: PreTrainedModel, data: Excerpt, samples: Calibration, few: Calibration, folder: str
) -> list[dict[str, Any]]:
    """Losses at some sizes, by what goes and by which method, and what their plans take."""
    found = list[dict[str, Any]]()
    for size in SIZES:
        for words, asked in STREAMS.items():
            values: dict[str, Any] = {"target": {"parameters": size}, "uniform": False, **asked}
            learning: dict[str, Any] = {"data": samples, "folder": folder, "steps": GATE_STEPS}
            methods = {"vtrans": learning}
            if "sublayers" not in asked:
                methods |= {
                    name: settings | ({} if name in WITHOUT_DATA else {"data": few})
                    for name, settings in OTHERS.items()
                }
            if "hidden" in asked["streams"]:
                methods.pop("optin", None)
            for method, settings in methods.items():
                plan, seconds = planned(model, method, **values, **settings)
                smaller = changed(plan, model)
                row = {"asked": size, "from": words, "method": method, "seconds": seconds}
                row |= {"parameters": smaller.num_parameters(), "loss": loss(smaller, data.validation)}
                found.append(row)
                print(row, flush=True)
    return found


def kinds(model: PreTrainedModel, data: Excerpt, folder: str, seed: int) -> list[dict[str, Any]]:
    """What training weights with the gates gives, on some of the data or on all, beside what it takes."""
    part = data.train[:: round(1 / PART)]
    samples = {
        rows: Calibration.of_batches(model, batches(found, steps, seed))
        for rows, found, steps in ((f"{PART:.0%}", part, GATE_STEPS), ("all", data.train, FULL_STEPS))
    }
    few = Calibration.of_batches(model, batches(part, 8, seed))
    learned: dict[str, dict[str, Any]] = {
        "gates alone (Faster-VTrans)": {"data": f"{PART:.0%}", "steps": GATE_STEPS, "rate": None},
        "weights, too (Fast-VTrans)": {"data": f"{PART:.0%}", "steps": GATE_STEPS, "rate": WEIGHT_RATE},
        "weights, too (VTrans)": {"data": "all", "steps": FULL_STEPS, "rate": WEIGHT_RATE},
        "none (`taylor`)": {"data": f"{PART:.0%}", "steps": None, "rate": None},
    }
    found = list[dict[str, Any]]()
    for name, how in learned.items():
        asked: dict[str, Any] = {"target": {"parameters": 0.5}, "uniform": False}
        if how["steps"] is None:
            plan, seconds = planned(model, "taylor", data=few, **asked)
        else:
            asked |= {"steps": how["steps"], "weight_learning_rate": how["rate"], "folder": folder}
            plan, seconds = planned(model, "vtrans", data=samples[how["data"]], **asked)
        smaller = changed(plan, model)
        row = {"trained": name, "data": how["data"], "steps": how["steps"], "seconds": seconds}
        row["loss"] = loss(smaller, data.validation)
        learn(smaller, data, MENDING, 1e-3, seed)
        found.append({**row, "mended": loss(smaller.eval(), data.validation)})
        print(found[-1], flush=True)
    return found


def run(seed: int) -> dict[str, Any]:
    """Everything for one seed."""
    data = texts()
    start = time.process_time()
    model = trained(data, seed)
    found: dict[str, Any] = {"seconds": time.process_time() - start, "parameters": model.num_parameters()}
    samples = Calibration.of_batches(model, batches(data.train, GATE_STEPS, seed))
    few = Calibration.of_batches(model, batches(data.train, 8, seed))
    found["loss"] = loss(model, data.validation)
    with tempfile.TemporaryDirectory() as folder:
        found["sizes"] = sizes(model, data, samples, few, folder)
        found["trained"] = kinds(model, data, folder, seed)
        asked: dict[str, Any] = {"heads": 0.5, "uniform": False, "steps": GATE_STEPS}
        half, _ = planned(model, "vtrans", data=samples, folder=folder, **asked)
        found["heads"] = targets(model, half, few)
    return found


def text(values: Iterable[float], digits: int = 3) -> str:
    """A mean over the seeds, with its interval where there are several."""
    found = Estimate.of(values)
    return found.text(digits) if found else ""


def share_at(found: dict[str, Any], words: str, level: float) -> float | None:
    """The share of the parameters at which gates on `words` come to the loss `level`: between two sizes that were
    measured loss and share are taken to change evenly. None where it is met at none."""
    rows = [row for row in found["sizes"] if row["method"] == "vtrans" and row["from"] == words]
    curve = [(1.0, found["loss"]), *((row["parameters"] / found["parameters"], row["loss"]) for row in rows)]
    for (larger, before), (smaller, after) in pairwise(sorted(curve, reverse=True)):
        if min(before, after) <= level <= max(before, after) and before != after:
            return larger + (smaller - larger) * (level - before) / (after - before)
    return None


def of_rows(every: Sequence[dict[str, Any]], part: str, value: str, **which: Any) -> list[float]:
    """A value of the row of each seed that `which` describes; empty where there is none."""
    return [row[value] for found in every for row in found[part] if all(row[name] == of for name, of in which.items())]


def size_table(every: Sequence[dict[str, Any]], value: str, write: Callable[[list[float]], str]) -> str:
    """One value at all sizes, by what goes and by which method."""
    methods = ["vtrans", *OTHERS]
    rows = [
        [
            f"{size:.0%}",
            words,
            *(write(of_rows(every, "sizes", value, asked=size, method=m, **{"from": words})) for m in methods),
        ]
        for size in SIZES
        for words in STREAMS
    ]
    return "\n".join(markdown_table(["parameters", "from", *(f"`{name}`" for name in methods)], rows, words=2))


def equal_table(every: Sequence[dict[str, Any]]) -> str:
    """How small the model is at the same loss, by what gates are on."""
    rows = []
    for size in SIZES:
        levels = of_rows(every, "sizes", "loss", asked=size, method="vtrans", **{"from": UNMASKED})
        cells = []
        for words in STREAMS:
            shares = [share_at(found, words, level) for found, level in zip(every, levels, strict=True)]
            met = [share for share in shares if share is not None]
            cells.append(f"{statistics.mean(met):.1%}" if len(met) == len(shares) else f"below {min(SIZES):.0%}")
        rows.append([text(levels), *cells])
    return "\n".join(markdown_table(["loss", *STREAMS], rows))


def trained_table(every: Sequence[dict[str, Any]]) -> str:
    """What training the weights with the gates gives, and takes."""
    rows = [
        [kind["trained"], kind["data"], "" if kind["steps"] is None else str(kind["steps"])]
        + [text(of_rows(every, "trained", value, trained=kind["trained"]), digits) for value, digits in COLUMNS]
        for kind in every[0]["trained"]
    ]
    header = ["trained", "of the data", "steps", *(value for value, _ in COLUMNS)]
    return "\n".join(markdown_table(header, rows, words=2))


def heads_table(every: Sequence[dict[str, Any]]) -> str:
    """Where heads attend."""
    rows = [
        [row["heads"], text(of_rows(every, "heads", "number", heads=row["heads"]), 0)]
        + [text(of_rows(every, "heads", name, heads=row["heads"])) for name in OF_HEADS]
        for row in every[0]["heads"]
    ]
    return "\n".join(markdown_table(["heads that", "number", "current token", "previous", "first"], rows))


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    every = list(results["seeds"].values())
    sections = [
        "# Gates that are learned, on one small Llama",
        f"A Llama of {every[0]['parameters']:,} parameters (4 layers of width 64 with 8 heads, its head tied to the "
        f"embedding) learns bytes of the source code of Python's standard library in {STEPS} steps of {BATCH} contexts "
        f"of {LENGTH}. Then parameters go, with no training after it: by gates that learn for {GATE_STEPS} steps "
        "of 8 contexts, or by other methods, which see 64 contexts at most. Layers may differ; of whole attentions and "
        "feed-forward parts at least half stay. Losses are those of contexts that are held out, in nats per byte: "
        "means over the seeds and 95 % intervals (Student's t), where there are several. "
        f"The whole model: {text(found['loss'] for found in every)}.",
        f"{made_by_line(results)} Seeds: {', '.join(results['seeds'])}.",
        "## Loss",
        size_table(every, "loss", text),
        "## Size at the same loss",
        "How many of the parameters are left where gates on other things come to the loss that gates on "
        f"{UNMASKED} come to at each size, which leave the embedding as wide as it is. Gates on the residual mask the "
        "embedding. Between the sizes above, and the whole model, loss and size are taken to change evenly.",
        equal_table(every),
        "## Seconds",
        "Processor time on one thread of making the plan for a size, all that it measures and learns included. "
        f"Training the whole model took {text((found['seconds'] for found in every), 0)} s. `magnitude` and `random` "
        "look at no data: theirs is what finding the size takes.",
        size_table(every, "seconds", lambda values: text(values, 1)),
        "## Weights that are trained with the gates",
        f"Half of the parameters, from heads and units; on {PART:.0%} of the data or on all of it. Mended: after "
        f"{MENDING} training steps more on all of the data.",
        trained_table(every),
        "## Where heads attend that go",
        "Half of the heads of the whole model go by gates on heads alone. Shares of attention in the whole model, the "
        "means over those that go and those that stay.",
        heads_table(every),
    ]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Train, prune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--page", action="store_true", help="write the page anew, of the numbers that there are")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = ROOT / "benchmarks" / "results" / "vtrans.json", ROOT / "docs" / "results" / "vtrans.md"
    if arguments.page:
        results = json.loads(where[0].read_text(encoding="utf-8"))
    else:
        results = made_by(f"python benchmarks/vtrans.py --seeds {' '.join(map(str, arguments.seeds))}")
        results["seeds"] = {str(seed): run(seed) for seed in arguments.seeds}
    write_results(results, where[0], page(results), where[1])
    print(f"Written to {where[1]}")


if __name__ == "__main__":
    main()
