"""The batches of a stage, one at a time, and what keeps the next one from being read."""

from collections.abc import Iterator, Sized
from pathlib import Path

from torch import Tensor

from auxin.data.dataset import Dataset
from auxin.data.loader import make_loader
from auxin.errors import DataError
from auxin.training.settings import TrainingSettings


class Batches:
    """Batches of what is learnt, from a position on.

    Args:
        data: the data.
        settings: batch size, seed and reading processes.
        position: batch of the data order to begin with.

    Raises:
        DataError: what the first batch needs can't be read, of data that looks for it at once.
    """

    def __init__(self, data: Dataset, settings: TrainingSettings, position: int) -> None:
        self._split = data.split("train")
        loader = make_loader(self._split, settings.batch_size, settings.seed, position, settings.num_workers)
        self._walk: Iterator[dict[str, Tensor]] = iter(loader)
        self.batch: dict[str, Tensor] = {}
        """The one that was drawn last."""
        self.unread: DataError | None = None
        """Why it could not be read."""

    def draw(self) -> None:
        """Read the next batch."""
        try:
            self.batch = next(self._walk)
        except DataError as error:
            self.unread = error

    def close(self) -> None:
        """Let what reads or works ahead end: nothing more is drawn."""
        self._walk = iter(())
        if not isinstance(self._split, Sized):
            self._split.close()

    def refuse_unread(self, done: str, checkpoint: Path) -> None:
        """DataError where the batch could not be read.

        Args:
            done: how far the stage has come, in words.
            checkpoint: where that is saved.
        """
        if self.unread is not None:
            raise DataError(
                f"{self.unread} Training stopped {done}; that is saved in {checkpoint}. The same command goes on from "
                "there."
            ) from self.unread
