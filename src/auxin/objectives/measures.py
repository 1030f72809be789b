"""What branches are compared by: numbers that are measured on the held-out split, whatever a stage has learnt."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from auxin.data.dataset import Split
from auxin.data.question_source import ANSWER, CONTEXT
from auxin.errors import ConfigError, DataError
from auxin.models.evaluating import evaluating
from auxin.objectives.objective import NOT_A_NUMBER, Answers, Objective, held_out_noise
from auxin.settings import Settings
from auxin.words.one_of import kinds_of
from auxin.words.registry import Registry


class Measure(Settings):
    """The base of every measure; each has a field `kind: Literal["its_name"]`.

    A measure of this package is a class of this module, listed in `MEASURES`; other packages name theirs in the
    entry point group "auxin.measures".
    """

    kind: str
    """Which measure this is."""
    of: ClassVar[Answers | None] = None
    """What it is a measure of: answers of this kind; None: anything."""

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.kind.replace("_", " ")

    def unit(self, objective: Objective) -> str:
        """What it is counted in, such as "nats/token"; empty for a plain number."""
        return ""

    @property
    def better(self) -> Literal["lower", "higher"]:
        """Which way is better."""
        return "higher"

    def check(self, objective: Objective) -> None:
        """Refuse an objective that has not what this is a measure of; ConfigError."""
        if self.of not in (None, objective.answers):
            fitting = [of.model_fields["kind"].default for of in MEASURES if of.of in (None, objective.answers)]
            raise ConfigError(
                f"measures: {self.kind!r} is of {self.of}, and here the answers are {objective.answers}. Choose of "
                f"{', '.join(fitting)}."
            )

    def __call__(
        self, model: nn.Module, split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
    ) -> float:
        """Measure `model` on held-out samples.

        The samples come in the split's order and with noise that depends neither on `batch_size` nor on a seed.

        Args:
            model: in any mode, which is restored afterwards.
            split: the samples.
            objective: bound to the model's config; says what the targets are.
            batch_size: samples per forward pass.
            max_batches: batches to use; None: all.

        Raises:
            DataError: there is no sample, or a number is out of range.
        """
        raise NotImplementedError


class Loss(Measure):
    """The mean loss of a target under the objective, in nats."""

    kind: Literal["loss"] = "loss"
    """Says that this is the loss."""

    @property
    def better(self) -> Literal["lower", "higher"]:
        """Lower."""
        return "lower"

    def unit(self, objective: Objective) -> str:
        """Nats per target."""
        return f"nats/{objective.target}"

    def __call__(
        self, model: nn.Module, split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
    ) -> float:
        """Every target weighs the same."""
        total, targets = 0.0, 0
        with evaluating(model):
            for inputs in held_out_inputs(split, objective, batch_size, max_batches):
                losses = objective.losses(model, inputs)
                total += float(losses.sum(dtype=torch.float64))
                targets += losses.numel()
        return total / targets


class Accuracy(Measure):
    """Share of the targets whose likeliest class is the right one, 0 to 1; not a number where a model's logits are
    none."""

    kind: Literal["accuracy"] = "accuracy"
    """Says that this is the accuracy."""
    of: ClassVar[Answers | None] = "classes"

    def __call__(
        self, model: nn.Module, split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
    ) -> float:
        """Every target weighs the same."""
        predicted, right = _predictions(model, split, objective, batch_size, max_batches)
        if bool((predicted == NOT_A_NUMBER).any()):
            return math.nan
        return float((predicted == right).double().mean())


class MacroF1(Measure):
    """The mean of the classes' F1, every class weighing the same, 0 to 1.

    A class's F1 is 2 TP / (2 TP + FP + FN). Classes that neither occur nor are predicted are left out.
    """

    kind: Literal["macro_f1"] = "macro_f1"
    """Says that this is macro-averaged F1."""
    of: ClassVar[Answers | None] = "classes"

    @property
    def name(self) -> str:
        """As papers write it."""
        return "macro F1"

    def __call__(
        self, model: nn.Module, split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
    ) -> float:
        """Of all samples together, not of batches."""
        predicted, right = _predictions(model, split, objective, batch_size, max_batches)
        if bool((predicted == NOT_A_NUMBER).any()):
            return math.nan
        classes = int(max(predicted.max(), right.max())) + 1
        hits = torch.bincount(right[predicted == right], minlength=classes)
        # 2 TP + FP + FN is how often a class is predicted and how often it occurs, together.
        seen = torch.bincount(predicted, minlength=classes) + torch.bincount(right, minlength=classes)
        return float((2 * hits[seen > 0] / seen[seen > 0].double()).mean())


class ExactMatch(Measure):
    """Share of the questions whose likeliest answer has the tokens of the right one, 0 to 1; not a number where a
    model's logits are none."""

    kind: Literal["exact_match"] = "exact_match"
    """Says that this is the share of exact answers."""
    of: ClassVar[Answers | None] = "spans"

    def __call__(
        self, model: nn.Module, split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
    ) -> float:
        """Every question weighs the same."""
        return _mean_of_answers(
            model, split, objective, batch_size, max_batches, lambda found, right: float(found == right)
        )


class TokenF1(Measure):
    """The mean over questions of the F1 of the likeliest answer's tokens, 0 to 1.

    That is 2 S / (P + R), of P tokens of this answer and R of the right one, which share S, equal ones counted as often
    as both have them: SQuAD's F1 (arXiv 1606.05250, section 6.1) by tokens in place of words.
    """

    kind: Literal["token_f1"] = "token_f1"
    """Says that this is F1 of an answer's tokens."""
    of: ClassVar[Answers | None] = "spans"

    @property
    def name(self) -> str:
        """As papers write it."""
        return "token F1"

    def __call__(
        self, model: nn.Module, split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
    ) -> float:
        """Every question weighs the same."""

        def f1(found: list[int], right: list[int]) -> float:
            return 2 * (Counter(found) & Counter(right)).total() / (len(found) + len(right))

        return _mean_of_answers(model, split, objective, batch_size, max_batches, f1)


def held_out_inputs(
    split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """What a model is called with to be measured on `split`: batches in the split's order, on the CPU.

    Raises:
        DataError: as of `held_out_batches`.
    """
    return (inputs for _, inputs in held_out_batches(split, objective, batch_size, max_batches))


def held_out_batches(
    split: Split, objective: Objective, batch_size: int, max_batches: int | None = None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The batches of `split` in its order, and what a model is called with for each, on the CPU.

    Raises:
        DataError: there is no sample, or a number is out of range.
    """
    if not len(split):
        raise DataError("The held-out split has no sample: there is nothing to measure.")
    for name, value in (("batch_size", batch_size), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}. Give 1 or more.")
    rows = len(split) if max_batches is None else min(len(split), max_batches * batch_size)
    noise: np.random.Generator = held_out_noise()
    for start in range(0, rows, batch_size):
        batch = split.rows(range(start, min(start + batch_size, rows)))
        yield batch, objective.inputs(batch, noise)


def _predictions(
    model: nn.Module, split: Split, objective: Objective, batch_size: int, max_batches: int | None
) -> tuple[Tensor, Tensor]:
    with evaluating(model):
        pairs = [
            objective.predictions(model, inputs)
            for inputs in held_out_inputs(split, objective, batch_size, max_batches)
        ]
    predicted, right = (torch.cat([pair[side].cpu() for pair in pairs]) for side in (0, 1))
    return predicted, right


def _mean_of_answers(
    model: nn.Module,
    split: Split,
    objective: Objective,
    batch_size: int,
    max_batches: int | None,
    value: Callable[[list[int], list[int]], float],
) -> float:
    """The mean over questions of a value of (ids of the likeliest answer, ids of the right one); not a number where
    there is no likeliest one."""
    values: list[float] = []
    with evaluating(model):
        for batch, inputs in held_out_batches(split, objective, batch_size, max_batches):
            found = objective.spans(model, inputs, batch[CONTEXT]).tolist()
            right = torch.stack([batch[name] for name in ANSWER], 1).tolist()
            for ids, guess, answer in zip(batch["input_ids"].tolist(), found, right, strict=True):
                if NOT_A_NUMBER in guess:
                    return math.nan
                values.append(value(*(ids[start : end + 1] for start, end in (guess, answer))))
    return math.fsum(values) / len(values)


def _measures_in(loaded: Any) -> Iterator[tuple[str, type[Measure]]]:
    found = getattr(loaded, "MEASURES", ()) if isinstance(loaded, ModuleType) else (loaded,)
    for item in found:
        if not (isinstance(item, type) and issubclass(item, Measure)):
            raise TypeError(f"{item!r} is no measure (a class of auxin.objectives.measures.Measure)")
        for kind in kinds_of(item):
            yield kind, item


MEASURES: tuple[type[Measure], ...] = (Loss, Accuracy, MacroF1, ExactMatch, TokenF1)
"""Those of this module."""
REGISTRY: Registry[type[Measure]] = Registry("measure", "auxin.objectives", _measures_in)
"""Every measure, by name."""
