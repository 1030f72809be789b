"""What came of a search, measured on samples that nothing had looked at."""

from auxin.accounting.statistics import Estimate
from auxin.settings import Settings


class Measured(Settings):
    """A model, measured on the held-out split."""

    title: str
    number: int | None = None
    """Of the trial; None: of the whole model."""
    size: float
    """What the target is given in."""
    parameters: int
    flops: float | None = None
    """Of a forward pass per `Outcome.flops_unit`; None where they can't be counted."""
    memory: int | None = None
    """Bytes of the weights and of the cache."""
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
    unit: str
    """What a budget is in, in the singular: a token, or what the data calls a sample."""
    flops_unit: str
    """What FLOPs are counted per, in the singular: a token, a frame, or what the data calls a sample."""
    seconds: float
    """That the trials took."""
    trials: int
    """How many there were."""
    alone: int
    """How many of them were one method at default settings that reached the target."""
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
        if self.single is None:
            if not self.alone:
                return "No method alone, at its default settings, reaches the target."
            return f"The best of {self.trials} ways is one method alone, at its default settings."
        name, gain = self.single.title, self.gain
        if gain is None:
            return f"Beside the best method alone, {name}, nothing can be said: losses are no finite numbers."
        told = f"by {abs(gain.mean):.4f} nats"
        if gain.half_width is None:
            return f"It differs from the best method alone, {name}, {told}; one sample does not say how sure that is."
        told = f"by {abs(gain.mean):.4f} ± {gain.half_width:.4f} nats, sample by sample"
        if gain.sign > 0:
            return f"It is better than the best method alone, {name}, {told}."
        if gain.sign < 0:
            return f"It is worse than the best method alone, {name}, {told}: searching has not paid."
        return f"It is no better than the best method alone, {name}: the two differ {told}."
