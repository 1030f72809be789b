"""AxFormer's search and its attention, once more, from the paper's algorithm and with lists of numbers alone."""

import math
from collections.abc import Callable, Sequence

Losses = Callable[[Sequence[str]], list[float]]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def hard_attention(
    queries: Sequence[Sequence[float]],
    keys: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    scale: float,
    visible: Sequence[Sequence[bool]],
    keep: int,
) -> list[list[float]]:
    """What each query of one head reads: row by row, the probabilities sorted, all but the largest left out."""
    found = []
    for query, row in zip(queries, visible, strict=True):
        seen = [number for number, yes in enumerate(row) if yes]
        powers = {
            number: math.exp(scale * sum(one * other for one, other in zip(query, keys[number], strict=True)))
            for number in seen
        }
        total = sum(powers.values())
        largest = sorted(seen, key=lambda number: powers[number], reverse=True)[:keep]
        width = range(len(values[0]))
        found.append([sum(powers[number] / total * values[number][entry] for number in largest) for entry in width])
    return found


def search(
    parts: Sequence[tuple[str, Sequence[str]]],
    losses: Losses,
    tolerance: float,
    votes: int,
    attentions: Sequence[str] = (),
) -> tuple[list[str], list[tuple[str, bool]]]:
    """What changes, and everything that was tried, with whether it was kept.

    Args:
        parts: blocks with the elements that they are made of, in the order in which they are tried.
        losses: (what is gone) -> the loss of every sample.
        tolerance: how much a block's removal may cost for its elements to be tried.
        votes: more samples than this must be no worse off than at first.
        attentions: those that are tried as hard ones before anything else, in that order.
    """
    original = losses([])
    gone: list[str] = []
    log: list[tuple[str, bool]] = []

    def accept(element: str) -> bool:
        new, best = losses([*gone, element]), mean(losses(gone))
        better = len([1 for one, other in zip(new, original, strict=True) if not one > other])
        return mean(new) < best and better > votes

    for attention in attentions:
        log.append((attention, accept(attention)))
        gone += [attention] if log[-1][1] else []
    for block, elements in parts:
        if accept(block):
            gone.append(block)
            log.append((block, True))
            continue
        log.append((block, False))
        if mean(losses([*gone, block])) >= tolerance * mean(losses(gone)):
            continue
        left = len(elements)
        for element in elements:
            if left == 1:
                break
            yes = accept(element)
            log.append((element, yes))
            if yes:
                gone.append(element)
                left -= 1
    return gone, log
