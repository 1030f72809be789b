"""How small a model shall be, and the least removal that gets there, told from shapes alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from auxin.accounting import count_parameters, flops_per_token
from auxin.accounting.inputs import counted_length, unit_of_cost
from auxin.edits.resolution import resolve
from auxin.errors import ConfigError, PlanError
from auxin.settings import Settings

LONGEST = 1024
"""Tokens at which FLOPs are counted at most where nothing else is said, as in the tables of plans."""


class Target(Settings):
    """The size that a model is to have at most; give exactly one of `parameters` and `flops`.

    Below 1 it is the share of the model's that stays (0.7: 70 %), otherwise the number itself.
    """

    parameters: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """All parameters, tied ones once."""
    flops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """FLOPs per token of a forward pass; per sample of a model whose inputs are more than tokens."""
    sequence_length: int | None = Field(default=None, gt=0)
    """Tokens of the sequence in which FLOPs are counted; None: the model's context length, at most 1024."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("parameters", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of parameters and flops, not {' and '.join(given) or 'none of them'}.")
        if self.asked == 1 or (self.asked > 1 and self.asked != int(self.asked)):
            raise ValueError(
                f"{given[0]} = {self.asked:g} is neither a share below 1 nor a whole number. Give the share that stays "
                "(0.7), or how many."
            )
        if self.sequence_length is not None and self.flops is None:
            raise ValueError("sequence_length says at which length flops are counted, and flops are not given.")
        return self

    @property
    def asked(self) -> float:
        """The share or number that was given."""
        value = self.parameters if self.parameters is not None else self.flops
        assert value is not None
        return value

    @property
    def name(self) -> str:
        """The field that was given."""
        return "parameters" if self.parameters is not None else "flops"

    def of(self, model: PreTrainedModel) -> float:
        """What of `model` is to become smaller.

        Raises:
            ConfigError, PlanError: its FLOPs can't be counted.
        """
        if self.parameters is not None:
            return count_parameters(model).total
        return flops_per_token(model, self.sequence_length or counted_length(model, LONGEST)).forward

    def limit(self, have: float) -> Fraction:
        """What a model of which `of` is `have` may have left, exactly."""
        asked = Fraction(str(self.asked))  # 0.57 of 100 is 57
        return asked * Fraction(have) if asked < 1 else asked

    def __str__(self) -> str:
        at = f" at {self.sequence_length} tokens" if self.sequence_length is not None else ""
        return f"target.{self.name} = {self.asked if self.asked < 1 else format(int(self.asked), ',')}{at}"


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

    def reached(self, target: Target | None = None) -> str:
        """What the edits come to, for the notes of a plan: parameters and, where they can be counted, FLOPs, before
        and after.

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
        asked = f"; asked for: {target}" if target is not None else ""
        return ", ".join(told) + asked + "."


def removal(model: PreTrainedModel, edits: Sequence[Any], amount: int | None = None) -> Removal:
    """What `edits` come to; weights are not looked at.

    Raises:
        PlanError: they don't fit.
    """
    resolved = resolve(edits, model)
    return Removal(edits, resolved.before, resolved.after, amount)


def least_removal(
    model: PreTrainedModel, target: Target, family: Callable[[int], Sequence[Any]], most: int, what: str = "this method"
) -> Removal:
    """The first of a nested family of plans that meets a target: the one before it misses it.

    Args:
        model: the model, on any device; weights are not looked at.
        target: how small it shall be.
        family: (amount) -> the edits that remove so much, for amounts from 1 to `most`; more is never larger.
        most: the largest amount that there is; 0: nothing can go.
        what: what removes, for messages.

    Raises:
        PlanError: the model is no larger than the target already, the target lies below what the largest amount
            leaves, or edits do not fit.
    """
    have = target.of(model)
    limit = target.limit(have)
    if have <= limit:
        raise PlanError(
            f"{target}: the model has {_number(have)} already, so that nothing has to go. Ask for less, or for a "
            "share below 1."
        )
    if most < 1:
        raise PlanError(f"{target}: there is nothing in this model that {what} could remove.")
    best = removal(model, family(most), most)
    if (smallest := target.of(best.after)) > limit:
        raise PlanError(
            f"{target} asks for at most {_number(limit)} of {_number(have)}, and the smallest that {what} can reach "
            f"here is {_number(smallest)} ({_share(smallest, have)}). Ask for at least that."
        )
    missed = 0
    while best.amount is not None and best.amount - missed > 1:
        amount = (missed + best.amount) // 2
        tried = removal(model, family(amount), amount)
        if target.of(tried.after) <= limit:
            best = tried
        else:
            missed = amount
    return best


def _fall(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before:.1%})"


def _number(value: float | Fraction) -> str:
    """A number without what is behind the point."""
    return f"{int(value):,}"


def _share(part: float, whole: float) -> str:
    """A share of four digits, rounded up: whoever asks for it gets no less."""
    return f"{ceil(Fraction(part) / Fraction(whole) * 10_000) / 10_000:.4f}"
