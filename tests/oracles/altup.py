"""Alternating updates in plain float64 Python: loops over blocks, tokens and entries, written from the equations alone.

A stream is a list of K blocks; a block is a list of tokens; a token is a list of d numbers.
"""

import math
from collections.abc import Callable, Sequence

Token = list[float]
Block = list[Token]
Layer = Callable[[Block], Block]


def combination(factors: Sequence[float], blocks: Sequence[Block], token: int, entry: int) -> float:
    return math.fsum(factor * block[token][entry] for factor, block in zip(factors, blocks, strict=True))


def static_layer(
    streams: list[Block], layer: Layer, active: int, p: Sequence[Sequence[float]], g: Sequence[float]
) -> list[Block]:
    """Algorithm 1 of the paper: predict all blocks, compute one, correct all by what the prediction of that one missed.

    Args:
        streams: x^1 ... x^K.
        layer: L, on one block.
        active: j*, from 0.
        p: mixing, K rows of K.
        g: gains.
    """
    tokens, width = len(streams[0]), len(streams[0][0])
    predicted = [[[combination(row, streams, t, e) for e in range(width)] for t in range(tokens)] for row in p]
    computed = layer(streams[active])
    return [
        [
            [predicted[i][t][e] + g[i] * (computed[t][e] - predicted[active][t][e]) for e in range(width)]
            for t in range(tokens)
        ]
        for i in range(len(streams))
    ]


def modalities(token: Token, norm_gain: Sequence[float], router: Sequence[Sequence[float]], eps: float) -> list[float]:
    """m(x) = tanh(W_r (RMSNorm(x) / d)) of one token."""
    width = len(token)
    root = math.sqrt(math.fsum(value * value for value in token) / width + eps)
    normed = [gain * value / root / width for gain, value in zip(norm_gain, token, strict=True)]
    return [math.tanh(math.fsum(w * value for w, value in zip(row, normed, strict=True))) for row in router]


def dynamic_layer(
    streams: list[Block],
    layer: Layer,
    active: int,
    norm_gain: Sequence[float],
    router: Sequence[Sequence[float]],
    w_p: Sequence[Sequence[float]],
    w_c: Sequence[Sequence[float]],
    eps: float,
) -> list[Block]:
    """Gemma 3n's form: mixing and gains from each token, the layer on the predicted block.

    Args:
        streams, layer, active: as above.
        norm_gain, router, eps: of `modalities`.
        w_p: (K K, K); row i K + j gives C[i, j].
        w_c: (K, K).
    """
    count, tokens, width = len(streams), len(streams[0]), len(streams[0][0])
    predicted: list[Block] = [[] for _ in streams]
    for t in range(tokens):
        m = modalities(streams[active][t], norm_gain, router, eps)
        flat = [math.fsum(w * value for w, value in zip(row, m, strict=True)) for row in w_p]
        for i in range(count):
            mixed = [combination(flat[i * count : (i + 1) * count], streams, t, e) for e in range(width)]
            predicted[i].append([streams[i][t][e] + mixed[e] for e in range(width)])
    computed = layer(predicted[active])
    result: list[Block] = [[] for _ in streams]
    for t in range(tokens):
        m = modalities(computed[t], norm_gain, router, eps)
        gains = [1 + math.fsum(w * value for w, value in zip(row, m, strict=True)) for row in w_c]
        for i in range(count):
            missed = [computed[t][e] - predicted[active][t][e] for e in range(width)]
            result[i].append([predicted[i][t][e] + gains[i] * missed[e] for e in range(width)])
    return result


def mean_of_blocks(streams: list[Block]) -> Block:
    tokens, width = len(streams[0]), len(streams[0][0])
    return [[math.fsum(block[t][e] for block in streams) / len(streams) for e in range(width)] for t in range(tokens)]
