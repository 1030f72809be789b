"""Files, compressed or not, and rows of those that hold some, one at a time: JSON lines and arrays, CSV, Parquet."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path
from typing import IO, Any, NamedTuple

from auxin.errors import DataError, first_line, listed, reason

_OPEN: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open}
"""By the last ending of a name, what opens a compressed file."""
_PACKED = frozenset({".zst", ".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".br", ".snappy"})
"""Endings of what has to be unpacked before."""
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # an EOFError: the compressed file ends too early
_ROWS_PER_BATCH = 1024
_CHARACTERS = 2**16
"""Of a JSON array that are read at least at a time."""
_CUT_SHORT = 16
"""So many characters before the end of what was read, an error of JSON, or the end of a number, may come from that."""


class Row(NamedTuple):
    """The fields of one row that were asked for, or the reason why it was skipped (then `values` is None)."""

    name: str
    values: tuple[Any, ...] | None
    skipped: str | None = None


Fields = Mapping[str, str]
"""By the setting that names it, a field of every row."""


@dataclass(frozen=True)
class RowFormat:
    """How files of one ending hold rows."""

    rows: Callable[[str, Path, Fields], Iterator[Row]]
    """Yields the rows of a file with that name; DataError where it can't be read, or its rows lack a field."""
    first_fields: Callable[[Path], Collection[str] | None] | None = None
    """For an ending that need not mean rows: the fields of a file's first row, None where it holds none."""


def row_format(path: Path) -> RowFormat | None:
    """How a file holds rows, by its ending in letters of any case; None where it holds none."""
    return _FORMATS.get(_endings(path)[0])


def packed(path: Path) -> str | None:
    """Why a file is not read before it is unpacked; None where it is read."""
    ending, compression = _endings(path)
    if compression in _PACKED or ending in _PACKED or (compression and ending == ".parquet"):
        return f"{ending if ending in _PACKED or ending == '.parquet' else ''}{compression}: decompress it first"
    return None


def read_file(path: Path) -> bytes:
    """All of a file, decompressed, without the byte order mark that may stand before UTF-8.

    Raises:
        DataError: it can't be read, or is damaged.
    """
    with _opened(path) as file:
        return file.read().removeprefix(codecs.BOM_UTF8)


def require_fields(fields: Fields, known: Collection[str], where: str) -> None:
    """Refuse rows that lack one of `fields`; DataError."""
    for setting, field in fields.items():
        if field not in known:
            names = listed(known) or "(none)"
            raise DataError(f"{where} has no field {field!r}. Set `{setting}` to one of: {names}.")


def _endings(path: Path) -> tuple[str, str]:
    """A name's ending, and that of its compression behind it, or none."""
    last = path.suffix.lower()
    if last in _OPEN or last in _PACKED:
        return path.with_suffix("").suffix.lower(), last
    return last, ""


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's decompressed bytes; DataError when it can't be read or is damaged."""
    try:
        with _OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except _DAMAGE as error:
        raise DataError(
            f"{path} can't be read: {reason(error)}. Make it readable, restore it or leave it out."
        ) from error


class _Found(NamedTuple):
    """A JSON value of a file, or why there is none."""

    name: str
    value: Any
    skipped: str | None = None


def _rows_of_objects(name: str, found: Iterable[_Found], fields: Fields, inside: bool = False) -> Iterator[Row]:
    """The rows of JSON values; those of a part `inside` of a file, whose first row decides nothing, and in which no row
    may begin."""
    seen_a_row, seen_the_fields = False, inside
    for row_name, value, skipped in found:
        seen_a_row = True
        if skipped is not None or not isinstance(value, dict):
            yield Row(row_name, None, skipped or "not a JSON object")
        elif missing := [field for field in fields.values() if field not in value]:
            # The first row decides whether the setting is wrong or one row is.
            if not seen_the_fields:
                require_fields(fields, sorted(value), row_name)
            yield Row(row_name, None, f"no field {missing[0]!r}")
        else:
            seen_the_fields = True
            yield Row(row_name, tuple(value[field] for field in fields.values()))
    if not seen_a_row and not inside:
        yield Row(name, None, "empty")


def _json_lines(name: str, path: Path) -> Iterator[_Found]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_line(f"{name}:{number}", line)


def _json_line(row_name: str, line: bytes) -> _Found:
    try:
        return _Found(row_name, json.loads(line))
    except UnicodeDecodeError:
        return _Found(row_name, None, "not UTF-8")
    except (ValueError, RecursionError):
        return _Found(row_name, None, "not valid JSON")


def is_cut_by_lines(path: Path) -> bool:
    """Whether parts of a file can be read by `json_lines_between`."""
    return _endings(path) in ((".jsonl", ""), (".ndjson", ""))


def json_lines_between(name: str, path: Path, fields: Fields, start: int, stop: int) -> Iterator[Row]:
    """The rows of the lines of a JSON lines file, not compressed, that begin at a byte from `start` on and before
    `stop`; each is called by its first byte.

    Raises:
        DataError: the file can't be read, or the first row of the file lacks a field.
    """
    return _rows_of_objects(name, _lines_between(name, path, start, stop), fields, inside=start > 0)


def _lines_between(name: str, path: Path, start: int, stop: int) -> Iterator[_Found]:
    with _opened(path) as file:
        if start > 0:
            file.seek(start - 1)
            file.readline()  # the end of the line before; of one that ends right before `start`, its end alone
        at = file.tell()
        while at < stop and (line := file.readline()):
            if line.strip():
                yield _json_line(f"{name}, byte {at}", line)
            at += len(line)


def _is_array(path: Path) -> bool:
    with _opened(path) as file:
        start = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        while not start.strip() and (more := file.read(1024)):
            start = more
        return start.lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[Any]:
    """The elements of a file that holds a JSON array; ValueError where it is none from there on."""
    decode = json.JSONDecoder().raw_decode
    with _opened(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8-sig")
        text, at, more = "", 0, True

        def grow() -> None:
            """Read as much again as there is, so that a long element is not parsed too often."""
            nonlocal text, at, more
            read = file.read(max(_CHARACTERS, len(text) - at))
            text, at, more = text[at:] + read, 0, bool(read)

        def next_character() -> str:
            nonlocal at
            at = WHITESPACE.match(text, at).end()
            while at == len(text) and more:
                grow()
                at = WHITESPACE.match(text, at).end()
            return text[at : at + 1]

        if next_character() != "[":
            raise ValueError("no array")
        at += 1
        if next_character() == "]":
            return
        while True:
            next_character()
            try:
                value, end = decode(text, at)
                is_cut = end >= len(text) - _CUT_SHORT  # a number may go on
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(text) - _CUT_SHORT or error.msg.startswith("Unterminated string")
                if not (is_cut and more):
                    raise
            if is_cut and more:
                grow()
                continue
            yield value
            at = end
            separator = next_character()
            at += 1
            if separator == "]":
                return
            if separator != ",":
                raise ValueError("no comma")


def _array_elements(name: str, path: Path) -> Iterator[_Found]:
    number = 0
    try:
        for number, value in enumerate(_json_array(path), start=1):
            yield _Found(f"{name}:{number}", value)
    except DataError:
        raise  # the file can't be read
    except (ValueError, RecursionError) as error:  # broken UTF-8 is a ValueError, too
        raise DataError(
            f"{path} is no JSON array of UTF-8 behind its element {number}: {reason(error)}. Mend it or leave it out."
        ) from error


def _json_lines_rows(name: str, path: Path, fields: Fields) -> Iterator[Row]:
    return _rows_of_objects(name, _json_lines(name, path), fields)


def _json_rows(name: str, path: Path, fields: Fields) -> Iterator[Row]:
    found = _array_elements(name, path) if _is_array(path) else _json_lines(name, path)
    return _rows_of_objects(name, found, fields)


def _json_first_fields(path: Path) -> Collection[str] | None:
    """Those of an array's first element, or of a first line that is whole."""
    with suppress(ValueError, RecursionError):
        if _is_array(path):
            first = next(_json_array(path), None)
        else:
            first = next((found.value for found in _json_lines("", path)), None)
        if isinstance(first, dict):
            return sorted(first)
    return None


@contextmanager
def _csv(path: Path, delimiter: str) -> Iterator[Iterator[list[str]]]:
    """The lines of a CSV file; what is no UTF-8 is carried as surrogates."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _opened(path) as lines:
            texts = (
                line.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").decode("utf-8", "surrogateescape")
                for number, line in enumerate(lines)
            )
            yield csv.reader(texts, delimiter=delimiter)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(name: str, path: Path, fields: Fields, delimiter: str = ",") -> Iterator[Row]:
    number = 0
    try:
        with _csv(path, delimiter) as lines:
            header = next(lines, [])
            require_fields(fields, header, name)
            columns = [header.index(field) for field in fields.values()]
            for number, line in enumerate((line for line in lines if line), start=1):
                row_name = f"{name}:{number}"
                if len(line) <= max(columns):
                    yield Row(row_name, None, "fewer columns than the header")
                elif any(_is_broken(line[column]) for column in columns):
                    yield Row(row_name, None, "not UTF-8")
                else:
                    yield Row(row_name, tuple(line[column] for column in columns))
        if not number:
            yield Row(name, None, "empty")
    except csv.Error as error:
        raise DataError(f"{path} is no CSV behind its row {number}: {error}. Mend it or leave it out.") from error


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _csv_first_fields(path: Path, delimiter: str = ",") -> Collection[str] | None:
    with suppress(csv.Error), _csv(path, delimiter) as lines:
        return next(lines, None) or None
    return None


class RowGroup(NamedTuple):
    """A part of a Parquet file that can be read without those before it."""

    rows: int
    size: int
    """Bytes of the fields asked for, as they are before compression."""


def parquet_groups(name: str, path: Path, fields: Fields) -> list[RowGroup]:
    """The parts of a Parquet file whose `fields` are texts, by its footer.

    Raises:
        DataError: it can't be read, lacks a field, or has something else than texts in one.
    """
    import pyarrow

    types = pyarrow.types
    with _parquet(path) as file:
        require_fields(fields, file.schema_arrow.names, name)
        for setting, field in fields.items():
            kind = file.schema_arrow.field(field).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
                raise DataError(
                    f"{name} has a field {field!r} of the type {kind}, not of texts. Set `{setting}` to one of texts."
                )
        found = []
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = (group.column(index) for index in range(group.num_columns))
            sizes = (one.total_uncompressed_size for one in columns if one.path_in_schema in fields.values())
            found.append(RowGroup(group.num_rows, sum(sizes)))
        return found


def parquet_rows(name: str, path: Path, fields: Fields, groups: range | None = None) -> Iterator[Row]:
    """The rows of a Parquet file; of its row groups of these numbers alone, where they are given.

    Raises:
        DataError: it can't be read, or lacks a field.
    """
    with _parquet(path) as file:
        require_fields(fields, file.schema_arrow.names, name)
        if file.metadata.num_rows == 0:
            yield Row(name, None, "empty")
        wanted = range(file.metadata.num_row_groups) if groups is None else groups
        number = sum(file.metadata.row_group(before).num_rows for before in range(wanted.start))
        columns = sorted(set(fields.values()))
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, row_groups=list(wanted), columns=columns):
            values_of = [batch.column(field).to_pylist() for field in fields.values()]
            for values in zip(*values_of, strict=True):
                number += 1
                yield Row(f"{name}:{number}", values)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """An open Parquet file; DataError when it can't be read, then or later."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {first_line(error).rstrip('.')}. Restore it or leave it out."
        ) from error


_FORMATS = {
    ".jsonl": RowFormat(_json_lines_rows),
    ".ndjson": RowFormat(_json_lines_rows),
    ".json": RowFormat(_json_rows, _json_first_fields),
    ".csv": RowFormat(_csv_rows, _csv_first_fields),
    ".tsv": RowFormat(partial(_csv_rows, delimiter="\t"), partial(_csv_first_fields, delimiter="\t")),
    ".parquet": RowFormat(parquet_rows),
}
