"""Writing the checkpoints of a stage's run.

A model that lies in pieces is written so: each process copies what it holds and writes that in the background, while
training goes on. When all are done the leader gives the checkpoint its name. The last one of a stage is made whole,
since others read it.
"""

import contextlib
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from auxin.accounting.ledger import Ledger
from auxin.data.dataset import Processor
from auxin.edits.saved import save_configs
from auxin.edits.tensor_names import tensor_names
from auxin.models.pieces import FAILURES, Piece, own_piece, write_pieces
from auxin.models.weight_files import PIECES
from auxin.sums import sum_of
from auxin.training.checkpoint import WEIGHT, new_checkpoint, not_saved, write_beside_weights, write_checkpoint_folder
from auxin.training.keeper import Keeper
from auxin.training.optimizer import optimizer_tensors
from auxin.training.state import TrainingState
from auxin.training.strategies import Copies
from auxin.training.whole import make_whole


@dataclass
class _Writing:
    """A checkpoint in pieces while it is written."""

    checkpoint: Path
    rewind_step: int
    is_last: bool
    folder: Path
    """What is written, before it takes its name."""
    written: Future[tuple[str, str]]
    """The file of this process, by its path in the folder, and its sum."""


class Saver:
    """Writes checkpoints into a run's folder.

    Args:
        keeper: the folder.
        strategy: how the model lies in the processes, which call everything here together.
        processor: saved with each checkpoint.
    """

    def __init__(self, keeper: Keeper, strategy: Copies, processor: Processor | None) -> None:
        self._keeper, self._strategy, self._processor = keeper, strategy, processor
        self._ranks = strategy.ranks
        self._writing: _Writing | None = None
        self._opened = contextlib.ExitStack()
        """In the leader: the folder that is being written."""
        self._sums: dict[str, str] = {}
        self._threads = ThreadPoolExecutor(1, "saving")

    def save(self, state: TrainingState, books: Ledger, values: Mapping[str, Any], is_last: bool) -> Path:
        """Save the state; of a model in pieces all but the last checkpoint are written while training goes on.

        Args:
            state: what to save.
            books: the ledger.
            values: the JSON part of the training state.
            is_last: whether the stage ends with it.

        Returns:
            The checkpoint; it is there at once, or when `settle` has been called.

        Raises:
            CheckpointError: it could not be written, or the one before could not.
        """
        self.settle()
        checkpoint = self._keeper.checkpoint(state.step)
        if self._strategy.skeleton is None:
            self._ranks.told(lambda: self._save(checkpoint, state, books, values))
            return checkpoint
        skeleton = self._strategy.skeleton
        folder = Path(self._ranks.told(lambda: self._open(checkpoint, skeleton, state, books, values)))
        # Copied here: the next step changes them.
        pieces = self._pieces(state)
        written = self._threads.submit(self._write, folder, pieces)
        self._writing = _Writing(checkpoint, state.rewind_step, is_last, folder, written)
        if is_last:
            self.settle()
        return checkpoint

    def look(self) -> None:
        """Between two steps: give what all have written meanwhile its name."""
        if self._writing is not None and not self._ranks.any(not self._writing.written.done()):
            self.settle()

    def settle(self) -> None:
        """Wait until what is being written is there under its name.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            with self._ranks.together():
                try:
                    own = writing.written.result()
                except (Exception, *FAILURES) as error:  # of whatever kind: the others wait for this process
                    raise not_saved(writing.checkpoint, error) from error
            self._sums |= dict(self._ranks.each(own))
            self._ranks.told(lambda: self._name(writing))
        except BaseException as error:
            self._opened.__exit__(type(error), error, error.__traceback__)
            raise

    def close(self) -> None:
        """At the end, also one by an error: what is not whole by then vanishes."""
        self._threads.shutdown()
        self._writing = None
        with contextlib.suppress(_NeverFinished), self._opened:
            raise _NeverFinished

    def _save(self, checkpoint: Path, state: TrainingState, books: Ledger, values: Mapping[str, Any]) -> None:
        self._keeper.announce(checkpoint)
        write_checkpoint_folder(
            checkpoint, state.model, processor=self._processor, ledger=books, tensors=state.tensors(), state=values
        )
        self._keeper.name(checkpoint, state.rewind_step)

    def _open(
        self,
        checkpoint: Path,
        skeleton: PreTrainedModel,
        state: TrainingState,
        books: Ledger,
        values: Mapping[str, Any],
    ) -> str:
        """Begin a checkpoint in pieces, with what the leader has to write; its folder."""
        self._keeper.announce(checkpoint)
        self._sums = {}
        folder = self._opened.enter_context(new_checkpoint(checkpoint, self._sums))
        try:
            save_configs(skeleton, folder)
            write_beside_weights(folder, self._processor, books, state.random_tensors(), values)
            (folder / PIECES).mkdir()
        except FAILURES as error:
            self._opened.__exit__(type(error), error, error.__traceback__)
            raise not_saved(checkpoint, error) from error
        return str(folder)

    def _pieces(self, state: TrainingState) -> dict[str, Piece]:
        model = state.model
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        stored = {WEIGHT + name: tensors[name] for name in tensor_names(model)}
        stored |= optimizer_tensors(model, state.optimizer)
        found = {name: own_piece(tensor, self._ranks.leads) for name, tensor in stored.items()}
        return {name: piece for name, piece in found.items() if piece is not None}

    def _write(self, folder: Path, pieces: Mapping[str, Piece]) -> tuple[str, str]:
        path = write_pieces(folder, self._ranks.rank, self._ranks.size, pieces)
        return path.relative_to(folder).as_posix(), sum_of(path)

    def _name(self, writing: _Writing) -> None:
        """As the leader: give a checkpoint that all have written its name."""
        if writing.is_last:
            assert self._strategy.skeleton is not None
            try:
                make_whole(writing.folder, writing.folder, self._strategy.skeleton)
                shutil.rmtree(writing.folder / PIECES)
            except FAILURES as error:
                raise not_saved(writing.checkpoint, error) from error
        self._opened.close()
        self._keeper.name(writing.checkpoint, writing.rewind_step)


class _NeverFinished(Exception):
    """The run ends before a checkpoint is written."""
