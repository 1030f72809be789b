"""Linformer's attention once more, of one head, from the paper's equation 7 and with lists of numbers alone."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def product(left: Rows, right: Rows) -> list[list[float]]:
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*right, strict=True)]
            for row in left]  # fmt: skip


def head(queries: Rows, keys: Rows, values: Rows, to_keys: Rows, to_values: Rows, visible: Sequence[bool]) -> Rows:
    """softmax(Q (E K)^T / sqrt(d)) (F V), of tokens of which some are padding: E and F lose the columns of these."""
    there = [place for place, yes in enumerate(visible) if yes]

    def of_those(rows: Rows, matrix: Rows) -> list[list[float]]:
        return product([[row[place] for place in there] for row in matrix], [rows[place] for place in there])

    mixed_keys, mixed_values = of_those(keys, to_keys), of_those(values, to_values)
    found = []
    for query in queries:
        scores = [math.exp(sum(q * k for q, k in zip(query, key, strict=True)) / len(query) ** 0.5)
                  for key in mixed_keys]  # fmt: skip
        found += product([[score / sum(scores) for score in scores]], mixed_values)
    return found
