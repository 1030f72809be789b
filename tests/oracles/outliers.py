"""What a tensor's outliers are, entry by entry: for a single sample, in plain Python and NumPy."""

import statistics
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def outliers(x: NDArray[np.float64], deviations: float) -> tuple[float, float, float, float, set[int]]:
    """Infinity norm, peak, kurtosis, share beyond and the columns that have an entry beyond, of (tokens, width)."""
    entries = [float(entry) for entry in x.flat]
    mean, deviation = statistics.fmean(entries), statistics.stdev(entries)
    norm = max(abs(entry) for entry in entries)
    kurtosis = statistics.fmean(((entry - mean) / deviation) ** 4 for entry in entries)
    apart = np.abs(x - mean) > deviations * deviation
    return norm, norm / deviation, kurtosis, float(apart.sum()) / len(entries), set(np.nonzero(apart)[1].tolist())


def frequent(samples: Iterable[set[int]], share: float) -> dict[int, float]:
    """The columns that are in more than that share of the sets, with theirs."""
    sets = list(samples)
    shares = {column: sum(column in one for one in sets) / len(sets) for column in set().union(*sets)}
    return {column: found for column, found in shares.items() if found > share}
