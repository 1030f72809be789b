"""Span corruption by hand, token by token, and the counts of T5's published description; imports nothing of auxin."""

import math
from itertools import combinations


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and spans of a context: shares of the length, rounded, at least one of each."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, max(round(noise / mean_span), 1)


def corrupted(tokens: list[int], mask: list[bool], first_sentinel: int, end: int) -> tuple[list[int], list[int]]:
    """Inputs and targets of one context, whose noise is where `mask` is true."""
    inputs: list[int] = []
    targets: list[int] = []
    sentinel = first_sentinel - 1
    for position, (token, noise) in enumerate(zip(tokens, mask, strict=True)):
        if noise and (position == 0 or not mask[position - 1]):
            sentinel += 1
            inputs.append(sentinel)
            targets.append(sentinel)
        (targets if noise else inputs).append(token)
    return inputs, [*targets, end]


def restored(inputs: list[int], targets: list[int], first_sentinel: int, end: int) -> list[int]:
    """The context that inputs and targets were made of."""
    assert targets[-1] == end
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= first_sentinel:
            spans[token] = span = []
        else:
            span.append(token)
    return [token for i in inputs for token in (spans[i] if i >= first_sentinel else [i])]


def number_of_masks(kept: int, noise: int, spans: int) -> int:
    """Ways to cut both into that many parts of at least one."""
    return math.comb(kept - 1, spans - 1) * math.comb(noise - 1, spans - 1)


def all_masks(kept: int, noise: int, spans: int) -> set[tuple[bool, ...]]:
    """Every mask of alternating runs that begins with kept tokens and ends with noise."""

    def parts(items: int) -> list[list[int]]:
        found = []
        for cuts in combinations(range(1, items), spans - 1):
            edges = [0, *cuts, items]
            found.append([edges[i + 1] - edges[i] for i in range(spans)])
        return found

    return {
        tuple(value for k, n in zip(ks, ns, strict=True) for value in [False] * k + [True] * n)
        for ks in parts(kept)
        for ns in parts(noise)
    }
