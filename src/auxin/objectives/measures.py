"""What branches are compared by: numbers that are measured on the held-out split, whatever a stage has learnt."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from auxin.data.dataset import Split
from auxin.data.question_source import ANSWER, CONTEXT
from auxin.errors import ConfigError
from auxin.models.evaluating import evaluating
from auxin.objectives.held_out_batches import ALONE, HeldOutBatches, Sharing
from auxin.objectives.objective import NOT_A_NUMBER, Answers, Objective
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

    def of_batch(
        self, model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """What the value of all batches is made of, for one of them: numbers that float64 holds, (rows, columns), with
        the same columns for each batch.

        Args:
            model: in evaluation mode, without gradients.
            objective: bound to the model's config; says what the targets are.
            batch: as the data gives it.
            inputs: what the model is called with for it, on the CPU.
        """
        raise NotImplementedError

    def value(self, found: Sequence[Tensor]) -> float:
        """The measure of all samples together.

        Args:
            found: of each batch in its order what `of_batch` gives, as float64 on the CPU.
        """
        raise NotImplementedError

    def __call__(
        self,
        model: nn.Module,
        split: Split,
        objective: Objective,
        batch_size: int,
        max_batches: int | None = None,
        sharing: Sharing = ALONE,
    ) -> float:
        """Measure `model` on held-out samples.

        The samples come in the split's order and with noise that depends neither on `batch_size` nor on a seed.

        Args:
            model: in any mode, which is restored afterwards.
            split: the samples.
            objective: bound to the model's config; says what the targets are.
            batch_size: samples per forward pass.
            max_batches: batches to use; None: all.
            sharing: who else measures the model; all get the same bits, which do not depend on how many they are.

        Raises:
            DataError: there is no sample, or a number is out of range.
        """
        batches = HeldOutBatches(split, objective, batch_size, max_batches)
        found: dict[int, Tensor] = {}
        with evaluating(model), sharing.measuring():
            for number, batch, inputs in sharing.own(batches):
                found[number] = self.of_batch(model, objective, batch, inputs).double().cpu()
        return self.value(sharing.all_of(found, len(batches)))


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

    def of_batch(
        self, model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum of the losses of its targets, and how many there are, (1, 2)."""
        losses = objective.losses(model, inputs)
        return torch.tensor([[losses.sum(dtype=torch.float64), losses.numel()]], dtype=torch.float64)

    def value(self, found: Sequence[Tensor]) -> float:
        """Every target weighs the same."""
        total, targets = (sum(column) for column in zip(*(one[0].tolist() for one in found), strict=True))
        return float(total / targets)


class _OfPredictions(Measure):
    """Of the likeliest classes of all targets; not a number where a model's logits are none."""

    of: ClassVar[Answers | None] = "classes"

    def of_batch(
        self, model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """The likeliest class of each target, and the right one, (targets, 2)."""
        return torch.stack(objective.predictions(model, inputs), 1)

    def value(self, found: Sequence[Tensor]) -> float:
        """Of all targets together."""
        predicted, right = torch.cat(list(found)).long().unbind(1)
        return math.nan if bool((predicted == NOT_A_NUMBER).any()) else self.of_right(predicted, right)

    def of_right(self, predicted: Tensor, right: Tensor) -> float:
        """The measure of predicted classes where others, or the same, are right; each (targets,)."""
        raise NotImplementedError


class Accuracy(_OfPredictions):
    """Share of the targets whose likeliest class is the right one, 0 to 1; not a number where a model's logits are
    none."""

    kind: Literal["accuracy"] = "accuracy"
    """Says that this is the accuracy."""

    def of_right(self, predicted: Tensor, right: Tensor) -> float:
        """Every target weighs the same."""
        return float((predicted == right).double().mean())


class MacroF1(_OfPredictions):
    """The mean of the classes' F1, every class weighing the same, 0 to 1.

    A class's F1 is 2 TP / (2 TP + FP + FN). Classes that neither occur nor are predicted are left out.
    """

    kind: Literal["macro_f1"] = "macro_f1"
    """Says that this is macro-averaged F1."""

    @property
    def name(self) -> str:
        """As papers write it."""
        return "macro F1"

    def of_right(self, predicted: Tensor, right: Tensor) -> float:
        """Of all samples together, not of batches."""
        classes = int(max(predicted.max(), right.max())) + 1
        hits = torch.bincount(right[predicted == right], minlength=classes)
        # 2 TP + FP + FN is how often a class is predicted and how often it occurs, together.
        seen = torch.bincount(predicted, minlength=classes) + torch.bincount(right, minlength=classes)
        return float((2 * hits[seen > 0] / seen[seen > 0].double()).mean())


class _OfAnswers(Measure):
    """The mean over questions, each of which weighs the same; not a number where a model's logits are none."""

    of: ClassVar[Answers | None] = "spans"

    def of_batch(
        self, model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """The value of each question, not a number where there is no likeliest answer, (questions, 1)."""
        found = objective.spans(model, inputs, batch[CONTEXT]).tolist()
        right = torch.stack([batch[name] for name in ANSWER], 1).tolist()
        values = [
            math.nan
            if NOT_A_NUMBER in guess
            else self.of_answer(*(ids[start : end + 1] for start, end in (guess, answer)))
            for ids, guess, answer in zip(batch["input_ids"].tolist(), found, right, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)[:, None]

    def value(self, found: Sequence[Tensor]) -> float:
        """Their mean."""
        values = torch.cat(list(found)).flatten().tolist()
        return math.fsum(values) / len(values)

    def of_answer(self, found: list[int], right: list[int]) -> float:
        """The value of a question, by the ids of the likeliest answer and of the right one."""
        raise NotImplementedError


class ExactMatch(_OfAnswers):
    """Share of the questions whose likeliest answer has the tokens of the right one, 0 to 1; not a number where a
    model's logits are none."""

    kind: Literal["exact_match"] = "exact_match"
    """Says that this is the share of exact answers."""

    def of_answer(self, found: list[int], right: list[int]) -> float:
        """Whether they are the same."""
        return float(found == right)


class TokenF1(_OfAnswers):
    """The mean over questions of the F1 of the likeliest answer's tokens, 0 to 1.

    That is 2 S / (P + R), of P tokens of this answer and R of the right one, which share S, equal ones counted as often
    as both have them: SQuAD's F1 (arXiv 1606.05250, section 6.1) by tokens in place of words.
    """

    kind: Literal["token_f1"] = "token_f1"
    """Says that this is F1 of an answer's tokens."""

    @property
    def name(self) -> str:
        """As papers write it."""
        return "token F1"

    def of_answer(self, found: list[int], right: list[int]) -> float:
        """F1 of the tokens of the two."""
        return 2 * (Counter(found) & Counter(right)).total() / (len(found) + len(right))


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
