"""Sequence-AltUp in plain Python: loops over tokens, written from the equations alone.

A sequence is a list of tokens; a token is a list of numbers. A layer L gets the tokens that it sees and where they are.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Token = list[float]
Layer = Callable[[list[Token], list[int]], list[Token]]


def anchor(i: int, k: int) -> int:
    """a(i) = k floor(i / k)."""
    return k * (i // k)


def strided(x: list[Token], layer: Layer, k: int, a1: float, a2: float, b: float) -> list[Token]:
    """Predict all tokens, compute every k-th, correct all by what the prediction of their anchor missed."""
    positions = [i for i in range(len(x)) if anchor(i, k) == i]
    computed = dict(zip(positions, layer([x[i] for i in positions], positions), strict=True))
    predicted = [[a1 * own + a2 * of for own, of in zip(x[i], x[anchor(i, k)], strict=True)] for i in range(len(x))]
    result = []
    for i in range(len(x)):
        a = anchor(i, k)
        missed = [made - thought for made, thought in zip(computed[a], predicted[a], strict=True)]
        result.append([thought + b * m for thought, m in zip(predicted[i], missed, strict=True)])
    return result


def skipping(x: list[Token], layer: Layer, k: int) -> list[Token]:
    """Stride-and-skip: the layer on every k-th token, the others as they were."""
    positions = list(range(0, len(x), k))
    computed = dict(zip(positions, layer([x[i] for i in positions], positions), strict=True))
    return [computed.get(i, x[i]) for i in range(len(x))]


def pooling(x: list[Token], layer: Layer, k: int, visible: Sequence[bool] | None = None) -> list[Token]:
    """Average pooling: the layer on the mean of k tokens, which all get the result; hidden tokens don't count."""
    means, positions = [], list(range(0, len(x), k))
    for start in positions:
        group = [i for i in range(start, min(start + k, len(x))) if visible is None or visible[i]]
        count = max(len(group), 1)
        means.append([math.fsum(x[i][e] for i in group) / count for e in range(len(x[0]))])
    computed = layer(means, positions)
    return [computed[i // k] for i in range(len(x))]


def allowed(
    queries: Sequence[int], keys: Sequence[int], visible: Sequence[Sequence[bool]], causal: bool
) -> list[list[list[list[bool]]]]:
    """Which query sees which key, (batch, 1, queries, keys); `visible` says for each sequence which tokens are some."""
    return [[[[seen[j] and (j <= i or not causal) for j in keys] for i in queries]] for seen in visible]


def of_batch(
    x: Tensor, layer: Callable[[Tensor, list[int]], Tensor], update: Callable[[list[Token], Layer], list[Token]]
) -> Tensor:
    """`update` on each sequence of a batch (batch, sequence, d), for a layer that computes the whole batch.

    The layer is called once: what it sees of the other sequences comes from a first pass without a result.
    """
    seen: list[list[Token]] = []
    where: list[int] = []

    def looking(tokens: list[Token], positions: list[int]) -> list[Token]:
        seen.append(tokens)
        where[:] = positions
        return tokens

    for sequence in x.tolist():
        update(sequence, looking)
    computed = layer(torch.tensor(seen, dtype=x.dtype), list(where)).tolist()
    results = [update(sequence, lambda _t, _p, row=row: computed[row]) for row, sequence in enumerate(x.tolist())]
    return torch.tensor(results, dtype=x.dtype)
