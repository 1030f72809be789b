"""Small sets of labelled samples: rows for files, prepared texts and questions in memory, and images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from auxin.data import SampleForm
from auxin.data.labelled_text import LabelledRows
from auxin.data.question_answering import QuestionRows
from auxin.data.question_source import ANSWER, CONTEXT

WORDS = {
    "nature": ["season", "light", "tree", "leaf", "spring", "winter"],
    "money": ["price", "bank", "coin", "market", "loan", "debt"],
    "music": ["song", "drum", "chord", "choir", "tune", "flute"],
}


def labelled_rows(examples: int = 120, seed: int = 0, labels: Sequence[str] = tuple(WORDS)) -> list[dict[str, str]]:
    """Texts of three words of their class among others that say nothing; classes come equally often."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(examples):
        label = labels[number % len(labels)]
        words = [*draw.choice(WORDS[label], 3), *draw.choice(["the", "was", "of", "it"], draw.integers(1, 5))]
        draw.shuffle(words)
        found.append({"text": " ".join(words) + f" {number}", "label": label})
    return found


def question_rows(examples: int = 120, seed: int = 0, wrong: int = 0) -> list[dict[str, Any]]:
    """Questions for the word of a class; the context has one of each class among others that say nothing. Of `wrong`
    questions one, where it is not 0, has the word of another class as its answer."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(examples):
        chosen = {label: str(draw.choice(words)) for label, words in WORDS.items()}
        asked = list(WORDS)[number % len(WORDS)]
        words = [*chosen.values(), *draw.choice(["the", "was", "of", "it"], draw.integers(1, 5))]
        draw.shuffle(words)
        context = f"{number}: {' '.join(words)}"
        told = list(WORDS)[(number + bool(wrong and number % wrong == 0)) % len(WORDS)]
        start = context.index(f" {chosen[told]}") + 1
        found.append({"question": f"which {asked}", "context": context, "answer": chosen[told], "start": start})
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def bar(angle: str, size: int, draw: np.random.Generator) -> np.ndarray:
    """A bright bar through the middle, or one beside it, among noise, (size, size), values of 0 to 255: level, upright,
    or falling from left to right."""
    pixels = draw.integers(0, 120, (size, size))
    aside = int(draw.integers(-1, 2))
    place = size // 2 + aside
    if angle == "falling":
        pixels[np.arange(size), (np.arange(size) + aside) % size] = 255
    else:
        pixels[(place, slice(None)) if angle == "level" else (slice(None), place)] = 255
    return pixels.astype(np.uint8)


BARS = ("falling", "level", "upright")


def write_bars(folder: Path, images: int = 90, size: int = 8, seed: int = 0) -> Path:
    """A folder of grey PNGs for each of `BARS`, which come equally often."""
    draw = np.random.default_rng(seed)
    for number in range(images):
        path = folder / BARS[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(bar(path.parent.name, size, draw)).save(path)
    return folder


class TinyLabelled:
    """Texts of 3 to 9 tokens, padded to 10 with token 0; the class is the residue of the first token by three.

    Args:
        examples: of the training split.
        poisoned_rows: texts that hold the poison token.
        poison: that token.
    """

    length, vocabulary, labels = 10, 64, ("zero", "one", "two")
    bytes_per_unit = None
    fingerprint = "labelled"

    def __init__(self, examples: int = 64, poisoned_rows: tuple[int, ...] = (), poison: int = 63) -> None:
        draw = np.random.default_rng(0)
        tokens = draw.integers(1, poison, (examples + 16, self.length))
        lengths = draw.integers(3, self.length, examples + 16)
        labels = tokens[:, 0] % 3
        for row in poisoned_rows:
            tokens[row, 1] = poison
        tokens[np.arange(self.length) >= lengths[:, None]] = 0
        facts = np.stack([labels, lengths, np.full_like(lengths, self.length)], 1).astype(np.int32)
        self.form = SampleForm(
            "example",
            1,
            ("input_ids", "attention_mask", "labels"),
            length=self.length,
            vocab_size=self.vocabulary,
            labels=self.labels,
            config_values={"vocab_size": self.vocabulary, "pad_token_id": 0},
        )
        self._splits = {"train": slice(0, examples), "validation": slice(examples, None)}
        self._tokens, self._facts = tokens.astype(np.uint16), facts

    def split(self, name: str) -> LabelledRows:
        rows = self._splits[name]
        return LabelledRows(self._tokens[rows], self._facts[rows], self.form.tensors)

    def processor(self) -> None:
        return None

    def describe(self) -> dict[str, str]:
        return {}


class TinyQuestions:
    """Questions of one token, 1 to 9, behind token 61, and a context behind token 62 that has it once, in which an even
    one is the answer and an odd one with the token behind it, all padded with token 0.

    Args:
        examples: of the training split.
    """

    length, vocabulary = 12, 64
    bytes_per_unit = None
    fingerprint = "questions"

    def __init__(self, examples: int = 64) -> None:
        draw, rows = np.random.default_rng(0), examples + 16
        tokens, facts = np.zeros((rows, self.length), np.uint16), np.zeros((rows, 6), np.int32)
        for row in range(rows):
            asked, context = int(draw.integers(1, 10)), draw.integers(10, 60, draw.integers(3, 8))
            place = int(draw.integers(len(context) - 1))
            context[place] = asked
            text = [61, asked, 62, *context, 62]
            tokens[row, : len(text)] = text
            facts[row] = 3 + place, 3 + place + asked % 2, 3, len(text) - 1, len(text), 3
        self.form = SampleForm(
            "example",
            1,
            ("input_ids", "attention_mask", "token_type_ids", CONTEXT, *ANSWER),
            length=self.length,
            vocab_size=self.vocabulary,
            config_values={"vocab_size": self.vocabulary, "pad_token_id": 0},
        )
        self._splits = {"train": slice(0, examples), "validation": slice(examples, None)}
        self._tokens, self._facts = tokens, facts

    def split(self, name: str) -> QuestionRows:
        rows = self._splits[name]
        return QuestionRows(self._tokens[rows], self._facts[rows], self.form.tensors)

    def processor(self) -> None:
        return None

    def describe(self) -> dict[str, str]:
        return {}


class Images:
    """Pictures of 8 x 8 pixels: the class is the quarter that is bright."""

    labels = ("upper left", "upper right", "lower left", "lower right")
    bytes_per_unit = None
    fingerprint = "images"

    def __init__(self, images: int = 96, processor: Any = None) -> None:
        draw = torch.Generator().manual_seed(0)
        self._processor = processor
        self._labels = torch.randint(4, (images + 32,), generator=draw)
        self._pixels = 0.3 * torch.randn(images + 32, 3, 8, 8, generator=draw)
        for picture, label in zip(self._pixels, self._labels.tolist(), strict=True):
            picture[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1
        self.form = SampleForm("image", 1, ("pixel_values", "labels"), labels=self.labels)
        self._splits = {"train": slice(0, images), "validation": slice(images, None)}

    def split(self, name: str) -> "Pictures":
        return Pictures(self._pixels[self._splits[name]], self._labels[self._splits[name]])

    def processor(self) -> Any:
        return self._processor

    def describe(self) -> dict[str, str]:
        return {"source": "drawn"}


class Pictures:
    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[list(rows)], "labels": self.labels[list(rows)]}
