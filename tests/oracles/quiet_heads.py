"""Clipped softmax and gated attention (arXiv 2306.12929), once more from their equations, with lists of numbers."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def clipped(row: Sequence[float], gamma: float, zeta: float = 1.0) -> list[float]:
    """Equation 4 of a row of probabilities."""
    return [min(max((zeta - gamma) * value + gamma, 0.0), 1.0) for value in row]


def head(
    queries: Rows, keys: Rows, values: Rows, scale: float, visible: Sequence[Sequence[bool]], gamma: float
) -> list[list[float]]:
    """What a head with clipped weights reads, row by row."""
    found = []
    for query, seen in zip(queries, visible, strict=True):
        scores = [
            scale * sum(one * other for one, other in zip(query, key, strict=True)) if yes else -math.inf
            for key, yes in zip(keys, seen, strict=True)
        ]
        powers = [math.exp(score - max(scores)) for score in scores]
        weights = clipped([power / sum(powers) for power in powers], gamma)
        found.append(
            [
                sum(weight * value[entry] for weight, value in zip(weights, values, strict=True))
                for entry in range(len(values[0]))
            ]
        )
    return found


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def linear_gate(x: Sequence[float], weight: Sequence[float], bias: float) -> float:
    """Of one head and one token."""
    return sigmoid(sum(one * other for one, other in zip(x, weight, strict=True)) + bias)


def mlp_gate(
    x: Sequence[float], inner: Rows, inner_bias: Sequence[float], outer: Sequence[float], bias: float
) -> float:
    """So, too, with a layer of rectified units between."""
    units = [
        max(sum(one * other for one, other in zip(x, row, strict=True)) + offset, 0.0)
        for row, offset in zip(inner, inner_bias, strict=True)
    ]
    return linear_gate(units, outer, bias)
