"""Means and their uncertainty, of what was measured once per seed."""

import math
import statistics
from collections.abc import Sequence

from auxin.settings import Settings

CONFIDENCE = 0.95


class Spread(Settings):
    """One quantity, measured once for each seed."""

    values: list[float | None]
    """In the order of the seeds; None where it was not measured or is not finite."""
    mean: float | None = None
    """None where a value is missing: a mean over the seeds that went well would flatter."""
    half_width: float | None = None
    """Of the 95% confidence interval of the mean, by Student's t; None for a single value."""

    def __str__(self) -> str:
        return written(self)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero, so that the sign of the mean is no accident at this level."""
        return self.mean is not None and self.half_width is not None and abs(self.mean) > self.half_width


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and 95% interval of `values`, which are taken as independent and normal."""
    kept = [value if value is not None and math.isfinite(value) else None for value in values]
    known = [value for value in kept if value is not None]
    if not known or len(known) < len(kept):
        return Spread(values=kept)
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Spread(values=kept, mean=mean)
    from scipy.stats import t  # where it is used: it takes as long to import as many a command to run

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(known) - 1))
    return Spread(values=kept, mean=mean, half_width=quantile * statistics.stdev(known) / math.sqrt(len(known)))


def difference(one: Spread, other: Spread) -> Spread:
    """`one` minus `other`, seed by seed, so that what a seed does to both cancels."""
    return spread(
        [None if a is None or b is None else a - b for a, b in zip(one.values, other.values, strict=True)]
    )


def written(found: Spread, digits: int = 3, sign: bool = False) -> str:
    """ "1.234 ± 0.056"; the mean alone of a single value, and a dash where there is no mean."""
    if found.mean is None:
        return "-"
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if found.half_width is None else f"{mean} ± {found.half_width:.{digits}f}"
