"""Ranks of matrices that become products of two smaller ones, W (out, in) ~ A B: how much each rank keeps, and how
ranks are divided among layers when the model is to have a size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Ranks = dict[str, int]
"""The rank of each matrix, by its path; those that stay whole are not in it."""


@dataclass(frozen=True)
class Matrix:
    """A matrix, of which shapes are known."""

    inputs: int
    outputs: int

    @property
    def limit(self) -> int:
        """The break-even rank, with which a product has as many parameters, rounded down."""
        return self.inputs * self.outputs // (self.inputs + self.outputs)

    @property
    def most(self) -> int:
        """The largest rank whose product has fewer parameters."""
        return (self.inputs * self.outputs - 1) // (self.inputs + self.outputs)


def rounded(rank: int, multiple: int) -> int:
    """`rank`, rounded down to a multiple; 0 where there is none."""
    return rank // multiple * multiple


def rank_that_keeps(squares: Sequence[float], share: float, multiple: int = 1) -> int:
    """The least rank, a multiple, that keeps a share of a sum of squares.

    Args:
        squares: the squared singular values, the largest first.
        share: of their sum.
        multiple: of which ranks are.
    """
    kept = np.cumsum(squares)
    rank = int(np.searchsorted(kept, share * kept[-1] * (1 - 1e-12))) + 1
    return -(-rank // multiple) * multiple


@dataclass(frozen=True)
class Step:
    """A matrix gets a smaller rank."""

    path: str
    rank: int
    slope: float
    """What is lost per parameter that goes, or what else says when its turn is."""


def steps(matrices: Mapping[str, Matrix], squares: Mapping[str, Sequence[float]], multiple: int = 1) -> list[Step]:
    """The steps by which ranks become smaller, those that lose least per parameter first.

    What a matrix loses at rank r is the share of its sum of squares beyond r. The steps of one matrix are the corners
    of the lower convex hull of its losses over the parameters that go, from the whole matrix on, so that after every
    step no other ranks lose less in sum and are no larger in total (the usual argument of Lagrange's multiplier).

    Args:
        matrices: by path.
        squares: of each the squared singular values, the largest first; any number for zeros left out at the end.
        multiple: of which ranks are.
    """
    found = [step for path, matrix in matrices.items() for step in _hull(path, matrix, squares[path], multiple)]
    return sorted(found, key=lambda step: step.slope)


def steps_alike(matrices: Mapping[str, Matrix], multiple: int = 1) -> list[Step]:
    """Steps by which all matrices keep about the same share of their break-even rank, where nothing is known of them.

    Args:
        matrices: by path.
        multiple: of which ranks are.
    """
    found = [
        Step(path, rank, 1 - rank / matrix.most)
        for path, matrix in matrices.items()
        for rank in _ranks(matrix, multiple)
    ]
    return sorted(found, key=lambda step: step.slope)


def after(taken: Sequence[Step]) -> Ranks:
    """The ranks after some steps, taken in their order."""
    return {step.path: step.rank for step in taken}


def _hull(path: str, matrix: Matrix, squares: Sequence[float], multiple: int) -> list[Step]:
    values = np.asarray(squares, dtype=np.float64)
    total = values.sum()
    beyond = np.zeros(matrix.most + 1)
    if total > 0:
        tail = (total - np.cumsum(values)) / total
        beyond[: min(len(tail) + 1, len(beyond))] = np.concatenate([[1.0], tail])[: len(beyond)]
    points = [(0, 0.0, 0)]  # parameters that go, what is lost, rank; the whole matrix first
    for rank in _ranks(matrix, multiple):
        gone = matrix.inputs * matrix.outputs - rank * (matrix.inputs + matrix.outputs)
        point = gone, max(float(beyond[rank]), 0.0), rank
        while len(points) > 1 and _slope(points[-2], point) <= _slope(points[-2], points[-1]):
            points.pop()
        points.append(point)
    found, least = [], 0.0
    for old, new in pairwise(points):  # rounding may turn equal slopes around
        least = max(least, _slope(old, new))
        found.append(Step(path, new[2], least))
    return found


def _ranks(matrix: Matrix, multiple: int) -> list[int]:
    """Those that save parameters, the largest first; none where no multiple does."""
    return list(range(rounded(matrix.most, multiple), 0, -multiple))


def _slope(old: tuple[int, float, int], new: tuple[int, float, int]) -> float:
    return (new[1] - old[1]) / (new[0] - old[0])
