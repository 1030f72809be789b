"""A run's folder while a stage is trained into it: what to go on from, checkpoints, metrics.

Of several processes the leader alone writes; what it finds there all of them learn.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auxin.training.checkpoint import read_state, refuse_damaged
from auxin.training.metrics import METRICS_FILE, MetricsLog
from auxin.training.ranks import Ranks
from auxin.training.run_folder import (
    CHECKPOINTS,
    announce_saving,
    checkpoint_name,
    checkpoint_to_resume,
    keep_later,
    latest_checkpoint,
    name_latest,
    own_checkpoints,
    pick_up,
    prune_checkpoints,
    start_over,
)
from auxin.training.state import TrainingState


class Keeper:
    """The folder of one stage's run.

    Args:
        folder: is there, and held by the leader.
        ranks: the processes.
        keep: newest checkpoints that are kept.
        tensorboard: whether event files are written.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, tensorboard: bool) -> None:
        self.folder, self._ranks, self._keep, self._tensorboard = folder, ranks, keep, tensorboard
        self.metrics_path = folder / METRICS_FILE
        self._metrics: MetricsLog | None = None

    def to_resume(self, needs_way_back: bool) -> tuple[Path | None, list[str]]:
        """As `checkpoint_to_resume`."""

        def find() -> list[Any]:
            checkpoint, notes = checkpoint_to_resume(self.folder, needs_way_back)
            return [None if checkpoint is None else str(checkpoint), notes]

        checkpoint, notes = self._ranks.told(find)
        return None if checkpoint is None else Path(checkpoint), notes

    def start_over(self) -> None:
        """Forget what another run of this folder left beside its checkpoints."""
        if self._ranks.leads:
            start_over(self.folder)

    def pick_up(self, checkpoint: Path, state: TrainingState) -> None:
        """Add to the leader's `state` what happened since `checkpoint`."""
        if self._ranks.leads:
            pick_up(self.folder, checkpoint, state)

    def keep_later(self, checkpoint: Path | None) -> list[str]:
        """As `keep_later` of the run's folder."""
        return keep_later(self.folder, checkpoint) if self._ranks.leads else []

    def open_metrics(self, position: int | None, step: int) -> None:
        """Append to the metrics from now on; those beyond `position` in the data order go, all of them at None."""
        if self._ranks.leads:
            self._metrics = MetricsLog(self.folder, self._tensorboard, position, step)

    def close(self) -> None:
        """Close the files of the metrics."""
        if self._metrics is not None:
            self._metrics.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        if self._metrics is not None:
            self._metrics.write(dict(line))

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / CHECKPOINTS / checkpoint_name(step)

    def newest_is(self, step: int) -> bool:
        """Whether the newest checkpoint is that after `step` steps."""

        def newest() -> bool:
            found = latest_checkpoint(self.folder)
            return found is not None and found.name == checkpoint_name(step)

        return self._ranks.told(newest)

    def announce(self, checkpoint: Path) -> None:
        """Say, as the leader, that `checkpoint` is about to be written."""
        announce_saving(self.folder, checkpoint)

    def name(self, checkpoint: Path, rewind_step: int) -> None:
        """Name, as the leader, the newest checkpoint, which is written, and remove what it makes superfluous."""
        name_latest(self.folder, checkpoint)
        self._prune(checkpoint, rewind_step)

    def prune(self, newest: Path, rewind_step: int) -> None:
        """Remove what `newest`, the newest checkpoint, makes superfluous: a kill may have come before it was done."""
        if self._ranks.leads:
            self._prune(newest, rewind_step)

    def _prune(self, newest: Path, rewind_step: int) -> None:
        names = [folder.name for folder in own_checkpoints(self.folder) if folder.name <= newest.name]
        prune_checkpoints(self.folder, {*names[-self._keep :], checkpoint_name(rewind_step)})

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return latest_checkpoint(self.folder)

    def go_back(self, step: int) -> tuple[Path, dict[str, Any]]:
        """Forget what came after the checkpoint of `step`; that one, and the state that it holds.

        Raises:
            CheckpointError: it is damaged.
        """
        checkpoint = self.checkpoint(step)

        def forget() -> None:
            refuse_damaged(checkpoint, f"Run again: the run then goes back to an older one ({self.folder}).")
            assert self._metrics is not None
            self._metrics.rewind(step)
            # Before any newer checkpoint (of an interruption) is forgotten, `latest` must not name it any more.
            name_latest(self.folder, checkpoint)

        self._ranks.told(forget)
        return checkpoint, read_state(checkpoint)
