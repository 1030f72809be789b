"""What making something took: measured while it was made, not declared by who made it.

Measurements whose results were kept count as if they had been made again, so that samples, units and FLOPs don't go by
what was known; seconds are those that passed.
"""

from pydantic import Field

from auxin.settings import Settings


class Cost(Settings):
    """What looking at data and learning from it took."""

    samples: int = Field(default=0, ge=0)
    """Samples that were drawn: contexts of text, images; one that was drawn twice counts twice."""
    units: int = Field(default=0, ge=0)
    """Units of data in them; tokens of text also where an objective hides some."""
    unit: str = "token"
    """What `units` counts, in the singular."""
    flops: float = Field(default=0.0, ge=0)
    """FLOPs that are executed for it, forward and backward."""
    seconds: float = Field(default=0.0, ge=0)
    """Wall time that really passed: less where results were known."""
    data: str | None = None
    """Fingerprint of the data that the samples were drawn from."""
    text: str | None = None
    """Whose text the samples were of, in words, where that is known."""

    def __str__(self) -> str:
        drawn = f"{self.samples:,} samples, {self.units:,} {self.unit}s"
        of = "" if self.text is None else f"; the samples were of {self.text}"
        return f"{drawn}, {self.flops:.3g} FLOPs, {self.seconds:.1f} s{of}"
