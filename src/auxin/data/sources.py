"""Documents and rows from the standard library, local files and Hugging Face datasets, with the reason if skipped."""

import glob
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from auxin.data.row_files import Fields, Row, RowFormat, packed, read_file, require_fields, row_format
from auxin.data.settings import SourceSettings, TextSettings
from auxin.errors import DataError

# Folders of the standard library that hold no source of its own, or its tests.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_ROWS_PER_BATCH = 1024
_MOST_NAMES = 10


class Document(NamedTuple):
    """A document's UTF-8 bytes, or the reason why it was skipped (then `data` is None)."""

    name: str
    data: bytes | None
    skipped: str | None = None
    content: bytes | None = None
    """What makes it another document than others, where that is not all of `data`."""
    side: bytes | None = None
    """What decides whether it is held out, where that is not all that makes it another document."""


def read_documents(settings: TextSettings) -> Iterator[Document]:
    """Yield every document of the source, in a fixed order, one at a time.

    A file whose ending need not mean rows (JSON, CSV) is read as rows where the first one has the text field. Else it
    is one document, which a warning says, unless it is named in `paths` itself: then rows are meant, and it is refused.

    Raises:
        DataError: the source can't be found or reached, or its rows have no text field.
    """
    fields = {"text_field": settings.text_field}
    if settings.source == "huggingface":
        yield from map(row_document, _huggingface_rows(settings, fields))
        return
    whole: list[str] = []
    for file in source_files(settings):
        name, path = file.name, file.path
        if file.skipped is not None:
            yield Document(name, None, file.skipped)
            continue
        form = rows_of_texts(path, settings)
        if form is None:
            yield whole_document(name, path)
            if has_other_rows(path):
                whole.append(name)
        else:
            yield from map(row_document, form.rows(name, path, fields))
    if whole:
        warn_of_other_rows(whole, settings.text_field)


def rows_of_texts(path: Path, settings: TextSettings) -> RowFormat | None:
    """How a file that a source names holds a document in each row; None where it is one document."""
    form = row_format(path)
    if form is None or form.first_fields is None:
        return form
    found = form.first_fields(path)
    named = (other.expanduser() for other in settings.paths)
    # In a folder of sources, rows of other fields may be text like all else.
    return form if found is not None and (settings.text_field in found or path in named) else None


def has_other_rows(path: Path) -> bool:
    """Whether a file that is one document holds rows all the same, of other fields than the text's."""
    form = row_format(path)
    return form is not None and form.first_fields is not None and form.first_fields(path) is not None


def whole_document(name: str, path: Path) -> Document:
    """The document that a file is.

    Raises:
        DataError: it can't be read.
    """
    return _checked(name, read_file(path))


def warn_of_other_rows(whole: list[str], field: str) -> None:
    """Say which files are one document each although they hold rows."""
    names = ", ".join(whole[:_MOST_NAMES]) + (", ..." if len(whole) > _MOST_NAMES else "")
    warnings.warn(
        f"{len(whole):,} files hold rows without a field {field!r} and are one document each, as they are: {names}. "
        "Set `text_field` if a field of theirs is meant.",
        stacklevel=1,
    )


def read_rows(settings: SourceSettings, fields: Fields) -> Iterator[Row]:
    """Yield the values of `fields` of every row of the source, in a fixed order, one row at a time.

    Rows are those of JSON lines, JSON arrays, CSV, Parquet and Hugging Face datasets; other files have none and are
    skipped as a whole.

    Raises:
        DataError: the source can't be found or reached, or its rows lack a field.
    """
    if settings.source == "huggingface":
        yield from _huggingface_rows(settings, fields)
        return
    for file in source_files(settings):
        name, path = file.name, file.path
        if file.skipped is not None:
            yield Row(name, None, file.skipped)
            continue
        form = row_format(path)
        if form is None or (form.first_fields is not None and form.first_fields(path) is None):
            yield Row(name, None, "holds no rows")
        else:
            yield from form.rows(name, path, fields)


class SourceFile(NamedTuple):
    """One thing that a source names."""

    name: str
    path: Path
    left_out: str | None = None
    """Why it is no part of the source, where a folder holds what is hidden, or no file."""

    @property
    def skipped(self) -> str | None:
        """Why it is not read; None where it is."""
        return self.left_out or packed(self.path)


def source_files(settings: SourceSettings) -> list[SourceFile]:
    """The files of a `stdlib` or `files` source, sorted by name, each once.

    Raises:
        DataError: a path does not exist, a glob matches nothing, or there is no readable standard library.
    """
    if settings.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found: list[SourceFile] = []
        for folder, folders, files in os.walk(root):
            folders[:] = set(folders) - _NOT_STDLIB
            paths = [Path(folder, file) for file in files if file.endswith(".py")]
            found += [SourceFile(path.relative_to(root).as_posix(), path) for path in paths]
        if not found:
            raise DataError(f"{root} holds no .py files of the standard library. Use source 'files' instead.")
        return sorted(found)
    # The same file can be named by a folder and by a glob.
    named: dict[Path, SourceFile] = {}
    for pattern in settings.paths:
        for path, left_out in _expand(pattern.expanduser()):
            # A link to a folder is no second name for what it leads to.
            place = path.resolve() if left_out is None else path.absolute()
            named.setdefault(place, SourceFile(str(path), path, left_out))
    return sorted(named.values(), key=lambda entry: entry.name)


def source_signature(settings: SourceSettings) -> str | None:
    """A cheap digest (names, sizes, times) that stays equal while no file is touched; None for a remote source."""
    if settings.source == "huggingface":
        return None
    digest = hashlib.sha256()
    for name, path, left_out in source_files(settings):
        if left_out is not None:
            continue
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _expand(pattern: Path) -> list[tuple[Path, str | None]]:
    """The files that one entry of `paths` names; with what a folder holds beside them, and why it is left out."""
    if pattern.is_file():
        return [(pattern, None)]
    if pattern.is_dir():
        inside = ((path, _left_out(path, pattern)) for path in pattern.rglob("*"))
        found = [(path, why) for path, why in inside if why is not None or path.is_file()]
        matches = found if any(path.is_file() for path, _ in found) else []
    elif glob.has_magic(str(pattern)):
        matches = [(Path(path), None) for path in glob.glob(str(pattern), recursive=True) if Path(path).is_file()]
    elif pattern.exists():
        raise DataError(f"{pattern} is no file and no folder. Give a file, a folder or a glob.")
    else:
        raise DataError(f"{pattern} does not exist. Give an existing file, folder or glob.")
    if not matches:
        raise DataError(f"{pattern} matches no file. Give a folder or glob that holds files.")
    return matches


def _left_out(path: Path, folder: Path) -> str | None:
    """Why what lies in `folder` is not read; None for files and folders."""
    if path.is_symlink() and not path.is_file():
        return "link to a folder" if path.is_dir() else "link to nothing that is a file"
    if path.is_dir():
        return None
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return "hidden file"
    return None if path.is_file() else "no file"


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


def row_document(row: Row) -> Document:
    """The document of a row that holds a text alone."""
    return Document(row.name, None, row.skipped) if row.values is None else text_document(row.name, row.values[0])


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
    require_fields(fields, dataset.column_names, f"The {where}")
    rows = dataset.select_columns(sorted(set(fields.values())))
    number = 0
    for batch in rows.iter(batch_size=_ROWS_PER_BATCH):
        for values in zip(*(batch[field] for field in fields.values()), strict=True):
            number += 1
            yield Row(f"{settings.name}:{number}", values)
