"""Answers in texts by hand: the likeliest span, and SQuAD's two measures by tokens (arXiv 1606.05250, section 6.1);
imports nothing of auxin."""

import math
from collections.abc import Sequence


def best_span(begins: Sequence[float], ends: Sequence[float], context: Sequence[int], longest: int) -> tuple[int, int]:
    """The first of the spans with the largest sum, which begin and end at places of the context and have at most so
    many tokens."""
    best, found = -math.inf, (-1, -1)
    for start in context:
        for end in context:
            if start <= end < start + longest and begins[start] + ends[end] > best:
                best, found = begins[start] + ends[end], (start, end)
    return found


def exact(found: Sequence[int], right: Sequence[int]) -> float:
    return 1.0 if list(found) == list(right) else 0.0


def f1(found: Sequence[int], right: Sequence[int]) -> float:
    """The harmonic mean of precision and recall of tokens, each of the right ones met once."""
    left, shared = list(right), 0
    for token in found:
        if token in left:
            left.remove(token)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(right)
    return 2 * precision * recall / (precision + recall)


def loss(begins: Sequence[float], ends: Sequence[float], start: int, end: int) -> float:
    """The mean of the cross-entropies of both ends, in nats."""
    return sum(math.log(sum(map(math.exp, of))) - of[place] for of, place in ((begins, start), (ends, end))) / 2
