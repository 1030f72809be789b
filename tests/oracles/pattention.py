"""Pattention in plain float64 Python: loops over rows, groups and tokens, written from the paper's equations alone."""

import math
from collections.abc import Sequence

import numpy as np


def gelu(value: float, kind: str) -> float:
    if kind == "erf":
        return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def gelu_slope(value: float) -> float:
    """Derivative of the exact GELU: Phi(z) + z phi(z)."""
    return 0.5 * (1 + math.erf(value / math.sqrt(2))) + value * math.exp(-(value**2) / 2) / math.sqrt(2 * math.pi)


def normalised(values: Sequence[float], tau: float, eps: float) -> list[float]:
    norm = math.sqrt(math.fsum(value * value for value in values))
    return [tau * value / (norm + eps) for value in values]


def weights(scores: Sequence[float], tau: float, score_function: str, kind: str, eps: float) -> list[float]:
    """Theta of one row of one group."""
    if score_function == "softmax":
        exponentials = [math.exp(value - max(scores)) for value in scores]
        return [tau**2 * value / math.fsum(exponentials) for value in exponentials]
    if score_function == "linear":
        return list(scores)
    if score_function == "gelu":
        return [gelu(value, kind) for value in scores]
    if score_function == "gelu_l2_norm":
        return normalised([gelu(value, kind) for value in scores], tau, eps)
    return [gelu(value, kind) for value in normalised(scores, tau, eps)]


def pattention(
    x: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tau: Sequence[float],
    group_sizes: Sequence[int],
    score_function: str = "l2_norm_gelu",
    kind: str = "erf",
    eps: float = 1e-6,
) -> np.ndarray:
    """x (rows, in), keys (n, in), values (n, out) -> (rows, out)."""
    output = np.zeros((len(x), values.shape[1]))
    for row, vector in enumerate(x.astype(np.float64)):
        first = 0
        for size, scale in zip(group_sizes, tau, strict=True):
            tokens = range(first, first + size)
            scores = [math.fsum(float(a) * float(b) for a, b in zip(vector, keys[t], strict=True)) for t in tokens]
            for token, weight in zip(tokens, weights(scores, scale, score_function, kind, eps), strict=True):
                output[row] += weight * values[token].astype(np.float64)
            first += size
    return output


def score_jacobian(scores: Sequence[float]) -> np.ndarray:
    """dS_i/dA_j of the published layer (eq. 25): f'(Z_i) (n delta_ij - Z_i Z_j) / (sqrt(n) ||A||)."""
    n = len(scores)
    norm = math.sqrt(math.fsum(value * value for value in scores))
    z = [math.sqrt(n) * value / norm for value in scores]
    return np.array(
        [[gelu_slope(z[i]) * (n * (i == j) - z[i] * z[j]) / (math.sqrt(n) * norm) for j in range(n)] for i in range(n)]
    )
