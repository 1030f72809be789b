"""How small a model shall be, and the least removal that gets there, told from shapes alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.accounting import count_parameters, flops_per_token, serving_memory
from auxin.accounting.inputs import counted_length, text_positions, unit_of_cost
from auxin.accounting.latency import Conditions, Phase
from auxin.edits.resolution import resolve
from auxin.errors import ConfigError, PlanError
from auxin.planning.latency import LatencyTable, in_milliseconds
from auxin.settings import Settings

LONGEST = 1024
"""Tokens at which FLOPs are counted at most where nothing else is said, as in the tables of plans."""
SIZES = ("parameters", "flops", "memory", "latency", "latency_ms")
OF_LATENCY = ("phase", "device")


class Target(Settings):
    """The size that a model is to have at most; give exactly one of `parameters`, `flops`, `memory`, `latency` and
    `latency_ms`.

    Below 1, parameters, FLOPs and memory are the share of the model's that stays (0.7: 70 %), otherwise the number
    itself.
    """

    parameters: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """All parameters, tied ones once."""
    flops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """FLOPs per token of a forward pass; per sample of a model whose inputs are more than tokens."""
    memory: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Bytes that the model holds while it answers: its weights, and the keys and values of `sequence_length` tokens of
    `batch_size` sequences, where it keeps any; all in the model's type."""
    latency: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Share, below 1, of the time that the model takes on this machine, as a table of its parts tells it."""
    latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The same time in milliseconds."""
    sequence_length: int | None = Field(default=None, gt=0)
    """Tokens of the sequence in which FLOPs are counted or latency is measured, or that a cache holds; in decoding
    those that are there before. None: the model's context length, at most 1024."""
    phase: Phase | None = None
    """Whose latency: of one pass over whole sequences ("forward", the default) or of one more token for each
    ("decoding")."""
    batch_size: int | None = Field(default=None, gt=0)
    """Sequences, images or recordings at once, of which latency is measured or the cache is kept; None: one."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where latency is measured; None: on a GPU where there is one."""

    @model_validator(mode="before")
    @classmethod
    def _no_number(cls, values: Any) -> Any:
        if isinstance(values, int | float):
            raise ValueError(f"a size of what? Give target.parameters, or another of {', '.join(SIZES[1:])}")
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(SIZES[:-1])} and {SIZES[-1]}, not "
                f"{' and '.join(given) or 'none of them'}."
            )
        if self.latency is not None and self.latency >= 1:
            raise ValueError(f"latency = {self.latency:g} is no share below 1. A time is given as latency_ms.")
        if self.asked == 1 and self.latency_ms is None:
            raise ValueError(
                f"{given[0]} = 1 as a share is the whole model, so that nothing has to go, and as a number it is no "
                "model. Give the share that stays (0.7), or how many."
            )
        if self.latency_ms is None and self.asked > 1 and self.asked != int(self.asked):
            raise ValueError(
                f"{given[0]} = {self.asked:g} is neither a share below 1 nor a whole number. Give the share that stays "
                "(0.7), or how many."
            )
        if self.sequence_length is not None and self.parameters is not None:
            raise ValueError(
                "sequence_length says at which length flops and memory are counted or latency is measured, and none of "
                "them is given."
            )
        if self.batch_size is not None and self.name in ("parameters", "flops"):
            raise ValueError(
                "batch_size says for how many sequences memory is counted or latency is measured, and neither is "
                "given. Leave it out."
            )
        if not self.is_latency and (of := [name for name in OF_LATENCY if getattr(self, name) is not None]):
            raise ValueError(f"{of[0]} says how latency is measured, and no latency is given. Leave it out.")
        return self

    @property
    def name(self) -> str:
        """The field that was given."""
        return next(name for name in SIZES if getattr(self, name) is not None)

    @property
    def asked(self) -> float:
        """The share or number that was given."""
        return float(getattr(self, self.name))

    @property
    def is_latency(self) -> bool:
        """Whether it is a time."""
        return self.name in ("latency", "latency_ms")

    def of(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> float:
        """What of `model` is to become smaller; of a latency, the milliseconds that a table tells.

        Args:
            model: the model.
            dtype: in which its memory is counted; None: its own. Skeletons have none.

        Raises:
            ConfigError, PlanError: its FLOPs can't be counted, or its latency can't be measured.
        """
        if self.parameters is not None:
            return count_parameters(model).total
        if self.flops is not None:
            return flops_per_token(model, self.length(model)).forward
        if self.memory is not None:
            return serving_memory(model, self.batch_size or 1, self.length(model), dtype or model.dtype).total
        return self.table(model).whole

    def length(self, model: PreTrainedModel) -> int:
        """Tokens of the sequence in which `model` is counted."""
        return self.sequence_length or counted_length(model, LONGEST)

    def table(self, model: PreTrainedModel) -> LatencyTable:
        """What tells the latency of `model`, and of what is made of it, under the conditions that the target names.

        Raises:
            ConfigError: a GPU is asked for where there is none.
            PlanError: the model's latency can't be measured.
        """
        phase, device = self.phase or "forward", self.device or "auto"
        length = self.length(model)
        if self.sequence_length is None and phase == "decoding":
            length = min(length, (text_positions(model) or length + 1) - 1)  # the new token has a position, too
        return LatencyTable(model, Conditions.here(phase, self.batch_size or 1, length, model.dtype, device))

    def limit(self, have: float) -> Fraction:
        """What a model of which `of` is `have` may have left, exactly."""
        asked = Fraction(str(self.asked))  # 0.57 of 100 is 57
        return asked * Fraction(have) if asked < 1 and self.latency_ms is None else asked

    def refuse_met(self, have: float) -> None:
        """PlanError where a model of which `of` is `have` meets the target as it is."""
        if have <= self.limit(have):
            raise PlanError(
                f"{self}: the model has {self.in_words(have)} already, so that nothing has to go. Ask for less, or for "
                "a share below 1."
            )

    def in_words(self, value: float | Fraction) -> str:
        """What `of` or `limit` gave: a time, or a number without what is behind the point."""
        return in_milliseconds(float(value)) if self.is_latency else f"{int(value):,}"

    def __str__(self) -> str:
        share = self.asked < 1 or self.is_latency
        length = f"{self.sequence_length} tokens" if self.sequence_length is not None else ""
        batch = f"batches of {self.batch_size}" if self.batch_size is not None else ""
        at = " and ".join(words for words in (length, batch) if words)
        return (
            f"target.{self.name} = {f'{self.asked:g}' if share else format(int(self.asked), ',')}"
            f"{f' in {self.phase}' if self.phase else ''}{f' at {at}' if at else ''}"
        )


class Gauge:
    """Measures a model and what is made of it by what a target is given in.

    Args:
        target: what is asked for.
        model: the model as it is, on any device; weights are not looked at.

    Raises:
        ConfigError, PlanError: as `Target.of`.
    """

    def __init__(self, target: Target, model: PreTrainedModel) -> None:
        self.target, self.model = target, model
        self._table = target.table(model) if target.is_latency else None
        self.have: float = self._table.whole if self._table is not None else target.of(model)
        """Of the model as it is."""
        self.limit: Fraction = target.limit(self.have)
        """What may be left."""

    def of(self, found: "Removal") -> float:
        """Of what a removal leaves.

        Raises:
            ConfigError, PlanError: as `Target.of`.
        """
        if self._table is not None:
            return self._table.predicted(found.after, found.modules)
        return self.target.of(found.after, self.model.dtype)

    def latency(self, found: "Removal") -> str:
        """How latency falls, in words: predicted and, where that is cheap, measured on the whole models; empty where
        the target is none."""
        if self._table is None:
            return ""
        told = f"latency as predicted {_milliseconds_fall(self.have, self.of(found))}"
        measured = self._table.measured(found.after)
        if measured is None:
            return told
        missed = measured[1] > self.target.limit(measured[0])
        return (
            f"{told}, as measured {_milliseconds_fall(*measured)}" + ", so that the prediction alone meets it" * missed
        )

    def figures(self) -> list[str]:
        """What it was told by, where others would be measured on another machine."""
        if self._table is None:
            return []
        return [f"Latency of {self._table.conditions}: {'; '.join(self._table.rows())}."]


@dataclass(frozen=True)
class Removal:
    """Edits that make a model smaller, and what they come to."""

    edits: Sequence[Any]
    before: PreTrainedModel
    """Skeleton of the model as it is."""
    after: PreTrainedModel
    """Skeleton of the smaller one."""
    amount: int | None = None
    """How much of the family of plans is removed; None where the edits are of none."""
    modules: Mapping[str, str | None] = field(default_factory=dict)
    """The path that every module of the smaller one had before; None for those that are new."""
    gauge: Gauge | None = None
    """By which it was found to meet a target; None where there was none."""

    def reached(self, target: Target | None = None) -> str:
        """What the edits come to, for the notes of a plan: parameters and, where they can be counted, FLOPs, before
        and after; latency where the target is one.

        Args:
            target: what was asked for; its sequence length is that of the FLOPs.
        """
        models = self.before, self.after
        told = [f"parameters {_fall(*(count_parameters(model).total for model in models))}"]
        length = (target.sequence_length if target is not None else None) or counted_length(self.before, LONGEST)
        try:
            flops = [flops_per_token(model, length).forward for model in models]
        except (ConfigError, PlanError):
            pass  # parameters are what was asked for then; a plan's table says why these can't be counted
        else:
            unit = unit_of_cost(self.before)
            at = "" if unit == "sample" else f" at {length} {unit}s"
            told.append(f"FLOPs per {unit}{at} {_fall(*map(round, flops))}")
        if self.gauge is not None and (latency := self.gauge.latency(self)):
            told.append(latency)
        asked = f"; asked for: {target}" if target is not None else ""
        return ", ".join(told) + asked + "."

    def findings(self, target: Target | None = None) -> list[str]:
        """What a plan says of it: what was reached, and the figures by which that was told, where another machine would
        have others.

        Args:
            target: what was asked for.
        """
        reached = f"Reached: {self.reached(target)}"
        return [reached, *(self.gauge.figures() if self.gauge is not None else [])]


def removal(model: PreTrainedModel, edits: Sequence[Any], amount: int | None = None) -> Removal:
    """What `edits` come to; weights are not looked at.

    Raises:
        PlanError: they don't fit.
    """
    resolved = resolve(edits, model)
    return Removal(edits, resolved.before, resolved.after, amount, resolved.modules)


def least_removal(
    gauge: Gauge, family: Callable[[int], Sequence[Any]], most: int, what: str = "this method", more: str = ""
) -> Removal:
    """The first of a nested family of plans that meets a target: the one before it misses it.

    Args:
        gauge: of the model, and how small it shall be.
        family: (amount) -> the edits that remove so much, for amounts from 1 to `most`; more is never larger.
        most: the largest amount that there is; 0: nothing can go.
        what: what removes, for messages.
        more: how it could remove more than the largest amount, in a sentence.

    Raises:
        PlanError: the model is no larger than the target already, the target lies below what the largest amount
            leaves, or edits do not fit.
    """
    model, target, have, limit = gauge.model, gauge.target, gauge.have, gauge.limit
    target.refuse_met(have)
    if most < 1:
        raise PlanError(f"{target}: there is nothing in this model that {what} could remove.")
    best = removal(model, family(most), most)
    if (smallest := gauge.of(best)) > limit:
        raise PlanError(
            f"{target} asks for at most {target.in_words(limit)} of {target.in_words(have)}, and the smallest that "
            f"{what} can reach here is {target.in_words(smallest)} ({_share(smallest, have)}). Ask for at least that. "
            f"{more}".rstrip()
        )
    between = (0, have), (most, smallest, best)
    found = first_that_meets(gauge, lambda amount: removal(model, family(amount), amount), *between)
    return replace(found, gauge=gauge)


def first_that_meets(
    gauge: Gauge, tried: Callable[[int], Removal], missed: tuple[int, float], met: tuple[int, float, Removal]
) -> Removal:
    """The first of a nested family of removals that meets a target.

    What is left falls about evenly, so that the next to be tried is where a line through what misses and what meets
    crosses the limit, and the middle where that does not halve what is between them.

    Args:
        gauge: tells what each leaves.
        tried: (amount) -> the removal.
        missed: an amount that misses the target, and what it leaves.
        met: a larger one that meets it, what it leaves, and what it removes.
    """
    (low, more), (high, less, best) = missed, met
    halve = False
    while high - low > 1:
        between, amount = high - low, (low + high) // 2
        if not halve and more > less:
            crossing = low + ceil(between * (Fraction(more) - gauge.limit) / (Fraction(more) - Fraction(less)))
            amount = min(max(crossing, low + 1), high - 1)
        found = tried(amount)
        left = gauge.of(found)
        if left <= gauge.limit:
            high, best, less = amount, found, left
        else:
            low, more = amount, left
        halve = 2 * (high - low) > between
    return best


def _fall(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before:.1%})"


def _milliseconds_fall(before: float, after: float) -> str:
    return f"{before:.4g} -> {in_milliseconds(after)} ({after / before:.1%})"


def _share(part: float, whole: float) -> str:
    """A share of four digits, rounded up: whoever asks for it gets no less."""
    return f"{ceil(Fraction(part) / Fraction(whole) * 10_000) / 10_000:.4f}"
