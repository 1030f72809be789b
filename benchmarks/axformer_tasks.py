"""Three small tasks of telling texts apart, of what is inside packages: texts by class, and as data to train on.

`axformer_answers` has one of finding answers in them.
"""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from auxin.data import SampleForm
from auxin.data.labelled_text import LabelledRows
from auxin.data.padded_text import PaddedRows
from auxin.objectives.classification import Classification

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
TOPICS = {
    4: "act", 5: "animal", 6: "artifact", 9: "cognition", 10: "communication", 13: "food", 18: "person", 20: "plant"
}  # fmt: skip
"""Lexicographer files of nouns, by their numbers."""
WORDS = 45
"""That a mail has to have, so that most are longer than what is read of them."""


@dataclass(frozen=True)
class Task:
    """What is to be told of a text."""

    name: str
    told: str
    """What the texts and the classes are, for a person."""
    texts: Sequence[Sequence[str]]
    """The different texts of each class, in the files' order."""
    length: int
    """Tokens of a text, longer ones cut off."""
    objective: ClassVar[Classification] = Classification()

    def rows(self, tokenizer: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and facts of so many texts."""
        return encoded(tokenizer, drawn(self.texts, count, seed), self.length)

    def data(self, rows: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray], tokenizer: Any) -> "Texts":
        """Texts to learn from, and others for the lines of metrics."""
        return Texts(rows, held, tokenizer.pad_token_id, len(tokenizer), len(self.texts))

    def pretrained(self, home: Path) -> PreTrainedModel:
        """The model of a folder with a new head."""
        return AutoModelForSequenceClassification.from_pretrained(home, num_labels=len(self.texts), dtype=torch.float32)

    def judged(self, model: PreTrainedModel, data: "Texts") -> dict[str, float]:
        """Loss and accuracy on what is to be learnt of data."""
        return judged(model, data.split("train"))


def tasks(wordnet: Path, mails: Path) -> list[Task]:
    """All three.

    Args:
        wordnet: the folder with data.noun, data.verb, data.adj and data.adv.
        mails: the folder with those of mails (spam-1, easy-ham-1, ...).
    """
    speech = [glosses(wordnet / f"data.{name}") for name in PARTS_OF_SPEECH]
    topics = glosses(wordnet / "data.noun", {f"{number:02d}": name for number, name in TOPICS.items()})
    return [
        Task("part of speech", "glosses of WordNet, 4 parts of speech", [list(of["all"]) for of in speech], 20),
        Task(
            "topic",
            f"glosses of nouns, {len(TOPICS)} lexicographer files",
            [topics[name] for name in TOPICS.values()],
            20,
        ),
        Task("spam", "e-mails of SpamAssassin without headers and tags, spam or not", letters(mails), 40),
    ]


def glosses(file: Path, files: dict[str, str] | None = None) -> dict[str, list[str]]:
    """The different glosses, up to the first semicolon, by lexicographer file; None: all of them as "all"."""
    found: dict[str, dict[str, None]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name = "all" if files is None else files.get(line[9:11])
        text = line.partition(" | ")[2].partition(";")[0].strip()
        if not line.startswith("  ") and name and text:
            found.setdefault(name, {})[text] = None
    return {name: list(texts) for name, texts in found.items()}


def letters(folder: Path) -> list[list[str]]:
    """The different bodies of mails that are no spam, and of such as are; short ones are left out."""
    found: list[dict[str, None]] = [{}, {}]
    for file in sorted(folder.glob("*/*.json")):
        body = json.loads(file.read_text(encoding="utf-8"))["text"].partition("\n\n")[2]
        text = " ".join(html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", " ", body)).split())
        if len(re.findall(r"\b[a-z]+\b", text)) >= WORDS:
            found["spam" in file.parent.name][text[:1000]] = None
    return [list(texts) for texts in found]


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


def judged(model: PreTrainedModel, rows: LabelledRows) -> dict[str, float]:
    """Loss and accuracy on texts."""
    losses, right = [], 0
    with torch.inference_mode():
        for start in range(0, len(rows), 80):
            batch = rows.rows(range(start, min(start + 80, len(rows))))
            output = model(**batch)
            losses.append(output.loss.item() * len(batch["labels"]))
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": sum(losses) / len(rows), "accuracy": 100 * right / len(rows)}


class InMemory:
    """Samples in memory as training wants its data; see `auxin.data.Dataset`.

    Args:
        form: of the samples.
        rows: what is learnt.
        held: for the lines of metrics.
    """

    bytes_per_unit = None
    fingerprint = "texts"

    def __init__(self, form: SampleForm, rows: PaddedRows, held: PaddedRows) -> None:
        self.form, self._splits = form, {"train": rows, "validation": held}

    def split(self, name: str) -> PaddedRows:
        """One side."""
        return self._splits[name]

    def processor(self) -> None:
        """None: the tokenizer is the package's."""

    def describe(self) -> dict[str, str]:
        """Nothing that a report would want."""
        return {}


class Texts(InMemory):
    """Texts with classes.

    Args:
        rows: ids (texts, length) and label, length and length again of each (texts, 3).
        held: as many, for the lines of metrics.
        padding: the id of padding.
        vocabulary: how many ids there are.
        classes: how many there are.
    """

    def __init__(
        self,
        rows: tuple[np.ndarray, np.ndarray],
        held: tuple[np.ndarray, np.ndarray],
        padding: int,
        vocabulary: int,
        classes: int,
    ) -> None:
        form = SampleForm(
            "example",
            1,
            ("input_ids", "attention_mask", "labels"),
            length=rows[0].shape[1],
            vocab_size=vocabulary,
            labels=tuple(map(str, range(classes))),
            config_values={"vocab_size": vocabulary, "pad_token_id": padding},
        )
        super().__init__(form, *(LabelledRows(*split, form.tensors) for split in (rows, held)))
