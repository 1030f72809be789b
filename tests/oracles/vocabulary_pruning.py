"""Vocabulary pruning, re-derived: three tokenizers by the book, each of which says all that it did, and the rows that
stay, number by number."""

from collections.abc import Mapping, Sequence
from itertools import product


def bpe(word: str, merges: Sequence[tuple[str, str]]) -> tuple[list[str], set[str]]:
    """The tokens of a word, and every token that it had on the way: join the pair of the first merge that fits
    anywhere, at its leftmost place, until none fits."""
    tokens, seen = list(word), set(word)
    while True:
        for left, right in merges:
            places = [place for place in range(len(tokens) - 1) if tokens[place : place + 2] == [left, right]]
            if places:
                tokens[places[0] : places[0] + 2] = [left + right]
                seen.add(left + right)
                break
        else:
            return tokens, seen


def parts(token: str, merges: Sequence[tuple[str, str]]) -> set[str]:
    """What has to stay with a token: all that it was on the way to itself."""
    tokens, seen = bpe(token, merges)
    return seen if tokens == [token] else {token}


def kept_merges(merges: Sequence[tuple[str, str]], kept: set[str]) -> list[tuple[str, str]]:
    """Those of which nothing is missing, in the old order."""
    return [(left, right) for left, right in merges if {left, right, left + right} <= kept]


def wordpiece(word: str, vocabulary: set[str]) -> list[str] | None:
    """The longest piece first, again and again; None for an unknown word."""
    pieces: list[str] = []
    while word:
        mark = "##" if pieces else ""
        length = next((length for length in range(len(word), 0, -1) if mark + word[:length] in vocabulary), None)
        if length is None:
            return None
        pieces.append(mark + word[:length])
        word = word[length:]
    return pieces


def unigram(word: str, scores: Mapping[str, float]) -> float | None:
    """The score of the likeliest split among all that there are; None where there is none."""
    best = None
    for cuts in product([False, True], repeat=len(word) - 1):
        pieces, current = [], word[0]
        for character, cut in zip(word[1:], cuts, strict=True):
            if cut:
                pieces.append(current)
                current = ""
            current += character
        pieces.append(current)
        if all(piece in scores for piece in pieces):
            score = sum(scores[piece] for piece in pieces)
            best = score if best is None else max(best, score)
    return best


def kept_rows(table: Sequence[Sequence[float]], kept: Sequence[int]) -> list[list[float]]:
    """Row i of the new table is row kept[i] of the old one; a row that a shorter table lacks is its first."""
    return [list(table[row]) if row < len(table) else list(table[0]) for row in kept]
