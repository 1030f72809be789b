"""What came of a search, measured on samples that nothing had looked at."""

from auxin.accounting.statistics import Estimate
from auxin.settings import Settings


class Measured(Settings):
    """A model, measured on the held-out split."""

    title: str
    number: int | None = None
    """Of the trial; None: of the whole model."""
    parameters: int
    flops: float | None = None
    memory: int | None = None
    before: float | None = None
    """Its loss before it was mended; None where nothing was to be mended."""
    loss: float
    """Its loss at the end."""
    losses: list[float]
    """The mean loss of each held-out sample at the end."""


class Outcome(Settings):
    """What came of a search."""

    target: str
    """What a loss is a mean over, in the singular."""
    seconds: float
    """That the trials took."""
    whole: Measured
    chosen: Measured
    single: Measured | None = None
    """The best method alone at its default settings, mended alike; None where that is the chosen one, or none could
    reach the target."""

    @property
    def gain(self) -> Estimate | None:
        """Loss of the best single method minus that of the chosen way, over held-out samples; None without one."""
        if self.single is None:
            return None
        return Estimate.of(one - other for one, other in zip(self.single.losses, self.chosen.losses, strict=True))

    @property
    def verdict(self) -> str:
        """Whether searching was worth it, in a sentence."""
        gain = self.gain
        if gain is None:
            return "The best way that was found is one method alone, at its default settings."
        told = f"by {abs(gain.mean):.4f} ± {gain.half_width or 0:.4f} nats, sample by sample"
        assert self.single is not None
        if gain.sign > 0:
            return f"It is better than the best method alone, {self.single.title}, {told}."
        if gain.sign < 0:
            return f"It is worse than the best method alone, {self.single.title}, {told}: searching has not paid."
        return f"It is no better than the best method alone, {self.single.title}: the two differ {told}."
