"""What learned gates (the method `vtrans`) leave of a small Llama on bytes: with and without gates on the residual and
on whole attentions and feed-forward parts, beside other methods; what training the weights with them gives and takes,
on all of the data and on a small part; and where the heads attend that go.

    python benchmarks/vtrans.py [--seeds 0]

A seed takes some eight minutes of one idle core. Prints tables.
"""

import argparse
import copy
import tempfile
import time
from itertools import islice
from typing import Any

import numpy as np
import torch
from excerpt import Excerpt, source_code, spread_rows
from measuring import made_by, made_by_line
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import auxin
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
SIZES = (0.75, 0.5)
STREAMS: dict[str, dict[str, Any]] = {
    "heads, units": {"streams": ["heads", "ffn"]},
    "heads, units, residual": {"streams": ["heads", "ffn", "hidden"]},
    "heads, units, sublayers": {"streams": ["heads", "ffn"], "sublayers": 0.5},
    "heads, units, residual, sublayers": {"streams": ["heads", "ffn", "hidden"], "sublayers": 0.5},
}


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


def after(plan: Plan, model: PreTrainedModel, rows: np.ndarray) -> float:
    """The loss of what a plan leaves."""
    changed = copy.deepcopy(model)
    auxin.apply(plan, changed)
    return loss(changed, rows)


def kept_heads(plan: Plan, layer: int, heads: int) -> list[int]:
    """The heads of a layer that stay."""
    name = f"model.layers.{layer}.self_attn.q_proj.weight"
    edits = (edit for edit in plan.edits if isinstance(edit, SliceParameter) and edit.matches(name) and not edit.axis)
    return next((edit.index for edit in edits), list(range(heads)))


def targets(model: PreTrainedModel, plan: Plan, data: Calibration) -> list[list[str]]:
    """Where heads attend that go, and those that stay: mean shares."""
    found = measure(AttentionTargets(), model, data, cache=False)
    shares: dict[bool, list[list[float]]] = {True: [], False: []}
    names: tuple[Target, ...] = ("current", "previous", "first")
    for layer, item in enumerate(found.stacks[0].attentions):
        stays = kept_heads(plan, layer, len(item.heads))
        for number, head in enumerate(item.heads):
            shares[number in stays].append([head.share(name) for name in names])
    return [
        [word, str(len(shares[kept])), *(f"{value:.3f}" for value in np.mean(shares[kept], axis=0))]
        for word, kept in (("go", False), ("stay", True))
    ]


def batches(rows: np.ndarray, steps: int, seed: int) -> list[torch.Tensor]:
    """Batches of eight, drawn from some rows."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.from_numpy(rows)[torch.randint(len(rows), (steps, 8), generator=generator)])


def sizes(
    model: PreTrainedModel, data: Excerpt, samples: Calibration, few: Calibration, folder: str
) -> list[list[str]]:
    """Losses at some sizes, by what goes and by which method."""
    learning: dict[str, Any] = {"data": samples, "folder": folder, "steps": GATE_STEPS}
    table = []
    for size in SIZES:
        for words, asked in STREAMS.items():
            values: dict[str, Any] = {"target": {"parameters": size}, "uniform": False}
            plans = [auxin.plan(model, "vtrans", **values, **asked, **learning)]
            if "sublayers" not in asked:
                plans.append(auxin.plan(model, "taylor", **values, **asked, data=few))
                plans += [auxin.plan(model, name, **values, **asked) for name in ("magnitude", "random")]
            cells = [f"{after(plan, model, data.validation):.3f}" for plan in plans]
            table.append([f"{size:.0%}", words, *cells, *[""] * (4 - len(cells))])
    return table


def kinds(model: PreTrainedModel, data: Excerpt, folder: str, seed: int) -> list[list[str]]:
    """What training weights with the gates gives, on some of the data or on all, beside what it takes."""
    part = data.train[:: round(1 / PART)]
    asked: dict[str, Any] = {"target": {"parameters": 0.5}, "uniform": False}
    samples = {
        rows: Calibration.of_batches(model, batches(found, steps, seed))
        for rows, found, steps in ((f"{PART:.0%}", part, GATE_STEPS), ("all", data.train, FULL_STEPS))
    }
    table = []
    for name, share, steps, rate in (
        ("gates alone (Faster)", f"{PART:.0%}", GATE_STEPS, None),
        ("weights, too (Fast)", f"{PART:.0%}", GATE_STEPS, WEIGHT_RATE),
        ("weights, too (VTrans)", "all", FULL_STEPS, WEIGHT_RATE),
    ):
        start = time.process_time()
        values: dict[str, Any] = {"steps": steps, "weight_learning_rate": rate, "folder": folder}
        plan = auxin.plan(model, "vtrans", data=samples[share], **asked, **values)
        seconds = time.process_time() - start
        table.append([name, share, str(steps), f"{seconds:.0f} s", *mended(plan, model, data, seed)])
    few = Calibration.of_batches(model, batches(part, 8, seed))
    start = time.process_time()
    plan = auxin.plan(model, "taylor", **asked, data=few)
    seconds = time.process_time() - start
    return [*table, ["taylor", f"{PART:.0%}", "", f"{seconds:.0f} s", *mended(plan, model, data, seed)]]


def mended(plan: Plan, model: PreTrainedModel, data: Excerpt, seed: int) -> list[str]:
    """The loss of what a plan leaves, at once and after some training."""
    changed = copy.deepcopy(model)
    auxin.apply(plan, changed)
    at_once = loss(changed, data.validation)
    learn(changed, data, MENDING, 1e-3, seed)
    return [f"{at_once:.3f}", f"{loss(changed.eval(), data.validation):.3f}"]


def run(seed: int) -> None:
    """Everything for one seed, printed."""
    data = texts()
    start = time.process_time()
    model = trained(data, seed)
    of_training = time.process_time() - start
    samples = Calibration.of_batches(model, batches(data.train, GATE_STEPS, seed))
    few = Calibration.of_batches(model, batches(data.train, 8, seed))
    dense = loss(model, data.validation)
    print(
        f"\nSeed {seed}. The whole model: {dense:.3f} nats per byte, trained in {of_training:.0f} s of processor time.",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        table = sizes(model, data, samples, few, folder)
        header = ["parameters", "from", "vtrans", "taylor", "magnitude", "random"]
        print("\n".join(markdown_table(header, table)), flush=True)
        table = kinds(model, data, folder, seed)
        header = ["trained", "of the data", "steps", "processor time", "loss", f"after {MENDING} steps"]
        print("\n".join(markdown_table(header, table)), flush=True)
        half = auxin.plan(model, "vtrans", heads=0.5, uniform=False, data=samples, folder=folder, steps=GATE_STEPS)
        heads = targets(model, half, few)
    print("\n".join(markdown_table(["heads that", "number", "current", "previous", "first"], heads)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    chosen = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(made_by_line(made_by(f"python benchmarks/vtrans.py --seeds {' '.join(map(str, chosen))}")))
    for one in chosen:
        run(one)
