"""Products near a table, and how often its rows count, told in another way than the method's."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


def nearest(table: np.ndarray, weights: np.ndarray, rank: int, steps: int = 3000) -> np.ndarray:
    """The product of `rank` nearest to `table` (rows, columns), rows by `weights`: by alternating least squares, each
    factor the best for the other one, from a random start."""
    right = np.random.default_rng(0).standard_normal((rank, table.shape[1]))
    for _ in range(steps):
        left = table @ np.linalg.pinv(right)  # row by row, whatever the row's weight
        right = np.linalg.solve((left.T * weights) @ left, (left.T * weights) @ table)
    return left @ right


def error(table: np.ndarray, product: np.ndarray, weights: np.ndarray) -> float:
    """The sum of squares of what `product` misses, rows by `weights`."""
    return float((weights * ((table - product) ** 2).sum(1)).sum())


def counts(texts: Iterable[Sequence[int]], tokens: int) -> list[float]:
    """How often each of `tokens` comes, against the mean; those that never come share as many as came once, at least
    one."""
    found = Counter(token for text in texts for token in text)
    once, never = sum(1 for n in found.values() if n == 1), tokens - len(found)
    raw = [float(found[token]) if token in found else max(once, 1) / never for token in range(tokens)]
    return [count * tokens / sum(raw) for count in raw]
