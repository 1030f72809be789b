"""The logical shards of a source: which parts of its files are read as one, whoever reads them.

They go by the files alone, not by how many processes read. What can be read from the middle is cut: Parquet files
between row groups, JSON lines that are not compressed between lines. Smaller files share a shard with those beside
them. Nothing is read for that but names, sizes, the footers of Parquet files and a few kilobytes of each file, by which
it is known again."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from auxin.data.row_files import is_cut_by_lines, json_lines_between, parquet_groups, parquet_rows
from auxin.data.sources import (
    Document,
    SourceFile,
    has_other_rows,
    row_document,
    rows_of_texts,
    source_files,
    warn_of_other_rows,
    whole_document,
)
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.errors import DataError, listed, reason
from auxin.settings import Settings

_BLOCK, _BLOCKS = 2**13, 8
"""Bytes of a file that are read at a place to know it again, and at how many places."""


class FileOfSource(NamedTuple):
    """A file as it was when the plan was made."""

    name: str
    path: str
    size: int
    modified: int
    """Nanoseconds since the epoch."""
    digest: str
    """Hex SHA-256 of some of its bytes, as `digest_of` takes it."""

    @property
    def is_parquet(self) -> bool:
        """Whether parts of it are row groups."""
        return _is_parquet(Path(self.path))


class Shard(NamedTuple):
    """What is tokenized and packed in one go."""

    first: int
    """Number of its first file; in a dataset of Hugging Face, number of the shard that the dataset has."""
    files: int
    """How many; 0 in a dataset of Hugging Face."""
    start: int
    """Of a part of one file: its first row group, or byte."""
    stop: int
    """The row group, or byte, behind its last; 0: all of the files."""
    size: int
    """About how many bytes of text it has; 0: not known."""


class ShardPlan(Settings):
    """The logical shards of a source."""

    files: tuple[FileOfSource, ...]
    """In the order of their names."""
    shards: tuple[Shard, ...]
    """In the order of the files."""
    revision: str | None = None
    """Of a dataset on the Hub: the commit that all of it is read from."""

    def named(self, number: int) -> str:
        """How messages call a shard."""
        first, files, start, stop, _ = self.shards[number]
        if not files:
            return f"shard {first} of the dataset"
        name = self.files[first].name
        if not stop:
            return name if files == 1 else f"{name} to {self.files[first + files - 1].name}"
        unit = "row group" if self.files[first].is_parquet else "byte"
        return f"{name}, {unit} {start}" if stop == start + 1 else f"{name}, {unit}s {start} to {stop - 1}"

    @property
    def size(self) -> int | None:
        """About how many bytes of text there are; None: not known."""
        sizes = [shard.size for shard in self.shards]
        return sum(sizes) if all(sizes) else None


def plan_files(settings: StreamedTextSettings) -> tuple[ShardPlan, list[Document]]:
    """The shards of files, and what among the files is none of them, with the reason.

    Raises:
        DataError: the source can't be found, has no file that can be read, a file holds no row, or its rows no text.
    """
    files: list[FileOfSource] = []
    shards: list[Shard] = []
    left_out: list[Document] = []
    other_rows: list[str] = []
    empty: list[str] = []
    for found in source_files(settings):
        if found.skipped is not None:
            left_out.append(Document(found.name, None, found.skipped))
            continue
        entry = _stamped(found)
        parts = _parts(entry, settings)
        has_rows = rows_of_texts(found.path, settings) is not None
        if has_rows and not sum(part.size for part in parts):
            empty.append(found.name)
        if not has_rows and has_other_rows(found.path):
            other_rows.append(found.name)
        files.append(entry)
        shards += [part._replace(first=len(files) - 1) for part in parts]
    if empty:
        raise DataError(f"No row is in {listed(empty, whole=True)}. Restore what is empty, or leave it out.")
    if not files:
        raise DataError(f"No file of {settings.text} can be read. Give files of text, or of rows with one.")
    if other_rows:
        warn_of_other_rows(other_rows, settings.text_field)
    return ShardPlan(files=tuple(files), shards=tuple(_grouped(shards, settings.shard_bytes))), left_out


def _parts(entry: FileOfSource, settings: StreamedTextSettings) -> list[Shard]:
    """The shards of one file, as if it were the first; one that is whole may be joined with others."""
    path, wanted = Path(entry.path), settings.shard_bytes
    if entry.is_parquet:
        groups = parquet_groups(entry.name, path, {"text_field": settings.text_field})
        if sum(group.size for group in groups if group.rows) >= wanted:
            return list(_of_groups([group.size for group in groups], wanted))
        return [Shard(0, 1, 0, 0, sum(group.size for group in groups if group.rows))]
    if is_cut_by_lines(path) and entry.size > wanted:
        count = -(-entry.size // wanted)
        ends = [entry.size * number // count for number in range(count + 1)]
        return [Shard(0, 1, start, stop, stop - start) for start, stop in itertools.pairwise(ends)]
    return [Shard(0, 1, 0, 0, entry.size)]


def _of_groups(sizes: Sequence[int], wanted: int) -> Iterator[Shard]:
    """Consecutive row groups of these sizes, so many that each shard has the `wanted` bytes, the last fewer."""
    start = size = 0
    for number, more in enumerate(sizes, start=1):
        size += more
        if size >= wanted or number == len(sizes):
            yield Shard(0, 1, start, number, size)
            start, size = number, 0


def _grouped(shards: Iterable[Shard], wanted: int) -> Iterator[Shard]:
    """The shards, whole files beside each other joined until they have the `wanted` bytes."""
    waiting: Shard | None = None
    for shard in shards:
        if shard.stop:
            if waiting is not None:
                yield waiting
            waiting = None
            yield shard
            continue
        if waiting is not None:
            shard = waiting._replace(files=waiting.files + 1, size=waiting.size + shard.size)
        waiting = shard
        if waiting.size >= wanted:
            yield waiting
            waiting = None
    if waiting is not None:
        yield waiting


def read_files(plan: ShardPlan, number: int, settings: StreamedTextSettings) -> Iterator[Document]:
    """The documents of a shard of files, in their order, one at a time.

    Raises:
        DataError: a file is not there any more, has changed, or can't be read.
    """
    first, files, start, stop, _ = plan.shards[number]
    fields = {"text_field": settings.text_field}
    for entry in plan.files[first : first + files]:
        refuse_changed(entry)
        name, path = entry.name, Path(entry.path)
        form = rows_of_texts(path, settings)
        if form is None:
            yield whole_document(name, path)
        elif entry.is_parquet:
            yield from map(row_document, parquet_rows(name, path, fields, range(start, stop) if stop else None))
        elif stop:
            yield from map(row_document, json_lines_between(name, path, fields, start, stop))
        else:
            yield from map(row_document, form.rows(name, path, fields))


def refuse_changed(entry: FileOfSource) -> None:
    """Refuse a file that is not what the plan has; its bytes are looked at where its time has changed.

    Raises:
        DataError: it is gone, or has changed.
    """
    path = Path(entry.path)
    try:
        status = path.stat()
        same = status.st_size == entry.size and (
            status.st_mtime_ns == entry.modified or digest_of(path, status.st_size) == entry.digest
        )
    except OSError as error:
        raise DataError(
            f"{entry.name}, a file of the stream, can't be read: {reason(error)}. Put it back as it was, then go on."
        ) from error
    if not same:
        raise DataError(
            f"{entry.name}, a file of the stream, has changed since the stream was prepared. Put it back as it was, or "
            "prepare the data anew in another folder."
        )


def digest_of(path: Path, size: int) -> str:
    """Hex SHA-256 by which a file of `size` bytes is known: all of a small one; of others blocks at places of equal
    distance, the first and the last among them, and of Parquet all of the footer.

    Raises:
        OSError: it can't be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
            return digest.hexdigest()
        for place in range(_BLOCKS):
            file.seek((size - _BLOCK) * place // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
        if _is_parquet(path):
            file.seek(size - 8)
            file.seek(max(0, size - 8 - int.from_bytes(file.read(4), "little")))
            digest.update(file.read())
    return digest.hexdigest()


def stamp(name: str, path: Path) -> FileOfSource:
    """A file as it is now.

    Raises:
        DataError: it can't be read.
    """
    try:
        status = path.stat()
        digest = digest_of(path, status.st_size)
    except OSError as error:
        raise DataError(f"{path} can't be read: {reason(error)}. Make it readable, or leave it out.") from error
    return FileOfSource(name, str(path), status.st_size, status.st_mtime_ns, digest)


def _stamped(found: SourceFile) -> FileOfSource:
    return stamp(found.name, found.path)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def refuse_other_files(old: ShardPlan, new: ShardPlan, directory: Path) -> None:
    """Refuse to go on with a source that has other files, or files of other content, than a plan of before.

    Args:
        old: what the stream in `directory` was prepared from.
        new: the source as it is now.
        directory: named in the message.

    Raises:
        DataError: it has.
    """
    had, have = ({entry.name: (entry.size, entry.digest) for entry in plan.files} for plan in (old, new))
    found = {
        "missing": [name for name in had if name not in have],
        "changed": [name for name in had if name in have and had[name] != have[name]],
        "new": [name for name in have if name not in had],
    }
    told = "; ".join(f"{what}: {listed(names, whole=True)}" for what, names in found.items() if names)
    if not told and old.shards != new.shards:
        told = "its shards are cut in another way"  # by another version of what reads it
    if told:
        raise DataError(
            f"The source is not the one that the stream in {directory} was prepared from: {told}. Put it back as it "
            "was, or give another folder."
        )


def touched(old: ShardPlan, new: ShardPlan) -> list[int]:
    """Shards of the same files whose times differ."""
    files = {
        number
        for number, (one, other) in enumerate(zip(old.files, new.files, strict=True))
        if one.modified != other.modified
    }
    return [
        number
        for number, shard in enumerate(old.shards)
        if files.intersection(range(shard.first, shard.first + shard.files))
    ]
