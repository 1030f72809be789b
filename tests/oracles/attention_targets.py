"""Shares of attention by target, by loops over queries and keys: for a single sample without padding, in NumPy."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def target(query: int, key: int, ids: list[int], special: set[int], across: bool) -> str:
    """What `key` is to `query`."""
    if ids and ids[key] in special:
        return "special"
    if key == 0:
        return "first"
    if not across and key == query:
        return "current"
    if not across and key == query - 1:
        return "previous"
    return "other"


def shares(weights: Array, ids: list[int], special: set[int], across: bool) -> dict[str, float]:
    """By target the mean over queries of one head's weights, (queries, keys); `ids` are the keys', or empty."""
    found = dict.fromkeys(("special", "first", "other") if across else TARGETS, 0.0)
    for query, row in enumerate(weights):
        for key, weight in enumerate(row):
            found[target(query, key, ids, special, across)] += weight / len(weights)
    return found


def counted(seen: list[list[int]], ids: list[int], special: set[int], across: bool) -> dict[str, float]:
    """The same where each query sees the listed keys and attends to them alike."""
    found = dict.fromkeys(("special", "first", "other") if across else TARGETS, 0.0)
    for query, keys in enumerate(seen):
        for key in keys:
            found[target(query, key, ids, special, across)] += 1 / len(keys) / len(seen)
    return found


def entropy(weights: Array, seen: list[list[int]]) -> float:
    """Of one head's weights relative to that of uniform attention, the mean over queries that see several keys."""
    relative = []
    for row, keys in zip(weights, seen, strict=True):
        if len(keys) > 1:
            found = -sum(row[key] * math.log(row[key]) for key in keys if row[key] > 0)
            relative.append(found / math.log(len(keys)))
    return float(np.mean(relative)) if relative else 1.0


TARGETS = ("special", "first", "current", "previous", "other")


def apart(weights: Array, seen: list[list[int]]) -> float:
    """The mean over queries that read several tokens of the log of the largest weight over the least; 0 without any."""
    found = []
    for query, tokens in enumerate(seen):
        read = [float(weights[query, token]) for token in tokens if weights[query, token] > 0]
        if len(read) > 1:
            found.append(math.log(max(read)) - math.log(min(read)))
    return sum(found) / len(found) if found else 0.0


def silent(weights: Array) -> float:
    """The share of queries whose weights are less than a thousandth together."""
    return sum(float(sum(row)) < 1e-3 for row in weights) / len(weights)
