"""A small task of finding answers in texts, made of WordNet: which word of a text is meant by a definition."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from axformer_tasks import PARTS_OF_SPEECH, InMemory
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from auxin.data import SampleForm
from auxin.data.answer_encoder import AnswerEncoder
from auxin.data.question_answering import QuestionRows
from auxin.data.question_source import ANSWER, CONTEXT, Question
from auxin.objectives.measures import ExactMatch, Loss, TokenF1
from auxin.objectives.question_answering import QuestionAnswering

SENTENCES = 3
"""In a context, one of them an example of the word that is meant."""
WORDS = (4, 6)
"""Of a sentence and of a definition, so that most questions fit."""
_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")


@dataclass(frozen=True)
class Meaning:
    """A synset with an example of its use."""

    definition: str
    """Up to the first semicolon."""
    sentence: str
    """In which exactly one of its words stands, once."""
    words: frozenset[str]
    """Its words, in small letters; those of several parts are left out."""


@dataclass(frozen=True)
class Answers:
    """The task: the question is a definition, the context are sentences, the answer is the word of one of them."""

    meanings: Sequence[Meaning]
    name: str = "answers"
    told: str = (
        f"a definition of WordNet as the question, {SENTENCES} example sentences of different words as the context "
        f"({SENTENCES * WORDS[0]} to {SENTENCES * WORDS[1]} words), the word that is defined as the answer"
    )
    length: int = 30
    objective: ClassVar[QuestionAnswering] = QuestionAnswering()

    def rows(self, tokenizer: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and facts of so many questions, as `QuestionRows` wants them; no sentence stands in two of them."""
        draw, encoder = np.random.default_rng(seed), AnswerEncoder(tokenizer, self.length)
        waiting = [self.meanings[n] for n in draw.permutation(len(self.meanings))]
        ids, facts = [], []
        while len(ids) < count:
            meant = waiting.pop()
            others = [waiting.pop() for _ in range(SENTENCES - 1)]
            if any(meant.words & set(words_of(other.sentence)) for other in others):
                continue
            (found,) = encoder.answers([question([meant, *others], draw.permutation(SENTENCES))])
            if not isinstance(found, str) and not found.padded.is_cut:
                ids.append(found.padded.ids)
                facts.append((*found.answer, *found.context, found.padded.tokens, found.padded.second))
        return np.array(ids), np.array(facts, dtype=np.int32)

    def data(self, rows: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray], tokenizer: Any) -> Any:
        """Questions to learn from, and others for the lines of metrics."""
        form = SampleForm(
            "example",
            1,
            ("input_ids", "attention_mask", "token_type_ids", CONTEXT, *ANSWER),
            length=self.length,
            vocab_size=len(tokenizer),
            config_values={"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        )
        return InMemory(form, *(QuestionRows(*split, form.tensors) for split in (rows, held)))

    def pretrained(self, home: Path) -> PreTrainedModel:
        """The model of a folder with a new head."""
        return AutoModelForQuestionAnswering.from_pretrained(home, dtype=torch.float32)

    def judged(self, model: PreTrainedModel, data: InMemory) -> dict[str, float]:
        """Loss, the share of exact answers in per cent and F1 of tokens in per cent on what is to be learnt of data."""
        rows, bound = data.split("train"), self.objective.bind(model.config, data.form)
        loss, exact, f1 = (measure(model, rows, bound, 80) for measure in (Loss(), ExactMatch(), TokenF1()))
        return {"loss": loss, "accuracy": 100 * exact, "f1": 100 * f1}


def meanings(wordnet: Path) -> list[Meaning]:
    """All that have such an example, in the files' order; of those with the same sentence or definition the first."""
    found: list[Meaning] = []
    seen: set[str] = set()
    for name in PARTS_OF_SPEECH:
        for line in (wordnet / f"data.{name}").read_text(encoding="utf-8").splitlines():
            facts, _, gloss = line.partition(" | ")
            if line.startswith("  "):
                continue
            fields = facts.split()
            written = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words = frozenset(word.partition("(")[0].lower() for word in written if "_" not in word)
            definition = gloss.partition(";")[0].strip()
            for sentence in re.findall(r'"([^"]+)"', gloss):
                lengths = len(words_of(sentence)), len(words_of(definition))
                once = sum(word in words for word in words_of(sentence)) == 1
                new = not {sentence, definition} & seen
                if new and once and all(WORDS[0] <= length <= WORDS[1] for length in lengths):
                    found.append(Meaning(definition, sentence, words))
                    seen |= {sentence, definition}
    return found


def words_of(text: str) -> list[str]:
    """In small letters."""
    return _WORD.findall(text.lower())


def question(chosen: Sequence[Meaning], order: Sequence[int]) -> Question:
    """The definition of the first of those chosen, whose sentences stand in this order."""
    meant, context, start = chosen[0], "", -1
    for number in order:
        sentence = chosen[number].sentence.rstrip(" .") + ". "
        if number == 0:
            start = len(context) + next(
                match.start() for match in _WORD.finditer(sentence.lower()) if match[0] in meant.words
            )
        context += sentence
    end = start + len(_WORD.match(context.lower(), start)[0])
    return Question(meant.definition, context.rstrip(), start, end, 1)
