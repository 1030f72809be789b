"""Sizes of activations by Minitron's equations, one number after the other in NumPy: of units with some entries at all
tokens of all samples."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def one_of(numbers: Sequence[float], how: str) -> float:
    """mean(abs), L2 (as the root of a mean) or variance of some numbers."""
    if how == "mean":
        return sum(abs(number) for number in numbers) / len(numbers)
    if how == "l2":
        return math.sqrt(sum(number**2 for number in numbers) / len(numbers))
    middle = sum(numbers) / len(numbers)
    return sum((number - middle) ** 2 for number in numbers) / len(numbers)


def scores(samples: Sequence[Array], entries: int, over_tokens: str, over_samples: str) -> Array:
    """Of every unit of `entries` entries.

    Args:
        samples: (tokens, entries of all units) each; they may have different numbers of tokens.
        entries: of a unit.
        over_tokens, over_samples: how its numbers become one.
    """

    def at(token: Array, unit: int) -> float:
        own = [float(entry) for entry in token[unit * entries : (unit + 1) * entries]]
        return own[0] if entries == 1 else math.sqrt(sum(entry**2 for entry in own))

    return np.array(
        [
            one_of([one_of([at(token, unit) for token in sample], over_tokens) for sample in samples], over_samples)
            for unit in range(samples[0].shape[1] // entries)
        ]
    )


def rms_norm(hidden: Array, gain: Array, epsilon: float) -> Array:
    """(..., width) -> (..., width)."""
    return np.asarray(hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + epsilon) * gain)


def layer_norm(hidden: Array, gain: Array, offset: Array, epsilon: float) -> Array:
    """(..., width) -> (..., width)."""
    centred = hidden - hidden.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gain + offset)
