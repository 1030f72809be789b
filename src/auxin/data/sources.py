"""Documents and rows from the standard library, local files and Hugging Face datasets, with the reason if skipped."""

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from auxin.data.settings import SourceSettings
from auxin.errors import DataError, reason

# Folders of the standard library that hold no source of its own, or its tests.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_ROWS_PER_BATCH = 1024
_HIDDEN = "hidden file"


class Document(NamedTuple):
    """A document's UTF-8 bytes, or the reason why it was skipped (then `data` is None)."""

    name: str
    data: bytes | None
    skipped: str | None = None
    content: bytes | None = None
    """What makes it another document than others, where that is not all of `data`."""


class Row(NamedTuple):
    """The fields of one row that were asked for, or the reason why it was skipped (then `values` is None)."""

    name: str
    values: tuple[Any, ...] | None
    skipped: str | None = None


Fields = Mapping[str, str]
"""By the setting that names it, a field of every row."""


def read_documents(settings: SourceSettings) -> Iterator[Document]:
    """Yield every document of the source, in a fixed order, one at a time.

    Raises:
        DataError: the source can't be found or reached, or its rows have no text field.
    """
    fields = {"text_field": settings.text_field}
    if settings.source == "huggingface":
        yield from map(_row_document, _huggingface_rows(settings, fields))
        return
    for name, path in source_files(settings):
        if path is None:
            yield Document(name, None, _HIDDEN)
        elif (reader := _row_reader(path)) is not None:
            yield from map(_row_document, reader(name, path, fields))
        else:
            yield _checked(name, _read(path))


def read_rows(settings: SourceSettings, fields: Fields) -> Iterator[Row]:
    """Yield the values of `fields` of every row of the source, in a fixed order, one row at a time.

    Rows are those of JSON lines (compressed by gzip or not), Parquet and Hugging Face datasets; other files have none
    and are skipped as a whole.

    Raises:
        DataError: the source can't be found or reached, or its rows lack a field.
    """
    if settings.source == "huggingface":
        yield from _huggingface_rows(settings, fields)
        return
    for name, path in source_files(settings):
        if path is None:
            yield Row(name, None, _HIDDEN)
        elif (reader := _row_reader(path)) is not None:
            yield from reader(name, path, fields)
        else:
            yield Row(name, None, "neither .jsonl, .jsonl.gz nor .parquet")


def source_files(settings: SourceSettings) -> list[tuple[str, Path | None]]:
    """The files of a `stdlib` or `files` source: (name, path), sorted by name, each once.

    The path is None where a folder holds a hidden file, which is not read.

    Raises:
        DataError: a path does not exist, a glob matches nothing, or there is no readable standard library.
    """
    if settings.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found: list[tuple[str, Path | None]] = []
        for folder, folders, files in os.walk(root):
            folders[:] = set(folders) - _NOT_STDLIB
            paths = [Path(folder, file) for file in files if file.endswith(".py")]
            found += [(path.relative_to(root).as_posix(), path) for path in paths]
        if not found:
            raise DataError(f"{root} holds no .py files of the standard library. Use source 'files' instead.")
        return sorted(found, key=lambda entry: entry[0])
    # The same file can be named by a folder and by a glob.
    named: dict[Path, tuple[str, Path | None]] = {}
    for pattern in settings.paths:
        for path, hidden in _expand(pattern.expanduser()):
            named.setdefault(path.resolve(), (str(path), None if hidden else path))
    return sorted(named.values(), key=lambda entry: entry[0])


def source_signature(settings: SourceSettings) -> str | None:
    """A cheap digest (names, sizes, times) that stays equal while no file is touched; None for a remote source."""
    if settings.source == "huggingface":
        return None
    digest = hashlib.sha256()
    for name, path in source_files(settings):
        if path is None:
            continue
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _expand(pattern: Path) -> list[tuple[Path, bool]]:
    """The files that one entry of `paths` names, each with whether it is hidden inside the named folder."""
    if pattern.is_file():
        return [(pattern, False)]
    if pattern.is_dir():
        matches = [(path, _is_hidden(path.relative_to(pattern))) for path in pattern.rglob("*") if path.is_file()]
    elif glob.has_magic(str(pattern)):
        matches = [(Path(path), False) for path in glob.glob(str(pattern), recursive=True) if Path(path).is_file()]
    else:
        raise DataError(f"{pattern} does not exist. Give an existing file, folder or glob.")
    if not matches:
        raise DataError(f"{pattern} matches no file. Give a folder or glob that holds files.")
    return matches


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {reason(error)}. Make it readable or leave it out.") from error


def _checked(name: str, data: bytes) -> Document:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Document(name, None, "not UTF-8")
    return Document(name, data) if text.strip() else Document(name, None, "empty")


def text_document(name: str, value: Any) -> Document:
    """The document of one row's text field."""
    if not isinstance(value, str):
        return Document(name, None, "text field is not a string")
    try:
        return _checked(name, value.encode("utf-8"))
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return Document(name, None, "not valid Unicode")


def _row_document(row: Row) -> Document:
    return Document(row.name, None, row.skipped) if row.values is None else text_document(row.name, row.values[0])


def _require(fields: Fields, known: Collection[str], where: str) -> None:
    """Refuse rows that lack one of `fields`; DataError."""
    for setting, field in fields.items():
        if field not in known:
            names = ", ".join(known) or "(none)"
            raise DataError(f"{where} has no field {field!r}. Set `{setting}` to one of: {names}.")


@contextmanager
def _lines(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file that may be compressed; DataError when it can't be read or is damaged."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
            yield lines
    except (OSError, EOFError, zlib.error) as error:  # an EOFError: the compressed file ends too early
        raise DataError(
            f"{path} can't be read: {reason(error)}. Make it readable, restore it or leave it out."
        ) from error


def _jsonl_rows(name: str, path: Path, fields: Fields) -> Iterator[Row]:
    with _lines(path) as lines:
        seen_a_row = seen_the_fields = False
        for number, line in enumerate(lines, start=1):
            row_name = f"{name}:{number}"
            if not line.strip():
                continue
            seen_a_row = True
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                yield Row(row_name, None, "not UTF-8")
                continue
            except (ValueError, RecursionError):
                yield Row(row_name, None, "not valid JSON")
                continue
            if not isinstance(row, dict):
                yield Row(row_name, None, "not a JSON object")
                continue
            if missing := [field for field in fields.values() if field not in row]:
                # The first row decides whether the setting is wrong or one row is.
                if not seen_the_fields:
                    _require(fields, sorted(row), row_name)
                yield Row(row_name, None, f"no field {missing[0]!r}")
                continue
            seen_the_fields = True
            yield Row(row_name, tuple(row[field] for field in fields.values()))
        if not seen_a_row:
            yield Row(name, None, "empty")


def _parquet_rows(name: str, path: Path, fields: Fields) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require(fields, file.schema_arrow.names, name)
            if file.metadata.num_rows == 0:
                yield Row(name, None, "empty")
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=sorted(set(fields.values()))):
                columns = [batch.column(field).to_pylist() for field in fields.values()]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield Row(f"{name}:{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


_ROW_READERS = {".jsonl": _jsonl_rows, ".jsonl.gz": _jsonl_rows, ".parquet": _parquet_rows}
"""By how the names of files that hold rows end, in letters of any case."""


def _row_reader(path: Path) -> Callable[[str, Path, Fields], Iterator[Row]] | None:
    """What reads the rows of a file; None where it holds none."""
    name = path.name.lower()
    return next((reader for ending, reader in _ROW_READERS.items() if name.endswith(ending)), None)


def _huggingface_rows(settings: SourceSettings, fields: Fields) -> Iterator[Row]:
    import datasets

    where = f"dataset {settings.name!r}" + (f" ({settings.config})" if settings.config else "")
    try:
        dataset = datasets.load_dataset(settings.name, settings.config, split=settings.split)
    # Depending on what is missing, datasets raises its own, requests', httpx's or Python's errors.
    except Exception as error:
        raise DataError(
            f"The {where}, split {settings.split!r}, could not be loaded: {type(error).__name__}: {error} "
            "Check the name, config and split, and that the Hub can be reached (or that the dataset is cached)."
        ) from error
    _require(fields, dataset.column_names, f"The {where}")
    rows = dataset.select_columns(sorted(set(fields.values())))
    number = 0
    for batch in rows.iter(batch_size=_ROWS_PER_BATCH):
        for values in zip(*(batch[field] for field in fields.values()), strict=True):
            number += 1
            yield Row(f"{settings.name}:{number}", values)
