"""Metrics of a run: metrics.jsonl, the record, and TensorBoard event files, a view of it."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auxin.errors import CheckpointError, reason
from auxin.files import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"

TAGS = {
    "loss": "loss/training",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "units_per_second": "speed/units_per_second",
    "flops_per_second": "speed/flops_per_second",
    "mfu": "speed/mfu",
    "data_share": "speed/data_share",
}
"""TensorBoard's tags of the metrics; what begins with VALIDATION or WHOLE_SPLIT is tagged by the rest of its name."""
VALIDATION = "validation_"
"""How the names of what was measured on the held-out split begin, or on a part of it: HELD_OUT_SAMPLES says which."""
WHOLE_SPLIT = "whole_split_"
"""How the names of what was measured on the whole split begin, where the others are of a part of it."""
ALWAYS = ("step", "data_position", "units", "flops", "seconds")
"""What every line has."""
HELD_OUT_SAMPLES = "held_out_samples"
"""The first so many samples of the held-out split are the part that was measured; without it, all were."""


class MetricsLog:
    """Appends to `metrics.jsonl`, one JSON object per line, each line flushed when it is complete.

    Every line has `step` (optimizer steps done) and `data_position` (batches drawn). The latter only grows along one
    history of a run, also through a rewind, so it tells which lines belong to the history that a checkpoint ends.
    """

    def __init__(self, output_dir: Path, tensorboard: bool, resume_position: int | None = None, step: int = 0) -> None:
        """
        Args:
            output_dir: folder of the run.
            tensorboard: write event files too.
            resume_position: data position of the checkpoint that is resumed; lines beyond it are removed. None: all.
            step: its step.
        """
        self.path = output_dir / METRICS_FILE
        self._directory = output_dir / "tensorboard" if tensorboard else None
        self._keep(lambda line: resume_position is not None and line["data_position"] <= resume_position)
        self._open(step)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; values that JSON has no form for (nan, infinities) become null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        try:
            self._file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path} could not be written: {reason(error)}. Free space on the disk, then run again to resume."
            ) from error
        if self._summary is not None:
            for key, value in clean.items():
                tag = _tag(key)
                if tag is not None and value is not None:
                    self._summary.add_scalar(tag, value, line["step"])

    def rewind(self, step: int) -> None:
        """Remove the metrics of steps beyond `step`, which training forgets; events stay."""
        self.close()
        self._keep(lambda line: line["step"] <= step or "event" in line)
        self._open(step)

    def close(self) -> None:
        """Close the files."""
        # A full disk was reported by the write that met it; what it left in the buffer would be reported again.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._summary is not None:
            self._summary.close()

    def _open(self, step: int) -> None:
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._summary = None if self._directory is None else _summary_writer(self._directory, step)

    def _keep(self, wanted: Any) -> None:
        """Rewrite the file with the lines that are `wanted`; a line cut short by a kill is dropped."""
        if not self.path.exists():
            return
        write_text(self.path, "".join(text + "\n" for text, line in _read_lines(self.path) if wanted(line)))


def _tag(key: str) -> str | None:
    """TensorBoard's tag of a metric; None where it has none."""
    for prefix, tag in ((VALIDATION, "validation"), (WHOLE_SPLIT, "validation_whole_split")):
        if key.startswith(prefix):
            return f"{key.removeprefix(prefix)}/{tag}"
    return TAGS.get(key)


def last_progress(output_dir: Path) -> tuple[float, int]:
    """How far the metrics of a run's folder go: seconds of the stage, and data position; zeros where there are none."""
    lines = metrics_in(output_dir)
    return max((line["seconds"] for line in lines), default=0.0), max(
        (line["data_position"] for line in lines), default=0
    )


def metrics_in(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in the folder of a stage, those left out that are cut or damaged; none where there
    is no such file."""
    path = output_dir / METRICS_FILE
    return [line for _, line in _read_lines(path)] if path.exists() else []


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl as text and as what they hold; one cut short by a kill, or damaged, is left out."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and all(isinstance(line.get(name), (int, float)) for name in ALWAYS):
            yield text, line


def _summary_writer(directory: Path, step: int) -> "SummaryWriter":
    # Imported here: it costs a second that a run without event files need not pay.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1 if step else 0)
