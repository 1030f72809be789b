"""What a run of several branches measured: the content of `results.json` and of the report."""

import math

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
    tokens: int
    flops: float
    seconds: float
    training_loss: float | None = None
    """Nats per token, mean over the steps since the last point."""
    validation_loss: float | None = None
    """Nats per token on the held-out split."""


class GrowthPoint(Settings):
    """One growth: where on the curve it lies and what it did to the loss."""

    stage: str
    tokens: int
    flops: float
    seconds: float
    parameters_before: int
    parameters_after: int
    loss_before: float | None = None
    """Held-out nats per token right before; None where it was not measured."""
    loss_after: float | None = None
    """Held-out nats per token right after."""
    promise: str
    """What the growth's plan promised: exact, approximate or none."""

    @property
    def change(self) -> float | None:
        """What the growth did to the held-out loss, in nats per token."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before


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
    tokens: int
    """Tokens of text that were trained on, also where some of them were hidden."""
    flops: float
    seconds: float
    validation_loss: float | None = None
    """Final held-out loss in nats per token."""
    perplexity: float | None = None
    """exp(validation_loss), infinite where that is too large for a number (JSON then has null)."""
    bits_per_byte: float | None = None
    """Held-out bits per UTF-8 byte of the text; None where only a part of it is predicted (span corruption)."""


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
    corpus: dict[str, str]
    """Source, fingerprint, sizes."""
    main_branch: str
    """The branch that the others are compared with."""
    branches: list[BranchResult]
