"""The checkpoints of one run: which is the newest, which are kept, and what to go on from when one is damaged.

In a run's folder lie `checkpoints/step-00000100/` and others, the file `latest`, which names the newest one, and
`since.json`, which has what happened after it was written: a checkpoint itself is never changed. Whatever else lies in
`checkpoints/` is somebody's own, and left alone.

Whoever names an earlier one in `latest`, or removes `latest`, goes back: later ones are kept aside. A process that died
before it named what it had saved leaves a later one, too; the file `.saving` tells the two apart.
"""

import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from auxin.errors import CheckpointError, reason
from auxin.files import flush, remove_folder, sweep, write_text
from auxin.settings import Settings
from auxin.sums import damage
from auxin.training.checkpoint import read_state
from auxin.training.metrics import last_progress
from auxin.training.state import TrainingState

CHECKPOINTS = "checkpoints"
LATEST_FILE = "latest"
SINCE_FILE = "since.json"
SAVING_FILE = ".saving"
DAMAGED, FORMER = "damaged", "former"
"""What the names of folders that are kept aside begin with."""

_NAME = re.compile(r"step-\d{8,}")


class Since(Settings):
    """What happened to a run since a checkpoint of it was written, until the next one has it in its state."""

    checkpoint: str
    """The folder's name."""
    seconds: float = 0.0
    """Wall time of the stage up to the latest beginning of a piece; 0 where the checkpoint knows it."""
    notes: list[str] = []
    """What the ledger shall say beside what the checkpoint's state has."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def own_checkpoints(output_dir: Path) -> list[Path]:
    """The run's own checkpoints, by step; those that somebody has put there under other names are not among them."""
    folders = (output_dir / CHECKPOINTS).glob("step-*")
    return sorted(folder for folder in folders if _NAME.fullmatch(folder.name) and folder.is_dir())


def announce_saving(output_dir: Path, checkpoint: Path) -> None:
    """Say that `checkpoint` is about to be written, which `name_latest` will name."""
    path = output_dir / SAVING_FILE
    try:
        write_text(path, checkpoint.name + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint} could not be saved: {path} can't be written ({reason(error)}). Nothing saved before was "
            "touched. Free space on the disk, then run again."
        ) from error


def name_latest(output_dir: Path, checkpoint: Path) -> None:
    """Name `checkpoint`, a folder in `output_dir`, as the newest one; a reader sees the old name or the new one."""
    path = output_dir / LATEST_FILE
    try:
        write_text(path, checkpoint.relative_to(output_dir).as_posix() + "\n")
        flush(output_dir)
        (output_dir / SAVING_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint} was saved, but {path} could not be written: {reason(error)}. Free space on the disk, then "
            "run again."
        ) from error


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run's folder; None where nothing was saved yet.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    output_dir = Path(output_dir)
    if not (output_dir / LATEST_FILE).is_file():
        return None
    name = _named(output_dir)
    if not name or not (output_dir / name).is_dir():
        others = ", ".join(folder.name for folder in own_checkpoints(output_dir))
        raise CheckpointError(
            f"{output_dir / LATEST_FILE} names {name!r}, which does not exist. Write the name of an existing "
            f"checkpoint into it (there are: {others or 'none'}), or delete {output_dir / LATEST_FILE} to start over."
        )
    return output_dir / name


def _named(output_dir: Path) -> str:
    """What `latest` holds; of one that can't be read whatever can."""
    return (output_dir / LATEST_FILE).read_text(encoding="utf-8", errors="replace").strip()


def checkpoint_to_resume(output_dir: Path, needs_way_back: bool) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, which `latest` then names; damaged ones before it are kept aside.

    Args:
        output_dir: the run's folder.
        needs_way_back: whether the periodic checkpoint that a rewind would go to must be whole, too.

    Returns:
        The folder, None where nothing was saved yet, and sentences about what was damaged, for the ledger.

    Raises:
        CheckpointError: some were saved, and none is whole.
    """
    if not (output_dir / LATEST_FILE).is_file():
        return None, []
    name, reasons, damaged = _named(output_dir), list[str](), list[Path]()
    newest, candidates = output_dir / name, own_checkpoints(output_dir)
    if _NAME.fullmatch(newest.name):
        candidates = [folder for folder in candidates if folder.name < newest.name]
    if newest.parent == output_dir / CHECKPOINTS and newest.is_dir():
        candidates.append(newest)
    else:
        reasons.append(f"{LATEST_FILE} names {name!r}, which is no checkpoint there")
    for checkpoint in reversed(candidates):
        harmed, reason = _harmed(checkpoint, needs_way_back)
        if reason is None:
            note = _go_back(output_dir, checkpoint, damaged, reasons) if reasons else None
            return checkpoint, [] if note is None else [note]
        reasons.append(reason)
        damaged += [harmed] if harmed.is_dir() and harmed not in damaged else []
    raise CheckpointError(
        f"{output_dir / CHECKPOINTS} holds no whole checkpoint to go on from: {'; '.join(reasons)}. Restore what is "
        f"damaged from a copy, or delete {output_dir / LATEST_FILE} to start the stage over."
    )


def _harmed(checkpoint: Path, needs_way_back: bool) -> tuple[Path, str | None]:
    """What is damaged of a checkpoint and of what a rewind needs, and how; None: nothing."""
    if (reason := damage(checkpoint)) is not None:
        return checkpoint, f"{checkpoint.name} is damaged: {reason}"
    if needs_way_back:
        try:
            way_back = checkpoint.with_name(checkpoint_name(int(read_state(checkpoint)["state"]["rewind_step"])))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            return checkpoint, f"{checkpoint.name} is damaged: {error}"
        if (reason := damage(way_back)) is not None:
            return way_back, f"{way_back.name}, where a rewind from {checkpoint.name} would go, is damaged: {reason}"
    return checkpoint, None


def _go_back(output_dir: Path, checkpoint: Path, damaged: list[Path], reasons: list[str]) -> str:
    """Let the run go on from `checkpoint`, the damaged ones kept; what the ledger shall say of it.

    A kill between any two steps of this leads here again.
    """
    kept = {folder: aside_name(folder) for folder in damaged}
    note = f"gone back to {checkpoint.name}: {'; '.join(reasons)}{_where(output_dir, kept)}"
    _note(output_dir, checkpoint, note)
    for folder, aside in kept.items():
        folder.rename(aside)
    name_latest(output_dir, checkpoint)
    return note


def keep_later(output_dir: Path, checkpoint: Path | None) -> list[str]:
    """Keep those checkpoints aside that are later than the one that the run goes on from (None: it begins), since
    somebody has gone back behind them; what the ledger shall say of it.

    A kill between any two steps of this leads here again.
    """
    being_saved = _being_saved(output_dir)
    later = [folder for folder in own_checkpoints(output_dir) if checkpoint is None or folder.name > checkpoint.name]
    kept = {folder: aside_name(folder, FORMER) for folder in later if folder.name != being_saved}
    if not kept:
        return []
    if checkpoint is None:
        note = f"begun anew, since there is no {LATEST_FILE}{_where(output_dir, kept)}"
    else:
        note = f"gone back to {checkpoint.name}, which {LATEST_FILE} names{_where(output_dir, kept)}"
        _note(output_dir, checkpoint, note)
    for folder, aside in kept.items():
        folder.rename(aside)
    return [note]


def _where(output_dir: Path, kept: Mapping[Path, Path]) -> str:
    names = ", ".join(aside.relative_to(output_dir).as_posix() for aside in kept.values())
    return f" (kept as {names})" if names else ""


def _note(output_dir: Path, checkpoint: Path, note: str) -> None:
    since = read_since(output_dir, checkpoint)
    if note not in since.notes:
        write_since(output_dir, checkpoint, since.seconds, [*since.notes, note])


def _being_saved(output_dir: Path) -> str:
    """The name of what a process that died was saving; empty: none was."""
    try:
        return (output_dir / SAVING_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def aside_name(folder: Path, word: str = DAMAGED) -> Path:
    """Where a folder that is damaged, or was gone back from, is kept, beside its place: a name that is free."""
    names = (f"{word}-{folder.name}{f'-{number}' if number else ''}" for number in itertools.count())
    return next(path for path in map(folder.with_name, names) if not path.exists())


def read_since(output_dir: Path, checkpoint: Path) -> Since:
    """What happened since `checkpoint` was written; nothing where the file is another checkpoint's, or can't be read:
    it holds seconds and notes, and nothing that is computed."""
    try:
        found = Since.model_validate_json((output_dir / SINCE_FILE).read_bytes())
    except (OSError, ValueError):
        found = Since(checkpoint="")
    return found if found.checkpoint == checkpoint.name else Since(checkpoint=checkpoint.name)


def write_since(output_dir: Path, checkpoint: Path, seconds: float, notes: list[str]) -> None:
    """Say what happened since `checkpoint` was written, in place of what was said; see `Since`."""
    since = Since(checkpoint=checkpoint.name, seconds=seconds, notes=notes)
    write_text(output_dir / SINCE_FILE, since.model_dump_json(indent=2) + "\n")


def start_over(output_dir: Path) -> None:
    """Forget what happened since checkpoints that another run of the same folder had."""
    (output_dir / SINCE_FILE).unlink(missing_ok=True)


def pick_up(output_dir: Path, checkpoint: Path, state: TrainingState) -> None:
    """Add to `state`, which is that of `checkpoint`, what happened since: notes, and the time that a killed process
    spent after it, as far as the metrics tell.

    Written to the disk: the metrics beyond the checkpoint will be dropped, and the next kill may come at any moment.
    """
    since = read_since(output_dir, checkpoint)
    state.seconds = max(state.seconds, since.seconds)
    state.notes += since.notes
    seconds, position = last_progress(output_dir)
    steps, more = position - state.data_position, seconds - state.seconds
    if steps <= 0 or more <= 0:
        return
    state.seconds = seconds
    note = (
        f"resumed at step {state.step}; at least {steps} steps after it were lost and done again ({more:.1f} s; "
        "their FLOPs are not in the totals)"
    )
    state.notes.append(note)
    write_since(output_dir, checkpoint, seconds, [*since.notes, note])


def prune_checkpoints(output_dir: Path, keep: Collection[str]) -> None:
    """Remove all checkpoints of a run's folder but those named in `keep`, and what killed processes left unfinished."""
    for folder in own_checkpoints(output_dir):
        if folder.name not in keep:
            remove_folder(folder)
    sweep(output_dir / CHECKPOINTS)
