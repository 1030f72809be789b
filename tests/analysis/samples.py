"""Samples to measure on."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tiny_models import inputs


class Samples:
    """Rows of inputs, as calibration data.

    Args:
        rows: inputs by name, samples along the first axis.
        batch_size: samples per batch.
        fingerprint: of the data.
    """

    def __init__(self, rows: dict[str, Tensor], batch_size: int = 2, fingerprint: str = "some") -> None:
        self.rows, self.batch_size, self.fingerprint = rows, batch_size, fingerprint
        self.samples = len(next(iter(rows.values())))
        self.passes = 0

    @classmethod
    def of(cls, model: Any, samples: int = 5, batch_size: int = 2, seed: int = 1) -> "Samples":
        """Random ones that `model` takes."""
        return cls(inputs(model, seed=seed, batch=samples), batch_size, f"random {samples} {seed}")

    def batches(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        for start in range(0, self.samples, self.batch_size):
            yield {name: rows[start : start + self.batch_size] for name, rows in self.rows.items()}
