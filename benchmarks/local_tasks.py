"""Multiple-choice tasks of what every machine has, Python's standard library, for models that were trained on text and
code in general: which of four answers is likeliest after a beginning, per byte.

- lines: the next line of a file, beside three other lines of that file.
- sentences: the next sentence of the language's manual, beside three of other places in it.
- names: the name of a function by the first sentence of its documentation, beside three of the same file.
- codes: what an error number, or a status of HTTP, means, beside three other meanings.

Files and topics are those that `is_validation` holds out; the codes are all there are. The questions are always the
same ones on one version of Python; a guess is right in one of four.
"""

import ast
import errno
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import torch
from excerpt import manual, modules
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from auxin.data import CorpusSettings
from auxin.data.collecting import document_key, is_validation

CHOICES = 4
LINES_BEFORE = 8
"""Lines of a file before the one that is asked for."""
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Question:
    """A beginning, and ways to go on."""

    beginning: str
    choices: tuple[str, ...]
    answer: int
    """Which of the choices is right."""


def questions(count: int, seed: int = 0) -> dict[str, list[Question]]:
    """At most `count` questions of each task, drawn by `seed` from all that there are."""
    made = {"lines": _lines(), "sentences": _sentences(), "names": _names(), "codes": _codes()}
    found = {}
    for name, asked in made.items():
        generator = random.Random(f"{seed} {name}")
        drawn = list(asked)
        generator.shuffle(drawn)
        found[name] = [_question(beginning, right, wrong, generator) for beginning, right, wrong in drawn[:count]]
    return found


@torch.inference_mode()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Question]) -> list[bool]:
    """Whether each question is answered rightly: by the choice with the largest log probability per byte.

    The beginning is read once, and the choices, side by side, go on from its cache.
    """
    model.eval()
    found = []
    for question in asked:
        beginning = torch.tensor([tokenizer(question.beginning, add_special_tokens=False)["input_ids"]])
        choices = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in question.choices]
        read = model(input_ids=beginning, use_cache=True, logits_to_keep=1)
        cache = read.past_key_values
        cache.batch_repeat_interleave(len(choices))
        longest = max(map(len, choices))
        # What pads a choice comes after it, where no token of it looks.
        ids = torch.tensor([choice + choice[-1:] * (longest - len(choice)) for choice in choices])
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        before = torch.cat([read.logits.expand(len(choices), -1, -1), logits[:, :-1]], dim=1)
        each = log_softmax(before, dim=-1).gather(2, ids[..., None])[..., 0]
        scores = [
            float(row[: len(choice)].sum()) / len(text.encode())
            for row, choice, text in zip(each, choices, question.choices, strict=True)
        ]
        found.append(max(range(len(scores)), key=scores.__getitem__) == question.answer)
    return found


def _question(beginning: str, right: str, wrong: Sequence[str], generator: random.Random) -> Question:
    answer = generator.randrange(CHOICES)
    choices = list(wrong)
    choices.insert(answer, right)
    return Question(beginning, tuple(choices), answer)


def _others(right: str, among: Sequence[str], generator: random.Random) -> list[str] | None:
    """Three of the others; None where there are not so many."""
    different = sorted(set(among) - {right})
    return generator.sample(different, CHOICES - 1) if len(different) >= CHOICES - 1 else None


def held_out_topics() -> list[str]:
    """The topics of the manual that are held out: half of them."""
    settings = CorpusSettings(validation_fraction=0.5)
    return [text.decode() for _, text in manual() if is_validation(document_key(text, settings.seed), settings)]


def _lines() -> Iterator[tuple[str, str, list[str]]]:
    for name, text in modules(held_out=True):
        generator = random.Random(name)
        lines = [line for line in text.splitlines() if line.strip()]
        long = [line for line in lines if 20 <= len(line) <= 80]
        for number in range(LINES_BEFORE, len(lines), 25):
            right, before = lines[number], lines[number - LINES_BEFORE : number]
            # A line that stands there already, right or wrong, would say nothing of what comes next.
            wrong = _others(right, [line for line in long if line not in before], generator)
            if right in long and right not in before and wrong:
                yield "\n".join(before) + "\n", right, wrong


def _sentences() -> Iterator[tuple[str, str, list[str]]]:
    paragraphs = [part for text in held_out_topics() for part in text.split("\n\n") if not part.startswith("  ")]
    split = [SENTENCE.split(" ".join(paragraph.split())) for paragraph in paragraphs]
    last = [(sentences[-3:-1], f" {sentences[-1]}") for sentences in split if len(sentences) > 1]
    fit = [(before, right) for before, right in last if 30 <= len(right) <= 200]
    generator = random.Random("sentences")
    for before, right in fit:
        wrong = _others(right, [other for _, other in fit], generator)
        if wrong:
            yield " ".join(before), right, wrong


def _names() -> Iterator[tuple[str, str, list[str]]]:
    for name, text in modules(held_out=True):
        generator = random.Random(name)
        found: dict[str, str] = {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                first = " ".join(said.split("\n\n")[0].split())
                if 20 <= len(first) <= 200 and not node.name.startswith("__"):
                    found.setdefault(node.name, first)
        for function, first in found.items():
            wrong = _others(f"{function}(", [f"{other}(" for other in found], generator)
            if wrong:
                yield f"# {first}\ndef ", f"{function}(", wrong


def _codes() -> Iterator[tuple[str, str, list[str]]]:
    statuses = {f"The HTTP status code {status.value} means:": f" {status.phrase}" for status in HTTPStatus}
    numbers = {f"The error code {name} means:": f" {os.strerror(code)}" for code, name in errno.errorcode.items()}
    for meanings in (statuses, numbers):
        generator = random.Random("codes")
        for beginning, right in meanings.items():
            wrong = _others(right, list(meanings.values()), generator)
            assert wrong is not None
            yield beginning, right, wrong
