"""Products near a matrix, and the ranks of several under a budget, told in other ways than the package's."""

from collections.abc import Sequence
from itertools import product

import numpy as np


def nearest(weight: np.ndarray, inputs: np.ndarray, rank: int, steps: int = 4000) -> np.ndarray:
    """The product of `rank` whose outputs for `inputs` (tokens, in) are nearest to those of `weight` (out, in): by
    alternating least squares, each factor the best for the other one, from a random start."""
    right = np.random.default_rng(0).standard_normal((rank, weight.shape[1]))
    wanted = inputs @ weight.T
    for _ in range(steps):
        read = inputs @ right.T
        left = np.linalg.lstsq(read, wanted, rcond=None)[0].T
        right = np.linalg.pinv(left) @ np.linalg.lstsq(inputs, wanted, rcond=None)[0].T
    return left @ right


def error(weight: np.ndarray, other: np.ndarray, inputs: np.ndarray) -> float:
    """The sum of squares by which outputs differ."""
    return float(((inputs @ (weight - other).T) ** 2).sum())


def least_loss(sizes: Sequence[tuple[int, int]], losses: Sequence[Sequence[float]], limit: int) -> float:
    """Of all ways to give matrices ranks, or to leave them whole, the least sum of losses with `limit` parameters at
    most.

    Args:
        sizes: (out, in) of each.
        losses: of each at the ranks 0, 1, 2, ...
        limit: on all parameters together.
    """
    choices = [
        [(o * i, 0.0), *((r * (o + i), loss[r]) for r in range(1, len(loss)))]
        for (o, i), loss in zip(sizes, losses, strict=True)
    ]
    sums = ((sum(size for size, _ in way), sum(loss for _, loss in way)) for way in product(*choices))
    return min(loss for size, loss in sums if size <= limit)
