"""What a run of several branches measured: the content of `results.json` and of the report."""

import math
from collections.abc import Mapping
from typing import Literal

from auxin.accounting.ledger import Ledger
from auxin.settings import Settings

_LARGEST_EXPONENT = 700
"""exp of a little more than this exceeds the largest float."""


def perplexity_of(nats: float) -> float:
    """exp of a loss in nats per token; infinite for the loss of a model that diverged."""
    return math.exp(nats) if nats < _LARGEST_EXPONENT else math.inf


class CurvePoint(Settings):
    """One measurement on the way; costs are cumulative and include those of all ancestors."""

    stage: str
    units: int
    """Of data, in the run's unit."""
    flops: float
    seconds: float
    training_loss: float | None = None
    """Nats per target of what the stage learns, mean over the steps since the last point."""
    value: float | None = None
    """The run's measure on held-out samples."""
    samples: int | None = None
    """On the first so many of the split; None: on all of it. Values on different samples lie on no line."""


class GrowthPoint(Settings):
    """One growth: where on the curve it lies and what it did to the run's measure."""

    stage: str
    units: int
    flops: float
    seconds: float
    parameters_before: int
    parameters_after: int
    value_before: float | None = None
    """The measure on the held-out split right before; None where it was not measured."""
    value_after: float | None = None
    """The same right after."""
    promise: str
    """What the growth's plan promised: exact, approximate or none."""

    @property
    def change(self) -> float | None:
        """What the growth did to the measure."""
        if self.value_before is None or self.value_after is None:
            return None
        return self.value_after - self.value_before


class BranchResult(Settings):
    """One branch: its costs, ancestors included, and what they bought."""

    name: str
    title: str
    parent: str | None = None
    """The branch it was forked from."""
    fork_stage: str | None = None
    """The stage of the parent after which it was forked."""
    ledger: Ledger
    curve: list[CurvePoint] = []
    growths: list[GrowthPoint] = []
    parameters: int
    """Tied ones once."""
    units: int
    """Units of data that were trained on; tokens of text also where some of them were hidden."""
    flops: float
    seconds: float
    value: float | None = None
    """The run's measure on the held-out split at the end."""
    measures: Mapping[str, float | None] = {}
    """All measures at the end, by kind; None where JSON has no number for one."""
    perplexity: float | None = None
    """exp of a loss in nats per token, infinite where that is too large for a number (JSON then has null)."""
    bits_per_byte: float | None = None
    """Held-out bits per UTF-8 byte of the text; None where the loss is not that of a whole text."""


class MeasureDescription(Settings):
    """What branches are compared by."""

    kind: str = "loss"
    """By which recipes call it."""
    name: str = "loss"
    """What tables call it."""
    unit: str = "nats/token"
    """Empty for a plain number."""
    better: Literal["lower", "higher"] = "lower"

    @property
    def unit_in_words(self) -> str:
        """ "nats per token"; empty for a plain number."""
        return self.unit.replace("/", " per ")

    @property
    def with_unit(self) -> str:
        """For an axis: "loss, nats per token"."""
        return ", ".join(part for part in (self.name, self.unit_in_words) if part)

    @property
    def per_token(self) -> bool:
        """Whether it is a loss of tokens, which has a perplexity."""
        return self.kind == "loss" and self.unit == "nats/token"

    def gain(self, difference: float) -> float:
        """`difference` of two values, positive where it is to the better."""
        return difference if self.better == "higher" else -difference


class RunResults(Settings):
    """All branches of one run, and what is needed to run it again."""

    name: str
    title: str
    description: str = ""
    command: str
    seed: int
    machine: dict[str, str]
    """Processor, cores, accelerator, memory."""
    versions: dict[str, str]
    unit: str = "token"
    """Of the data, in the singular."""
    measure: MeasureDescription = MeasureDescription()
    """What the branches are compared by."""
    other_measures: list[MeasureDescription] = []
    """What else was measured of them at the end."""
    data: dict[str, str]
    """Source, fingerprint, sizes."""
    main_branch: str
    """The branch that the others are compared with."""
    branches: list[BranchResult]
