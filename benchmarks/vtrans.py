"""What learned gates (the method `vtrans`) leave of a small Llama on bytes: with and without gates on the residual,
beside other methods; what learning them takes beside training the model; and where the heads attend that go.

    python benchmarks/vtrans.py [--seeds 0]

A seed takes some four minutes of one idle core. Prints tables.
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

LENGTH, BATCH, STEPS, GATE_STEPS = 64, 16, 800, 200
SIZES = (0.75, 0.5)
STREAMS: dict[str, list[str]] = {"heads, units": ["heads", "ffn"], "heads, units, residual": ["heads", "ffn", "hidden"]}


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
    settings = TrainingSettings(
        steps=STEPS, batch_size=BATCH, learning_rate=3e-3, warmup_steps=40, decay_fraction=0.3, seed=seed,
        checkpoint_interval=None, tensorboard=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, folder, progress=False)
    return model.eval()


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


def run(seed: int) -> None:
    """Everything for one seed, printed."""
    data = texts()
    start = time.process_time()
    model = trained(data, seed)
    of_training = time.process_time() - start
    generator = torch.Generator().manual_seed(seed)
    rows = torch.from_numpy(data.train)[torch.randint(len(data.train), (GATE_STEPS, 8), generator=generator)]
    samples = Calibration.of_batches(model, list(rows))
    few = Calibration.of_batches(model, list(rows[:8]))
    dense, table, seconds = loss(model, data.validation), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        learning: dict[str, Any] = {"data": samples, "folder": folder, "steps": GATE_STEPS}
        asked: dict[str, dict[str, Any]] = {"vtrans": learning, "taylor": {"data": few}}
        for size in SIZES:
            for words, streams in STREAMS.items():
                values: dict[str, Any] = {"target": {"parameters": size}, "streams": streams, "uniform": False}
                cells = []
                for name in ("vtrans", "taylor", "magnitude", "random"):
                    plan = auxin.plan(model, name, **values, **asked.get(name, {}))
                    cells.append(f"{after(plan, model, data.validation):.3f}")
                    seconds = plan.cost.seconds if name == "vtrans" and plan.cost else seconds
                table.append([f"{size:.0%}", words, *cells])
        half = auxin.plan(model, "vtrans", heads=0.5, uniform=False, **learning)
        heads = targets(model, half, few)
    print(
        f"\nSeed {seed}. The whole model: {dense:.3f} nats per byte, trained in {of_training:.0f} s of processor time."
    )
    header = ["parameters", "from", "vtrans", "taylor", "magnitude", "random"]
    print("\n".join(markdown_table(header, table)))
    print(f"The last plan of vtrans with gates on the residual took {seconds:.0f} s of wall time.")
    print("\n".join(markdown_table(["heads that", "number", "current", "previous", "first"], heads)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    chosen = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(made_by_line(made_by(f"python benchmarks/vtrans.py --seeds {' '.join(map(str, chosen))}")))
    for one in chosen:
        run(one)
