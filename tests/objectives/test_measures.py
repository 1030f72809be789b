"""What branches are compared by: numbers that an oracle counts one by one, in batches of any size."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from auxin.data import Contexts, SampleForm
from auxin.errors import DataError
from auxin.objectives.causal import CausalObjective
from auxin.objectives.measures import Accuracy, Loss, MacroF1, Measure
from auxin.objectives.objective import IGNORED, Objective
from oracles.perplexity import strided_losses
from tiny_models import fresh_llama

LENGTH, WORDS = 9, 280
MODEL = fresh_llama(vocab_size=WORDS, initializer_range=0.5).double()
FORM = SampleForm("token", LENGTH, ("input_ids",), length=LENGTH, vocab_size=WORDS)
CAUSAL = CausalObjective(MODEL.config, FORM)


def next_token_logits(ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return MODEL(torch.tensor([list(ids)])).logits[0, -1].numpy()


def contexts(rows: int = 7) -> Contexts:
    return Contexts(np.random.default_rng(0).integers(0, WORDS, (rows, LENGTH)).astype(np.uint16))


IN_BATCHES = pytest.mark.parametrize(
    ("batch_size", "max_batches", "rows"), [(3, None, 7), (3, 2, 6), (2, 9, 7), (7, 1, 7), (4, 1, 4)]
)


@IN_BATCHES
def test_the_loss_is_the_mean_over_tokens(batch_size: int, max_batches: int | None, rows: int) -> None:
    split = contexts()
    rows_ = split.array[:rows].tolist()
    expected = [loss for row in rows_ for loss in strided_losses(next_token_logits, row, len(row), 1)]
    found = Loss()(MODEL, split, CAUSAL, batch_size, max_batches)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@IN_BATCHES
def test_the_accuracy_is_the_share_of_tokens_guessed(batch_size: int, max_batches: int | None, rows: int) -> None:
    split = contexts()
    # Some tokens are what the model thinks likeliest after those before them, so that some guesses are right.
    for row in split.array[:5]:
        for place in (3, 6):
            row[place] = next_token_logits(row[:place].tolist()).argmax()
    guesses = [
        int(next_token_logits(row[:place].tolist()).argmax()) == row[place]
        for row in split.array[:rows]
        for place in range(1, LENGTH)
    ]
    assert 0 < np.mean(guesses) < 1
    assert Accuracy()(MODEL, split, CAUSAL, batch_size, max_batches) == pytest.approx(np.mean(guesses))


class _Given:
    """Samples whose predicted and right classes are given; a right class may be none."""

    def __init__(self, predicted: Sequence[int], right: Sequence[int]) -> None:
        self.tensors = {"guess": torch.tensor(predicted), "labels": torch.tensor(right)}

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {name: tensor[list(rows)] for name, tensor in self.tensors.items()}


class _Says(nn.Module):
    """Predicts the classes that it is given, with logits of one to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, guess: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=nn.functional.one_hot(guess, CLASSES) * self.weight)


class _AsGiven(Objective):
    target = "example"

    def inputs(self, batch, noise):
        return dict(batch)


CLASSES = 5
OF_EXAMPLES = _AsGiven(MODEL.config, SampleForm("example", 1, ("guess", "labels")))


def measured(measure: Measure, predicted: Sequence[int], right: Sequence[int], batch_size: int = 3) -> float:
    return measure(_Says(), _Given(predicted, right), OF_EXAMPLES, batch_size)


def f1_by_definition(predicted: Sequence[int], right: Sequence[int]) -> float:
    """The harmonic mean of precision and recall of each class that occurs or is predicted, averaged over them."""
    scores = []
    for label in {*predicted, *right}:
        hits = sum(p == r == label for p, r in zip(predicted, right, strict=True))
        precision = hits / predicted.count(label) if label in predicted else 0.0
        recall = hits / right.count(label) if label in right else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


pairs = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=20)


@settings(deadline=None)
@given(pairs, st.integers(1, 7))
def test_macro_f1_and_accuracy_by_their_definitions(found: list[tuple[int, int]], batch_size: int) -> None:
    predicted, right = (list(side) for side in zip(*found, strict=True))
    assert measured(MacroF1(), predicted, right, batch_size) == pytest.approx(f1_by_definition(predicted, right))
    share = sum(p == r for p, r in found) / len(found)
    assert measured(Accuracy(), predicted, right, batch_size) == pytest.approx(share)


def test_macro_f1_known_by_heart() -> None:
    """Of class 0 precision and recall are 2/3, of class 1 they are 0 and 0, of class 2 they are 1/2 and 1."""
    assert measured(MacroF1(), [0, 0, 0, 2, 2], [0, 0, 1, 0, 2]) == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)


def test_what_has_no_label_is_not_measured() -> None:
    predicted, right = [0, 1, 2, 3, 1], [0, IGNORED, 1, 3, IGNORED]
    assert measured(Accuracy(), predicted, right, 2) == pytest.approx(2 / 3)
    assert measured(MacroF1(), predicted, right, 2) == pytest.approx(f1_by_definition([0, 2, 3], [0, 1, 3]))
    # The logits are one for the guess and nothing for the others.
    others = CLASSES - 1
    wrong = math.log(math.e + others)
    assert measured(Loss(), predicted, right, 2) == pytest.approx((2 * (wrong - 1) + wrong) / 3)


def test_what_tables_say_of_them() -> None:
    told = [(m.name, m.unit(CAUSAL), m.unit(OF_EXAMPLES), m.better) for m in (Loss(), Accuracy(), MacroF1())]
    assert told == [
        ("loss", "nats/token", "nats/example", "lower"),
        ("accuracy", "", "", "higher"),
        ("macro F1", "", "", "higher"),
    ]


class _Uniform(nn.Module):
    """Says the same of every token, remembers in which state it was asked, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Dropout(0.5).eval()
        self.seen: list[tuple[bool, bool]] = []
        self.fails = False

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        self.seen.append((self.training, torch.is_inference_mode_enabled()))
        if self.fails:
            raise RuntimeError("no")
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, 50))


ZEROS = Contexts(np.zeros((3, LENGTH), np.uint16))


def test_modes_are_restored_also_after_a_failure() -> None:
    model = _Uniform().train()
    model.frozen.eval()
    assert Loss()(model, ZEROS, CAUSAL, 2) == pytest.approx(math.log(50))
    assert model.seen == [(False, True)] * 2
    assert model.training
    assert not model.frozen.training
    model.fails = True
    with pytest.raises(RuntimeError, match="no"):
        Loss()(model, ZEROS, CAUSAL, 2)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (3,)])
def test_contexts_that_predict_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=rf"Token array of shape \({shape[0]}, ?{shape[1] if shape[1:] else ''}\)"):
        Contexts(np.zeros(shape, np.uint16))


@pytest.mark.parametrize("measure", [Loss(), Accuracy(), MacroF1()])
@pytest.mark.parametrize(
    ("split", "arguments", "message"),
    [
        (_Given([], []), (2, None), "no sample"),
        (ZEROS, (0, None), "batch_size is 0"),
        (ZEROS, (2, 0), "max_batches is 0"),
    ],
)
def test_nothing_to_measure(measure: Measure, split, arguments: tuple[int, int | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure(_Uniform(), split, CAUSAL, *arguments)


@pytest.mark.parametrize("measure", [Loss(), Accuracy(), MacroF1()])
def test_a_model_whose_logits_are_no_numbers_has_no_value(measure: Measure) -> None:
    model = fresh_llama(vocab_size=WORDS)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert math.isnan(measure(model, contexts(), CAUSAL, 4))
