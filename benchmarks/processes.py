"""Several processes that train a model together beside one: how far apart losses, weights and moments are, and what a
process holds.

A TokenFormer, a GPT-2 and a Llama, the latter with tied heads, learn bytes of Python's standard library, in single and,
but for the Llama, in double precision. GPT-2's loss is then in double precision, too. transformers computes losses, and
the norms and the rotation of a Llama, in single precision always.

    python benchmarks/processes.py
    python benchmarks/processes.py --quick

Each training is started by torchrun, as a user's is. Some ten minutes of two cores; finished ones are not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from excerpt import Excerpt, source_code, spread_rows
from measuring import made_by, made_by_line, publish
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from auxin.files import write_text
from auxin.models import TokenFormerConfig, TokenFormerForCausalLM
from auxin.models.tokenformer import PUBLISHED
from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, latest_checkpoint, train
from auxin.training.metrics import metrics_in
from auxin.training.optimizer import build_optimizer
from auxin.training.ranks import joined
from auxin.training.strategies import Sharded

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "processes.json"
PAGE = ROOT / "docs" / "results" / "processes.md"
LENGTH, BATCH, PART, STEPS, QUICK = 64, 16, 4, 50, 4
MODELS = {"TokenFormer": ("float64", "float32"), "GPT-2": ("float64", "float32"), "Llama": ("float32",)}
"""In what precision each is trained."""
NORMS = "TokenFormer with norms"
"""Of scores, as the paper's."""
TOGETHER = [(size, strategy) for size in (2, 3, 4) for strategy in ("replicated", "sharded")]
APART = ("model", "type", "processes", "strategy", "loss", "held-out", "weights", "moments")
Row = dict[str, Any]


def model_of(name: str) -> PreTrainedModel:
    """The untrained model, always the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    if name == "Llama":
        config = LlamaConfig(
            **sizes,
            intermediate_size=344,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)
    if name == "GPT-2":
        none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
        return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=LENGTH, **none))
    tokens = {"qkv_tokens": 64, "proj_tokens": 64, "ffn_tokens": 256, **(PUBLISHED if name == NORMS else {})}
    return TokenFormerForCausalLM(TokenFormerConfig(**sizes, **tokens, max_position_embeddings=LENGTH))


def loss(logits: torch.Tensor, labels: torch.Tensor, **unused: object) -> torch.Tensor:
    """A language model's, in the model's own precision."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def text() -> Excerpt:
    """Contexts of bytes."""
    data = b"".join(content for _, content in islice(source_code(), 40))
    rows = np.frombuffer(data[: len(data) // LENGTH * LENGTH], dtype=np.uint8).reshape(-1, LENGTH).astype(np.int64)
    held_out = np.arange(len(rows)) % 10 == 9
    return Excerpt(rows[~held_out], spread_rows(rows[held_out], 32), 256)


def held_here(model: PreTrainedModel) -> int:
    """Bytes of the parameters, gradients and moments that this process holds after a step of training in pieces."""
    with joined() as ranks:
        Sharded(ranks).place(model)
        settings = TrainingSettings(steps=1)
        optimizer = build_optimizer(model, settings)
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        parameters = list(model.parameters())
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return sum(bytes_of(tensor) for tensor in [*parameters, *(p.grad for p in parameters), *moments])


def bytes_of(tensor: torch.Tensor) -> int:
    """Of what of it lies here."""
    here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return here.numel() * here.element_size()


def take_part(arguments: argparse.Namespace) -> None:
    """What a process of torchrun does."""
    model = model_of(arguments.model).to(getattr(torch, arguments.type))
    if arguments.type == "float64" and arguments.model == "GPT-2":
        model.loss_function = loss
    if arguments.strategy == "held":
        size = held_here(model)
        (arguments.folder / f"{os.getpid()}.json").write_text(json.dumps(size))
        return
    settings = TrainingSettings(
        steps=arguments.steps, batch_size=BATCH, micro_batch_size=PART, learning_rate=3e-3, warmup_steps=2,
        log_interval=1, tensorboard=False, strategy=arguments.strategy,
    )  # fmt: skip
    with joined() as ranks:
        train(model, text(), settings, arguments.folder, ranks=ranks, progress=False)


def started(folder: Path, size: int, strategy: str, model: str, type: str, steps: int) -> Path:
    """Run so many processes, and return the folder."""
    folder.mkdir(parents=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
    options = ["--folder", folder, "--strategy", strategy, "--model", model, "--type", type, "--steps", steps]
    subprocess.run([sys.executable, "-W", "ignore", *launch, *map(str, options)], check=True)
    return folder


def apart(one: Path, other: Path) -> dict[str, float]:
    """How far two trainings are apart at most: training losses, held-out losses, weights, moments."""
    lines = [metrics_in(folder) for folder in (one, other)]
    found = {
        name: max(abs(a[name] - b[name]) for a, b in zip(*lines, strict=True) if name in a)
        for name in ("loss", "validation_loss")
    }
    for name, file in (("weights", "model.safetensors"), ("moments", "training/state.safetensors")):
        a, b = (load_file(Path(latest_checkpoint(folder) or "") / file) for folder in (one, other))
        found[name] = max(float((a[key] - b[key]).abs().max()) for key in a if a[key].is_floating_point())
    return found


def measured(work: Path, steps: int, cells: Path) -> dict[str, list[Row]]:
    """All trainings, beside that of one process; what `cells` has is not measured again."""
    rows: list[Row] = json.loads(cells.read_text(encoding="utf-8")) if cells.exists() else []
    known = {(row["model"], row["type"], row["processes"], row["strategy"]) for row in rows}
    held = []
    for model, types in MODELS.items():
        for type in types:
            missing = [one for one in TOGETHER if (model, type, *one) not in known]
            if missing:
                alone = started(work / f"{model}-{type}-1", 1, "replicated", model, type, steps)
            for size, strategy in missing:
                folder = started(work / f"{model}-{type}-{size}-{strategy}", size, strategy, model, type, steps)
                row = {"model": model, "type": type, "processes": size, "strategy": strategy, **apart(alone, folder)}
                print(row, flush=True)
                rows.append(row)
                write_text(cells, json.dumps(rows))
        whole = 4 * sum(bytes_of(parameter) for parameter in model_of(model).parameters())
        for size in (2, 3, 4):
            folder = started(work / f"{model}-{size}-held", size, "held", model, "float32", steps)
            found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
            held.append({"model": model, "processes": size, "whole": whole, "largest": max(found), "sum": sum(found)})
    return {"apart": rows, "held": held}


def page_of(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = ("loss", "validation_loss", "weights", "moments")
    apart_rows = [
        [
            *(row["model"], row["type"], str(row["processes"]), row["strategy"]),
            *(f"{row[name]:.1e}" for name in names),
        ]
        for row in results["apart"]
    ]
    held_rows = [
        [
            *(row["model"], str(row["processes"]), f"{row['whole']:,}", f"{row['largest']:,}"),
            f"{row['largest'] * row['processes'] / row['whole']:.3f}",
        ]
        for row in results["held"]
    ]
    return "\n".join([
        "# Several processes beside one",
        "",
        f"{STEPS} steps of {BATCH} contexts of {LENGTH} bytes in micro-batches of {PART}, by torchrun and gloo on one "
        "machine, against one process: the largest difference of a step's training loss, of a held-out loss, and at "
        "the end of a weight and of a moment of the optimizer. In double precision GPT-2's loss is, too, where "
        "transformers would compute it in single precision; a Llama's norms and rotation are in single precision in "
        "any case, so that it is not among those in double. GPT-2 makes 100,000 times as much of rounding in these "
        "steps, at this rate and with two steps of warm-up: in double precision as in single.",
        "",
        made_by_line(results),
        "",
        *markdown_table(APART, apart_rows),
        "",
        "## What a process holds",
        "",
        "Bytes of parameters, gradients and moments after a step, in pieces, in single precision: of the process that "
        "holds most. Pieces are whole rows.",
        "",
        *markdown_table(("model", "processes", "of one process", "in pieces", "times an even share"), held_rows),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure, or take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "processes", help="keeps what is measured")
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    for name in ("strategy", "model", "type"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.folder is not None:
        take_part(arguments)
        sys.stdout.flush()
        os._exit(0)  # as the command line does
    cells = arguments.runs / ("quick.json" if arguments.quick else "cells.json")
    cells.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        found = measured(Path(work), QUICK if arguments.quick else STEPS, cells)
    results = {**made_by("python benchmarks/processes.py"), **found}
    publish(results, RESULTS, page_of(results), PAGE, arguments.quick)


if __name__ == "__main__":
    main()
