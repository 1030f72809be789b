"""What kinds of data share: a folder of them is prepared once, appears whole, and is opened again after that."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from auxin.data.collecting import Collected, ReadReport, collect
from auxin.data.dataset import SPLITS, ProgressCallback, SplitName
from auxin.data.settings import SourceSettings
from auxin.data.sources import Document, source_signature
from auxin.errors import ConfigError, DataError, reason
from auxin.files import existing_folder, flush, write_text
from auxin.locks import in_turn
from auxin.settings import Settings
from auxin.sums import damage, has_sums, write_sums


class Manifest(Settings):
    """What a prepared folder says about itself, beside its settings and report."""

    format: int
    fingerprint: str
    source_signature: str | None
    documents_digest: str
    settings: SourceSettings
    report: ReadReport


ManifestT = TypeVar("ManifestT", bound=Manifest)


class Prepared(Generic[ManifestT]):
    """A prepared folder: memory-mapped arrays, what goes with a model that learns them, and what they were made of."""

    noun: ClassVar[str]
    """What messages call it."""
    manifest_file: ClassVar[str]
    manifest_class: ClassVar[type[Manifest]]
    version: ClassVar[int] = 1
    """Of the folder's format."""

    def __init__(self, directory: Path, manifest: ManifestT) -> None:
        self.directory = directory
        self.manifest = manifest
        self._open()

    def _open(self) -> None:
        """Map the arrays; DataError where one is missing or of another size."""
        raise NotImplementedError

    def _digests(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """Each array's file, the array and its recorded digest."""
        raise NotImplementedError

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Open a prepared folder; sizes and shapes are checked, contents are not (see `verify`).

        Raises:
            DataError: nothing prepared there, or a file of it is missing or of another size.
        """
        directory = existing_folder(directory, f"the folder of a prepared {cls.noun}", cls.manifest_file, DataError)
        path = directory / cls.manifest_file
        if not path.exists():
            if (kind := _kind_of(directory)) is not None:
                raise DataError(
                    f"{directory} holds data of the kind {kind}, and what is asked for is a prepared {cls.noun} "
                    f"({cls.manifest_file}). Give the folder data/ of a run that has one; a run's own data is measured "
                    "by the stages of its recipe."
                )
            below = ", ".join(str(found.parent) for found in sorted(directory.glob(f"*/{cls.manifest_file}")))
            mend = f"Give the one in it: {below}" if below else "Give one that a run has prepared, its folder data/."
            raise DataError(f"{directory} holds no prepared {cls.noun} ({cls.manifest_file} is missing). {mend}")
        try:
            manifest: Any = cls.manifest_class.parse(json.loads(path.read_text(encoding="utf-8")))
        except ConfigError as error:
            why = str(error).rstrip(".")
            raise DataError(f"{path} is damaged or of another version: {why}. Delete the folder.") from error
        except (OSError, ValueError) as error:  # broken JSON and broken UTF-8 are ValueErrors
            raise DataError(f"{path} is damaged: {reason(error)}. Delete the folder.") from error
        if manifest.format != cls.version:
            raise DataError(f"{path} has format {manifest.format}, this version reads {cls.version}. Prepare it again.")
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the documents, split, order and samples, and of what made them so. Where the files lie does
        not matter."""
        return self.manifest.fingerprint

    @property
    def named_digest(self) -> str | None:
        """Digest of the tokenizer or processor that the settings named, as it was then; None: they named none."""
        raise NotImplementedError

    def verify(self) -> None:
        """Read everything and compare it with the recorded digests.

        Raises:
            DataError: a file's content has changed.
        """
        for name, array, expected in self._digests():
            if array_digest(array) != expected:
                raise DataError(f"{self.directory / name} is damaged. Delete {self.directory} and prepare again.")


def _kind_of(directory: Path) -> str | None:
    """The kind of data that was prepared in a folder, by a manifest of whatever name; None where there is none."""
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if "documents_digest" in manifest:
                return str(manifest["settings"]["kind"])
    return None


SettingsT = TypeVar("SettingsT", bound=SourceSettings)
PreparedT = TypeVar("PreparedT", bound=Prepared[Any])


@dataclass(frozen=True)
class Begun:
    """A preparation for which everything that its settings name beside the source was loaded."""

    build: Callable[[Collected, Path, ProgressCallback], dict[str, Any]]
    """Writes the arrays and what goes with them into the folder; returns the manifest's `fingerprint`, `report` and
    what else it has."""
    named: str | None = None
    """The tokenizer or processor that the settings name, in words; None: they name none."""
    named_digest: str | None = None
    """Its digest."""


@dataclass(frozen=True)
class Steps(Generic[SettingsT, PreparedT]):
    """What is its own in how one kind of data is prepared."""

    data: type[PreparedT]
    """Opens the folder."""
    documents: Callable[[SettingsT], Iterable[Document]]
    """Reads the source."""
    begin: Callable[[SettingsT], Begun]
    """Loads what the settings name, before the source is read."""
    document: str = "document"
    """What messages call one."""
    needed: tuple[SplitName, ...] = SPLITS
    """Of which splits something is to be read; the others may be empty."""


def prepare_folder(
    steps: Steps[SettingsT, PreparedT], settings: SettingsT, directory: str | Path, progress: ProgressCallback | bool
) -> PreparedT:
    """Prepare data in `directory`, or open what is there.

    A finished folder of the same settings is opened again, after its files were checked against their sums and the
    source by name, size and time (then by content). The folder appears complete or not at all; a second process waits.

    Args:
        steps: the kind's own.
        settings: the data.
        directory: the folder to fill; it must not exist, be empty, or hold data of the same settings.
        progress: a callback, or True for progress bars.

    Raises:
        DataError: the source can't be used, a split would be empty, or the folder holds something else.
    """
    noun, directory = steps.data.noun, Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file. Give a folder for the prepared {noun}.")
    for path in settings.paths:
        if path.is_dir() and directory.is_relative_to(path.absolute()):
            raise DataError(f"{directory} lies inside {path}, so that its files would become documents. Give another.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(directory.parent / f".{directory.name}.lock"):
        if directory.exists() and any(directory.iterdir()):
            return _reuse(steps, settings, directory)
        partial = directory.parent / f".{directory.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
        partial.mkdir()
        try:
            with _progress(progress, noun) as advance:
                _fill(steps, settings, partial, advance)
            os.replace(partial, directory)
            flush(directory.parent)
        except OSError as error:
            raise DataError(
                f"The {noun} could not be written to {directory}: {reason(error)}. Nothing was left there."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return steps.data.load(directory)


def _fill(steps: Steps[SettingsT, PreparedT], settings: SettingsT, directory: Path, advance: ProgressCallback) -> None:
    # Read before the documents: a file that changes meanwhile is then noticed at the next use.
    signature = source_signature(settings)
    begun = steps.begin(settings)
    collected = collect(settings, steps.documents(settings), directory, advance, steps.document, steps.needed)
    own = begun.build(collected, directory, advance)
    collected.unlink()
    manifest = steps.data.manifest_class(
        format=steps.data.version,
        source_signature=signature,
        documents_digest=collected.digest(),
        settings=settings,
        **own,
    )
    write_text(directory / steps.data.manifest_file, manifest.model_dump_json(indent=1))
    write_sums(directory)


def _reuse(steps: Steps[SettingsT, PreparedT], settings: SettingsT, directory: Path) -> PreparedT:
    """Open the finished folder if it is of the same settings and its source has not changed."""
    noun = steps.data.noun
    if (reason := damage(directory)) is not None:
        raise DataError(f"The {noun} in {directory} is damaged: {reason}. Delete the folder to prepare it again.")
    if not (directory / steps.data.manifest_file).is_file():
        raise DataError(f"{directory} is not empty and holds no prepared {noun}. Give an empty or a new folder.")
    data = steps.data.load(directory)
    if not has_sums(directory):
        data.verify()
    manifest: Manifest = data.manifest
    if changes := other_settings(manifest.settings, settings):
        raise DataError(
            f"{directory} holds a prepared {noun} of other settings ({changes}). Give another folder or delete it."
        )
    try:
        signature = source_signature(settings)
        begun = steps.begin(settings)
        changed = signature != manifest.source_signature and _digest(steps, settings) != manifest.documents_digest
    except DataError as error:
        warnings.warn(f"{directory} is used as prepared; its source can't be compared any more: {error}", stacklevel=4)
        return data
    if changed:
        raise DataError(
            f"The source has changed since {directory} was prepared from it. Delete the folder to prepare it again, "
            "or give another one."
        )
    if begun.named_digest != data.named_digest:
        raise DataError(
            f"{begun.named} is not the one that {directory} was prepared with. Give that one, or another folder."
        )
    return data


def other_settings(there: SourceSettings, asked: SourceSettings) -> str:
    """Which settings of prepared data differ from those asked for, in words; those left out that decide no sample."""
    free = set(asked.decide_no_sample)
    old, new = (one.model_dump(mode="json", exclude=free) for one in (there, asked))
    return ", ".join(f"{key}: {old[key]!r} there, {new[key]!r} asked" for key in new if old[key] != new[key])


def _digest(steps: Steps[SettingsT, PreparedT], settings: SettingsT) -> str:
    """The digest of the source's documents as `_fill` records it."""
    with tempfile.TemporaryDirectory() as folder:
        documents = steps.documents(settings)
        return collect(settings, documents, Path(folder), lambda stage, done, total: None, needed=steps.needed).digest()


def open_array(path: Path, shape: tuple[int, ...], types: Collection[Any]) -> np.ndarray:
    """Map a prepared array from the disk, read-only.

    Raises:
        DataError: it is missing, damaged, or has another shape or type.
    """
    mend = f"Delete {path.parent} and prepare again."
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. {mend}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is damaged: {reason(error)}. {mend}") from error
    if array.shape != shape or array.dtype not in types:
        raise DataError(f"{path} is {array.dtype} of shape {array.shape}, expected {shape}. {mend}")
    return array


def array_digest(array: np.ndarray) -> str:
    """Hex SHA-256 of the numbers of an array, a part of which is in memory at a time."""
    digest = hashlib.sha256()
    for start in range(0, len(array), 4096):
        digest.update(array[start : start + 4096].tobytes())
    return digest.hexdigest()


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array that `open_array` maps, and see to it that it is on the disk."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _progress(progress: ProgressCallback | bool, noun: str) -> Iterator[ProgressCallback]:
    if callable(progress):
        yield progress
        return
    # Standard output belongs to what the caller prints; FORCE_COLOR would send the bars to a pipe there.
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{noun}: {stage}", total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance
