"""What `make test` takes of the product of methods and architectures; `make test-all` (pytest --all) takes all of it.

That a plan is made and applied, keeps its promise and does what its method is for takes a twentieth of a second, so
every pair is tried every time, but that methods which look at data, and run the model for it, or which prune units take
turns on the further architectures. What costs more (training, writing, adapters, loading in another process) is tried
on a subset with every method, every architecture, and every pair that runs code of its own: each method on the
`DISTINCT` architectures, the others in turn, and the pairs in `OWN`. The rest has the mark `whole`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

DISTINCT = ("llama", "gpt2", "t5", "tokenformer")
"""One architecture of each kind: separate projections, fused and transposed ones, encoder and decoder, tokens."""
OWN = {
    ("altup", "bert"),  # an embedding with more tables than that of the words
    ("fluctuation", "qwen3"),  # a switch of the config that gives biases to linear layers
    ("bert2bert", "olmo2"),  # gains over all heads together
    ("ligo", "gpt_neox"),  # projections fused head by head
    ("llama-pro", "bert"),  # norms after the sum
    ("masked", "bert"),  # linear layers whose input alone is masked
    ("masked", "olmo"),  # norms without gains
    ("sequence-altup", "vit"),  # a cap on the stride where the length is known
}
"""Pairs of method and architecture that run lines that no other pair of the subset runs; `test_every_method.py` checks
with --all that none is missing."""

whole = pytest.mark.whole


def covers(rows: Sequence[Any], row: Any, families: Sequence[str], family: str) -> bool:
    """Whether the subset has `row` (a method, or a case of one) on `family`."""
    if family in DISTINCT or (row, family) in OWN:
        return True
    others = [other for other in families if other not in DISTINCT]
    # Whichever there are more of, each is there once at least.
    return rows.index(row) % len(others) == others.index(family) % len(rows)


def pairs(rows: Sequence[Any], families: Sequence[str]) -> list[Any]:
    """Parameters (row, family) of the whole product, those outside the subset marked."""
    return [
        pytest.param(row, family, marks=() if covers(rows, row, families, family) else whole)
        for row in rows
        for family in families
    ]


def families(found: Iterable[str], *own: str) -> list[Any]:
    """Parameters for a test of one method: `DISTINCT` and those that it has code for (`own`); all others with --all."""
    return [pytest.param(family, marks=() if family in (*DISTINCT, *own) else whole, id=family) for family in found]
