"""Vocabulary growth, re-derived: byte-pair encoding by the book, and the rows of new tokens number by number."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise


def apply_merges(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Join neighbours within one word: always the pair that comes first in `merges`, the leftmost of them first."""
    word = list(tokens)
    rank = {pair: number for number, pair in reversed(list(enumerate(merges)))}
    while True:
        pairs = [(rank[pair], place) for place, pair in enumerate(pairwise(word)) if pair in rank]
        if not pairs:
            return word
        _, place = min(pairs)
        word[place : place + 2] = ["".join(word[place : place + 2])]


def pair_counts(words: Sequence[Sequence[str]]) -> Counter[tuple[str, str]]:
    """How often two tokens are neighbours within a word; a run of n equal ones gives n - 1 pairs."""
    counts: Counter[tuple[str, str]] = Counter()
    for word in words:
        counts.update(pairwise(word))
    return counts


def new_rows(
    table: Sequence[Sequence[float]], first: int, pieces: Sequence[Sequence[int]], rule: str
) -> list[list[float]]:
    """The rows of new tokens out of an old table (rows, width), of which the first `first` hold tokens."""
    rows = []
    for old in pieces:
        chosen = list(old) if rule == "pieces" and old else list(range(first))
        rows.append([sum(table[row][column] for row in chosen) / len(chosen) for column in range(len(table[0]))])
    return rows


def table_length(length: int, first: int, count: int, multiple: int | None) -> int:
    """Rows of the table afterwards: as many as there are, or the next multiple that holds all tokens."""
    if multiple is None:
        multiple = next(power for power in (128, 64, 32, 16, 8, 4, 2, 1) if length % power == 0)
    new = length
    while new < first + count or (new > length and new % multiple):
        new += 1
    return new
