"""The shards of a Hugging Face dataset that is streamed: those that `datasets` has, of Parquet files their row groups.

A dataset on the Hub is read from one commit, that which its branch had when the stream was prepared.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from auxin.data.row_files import require_fields
from auxin.data.shard_plan import FileOfSource, Shard, ShardPlan, refuse_changed, stamp
from auxin.data.sources import Document, text_document
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.errors import DataError, first_line

_FEW = 256
"""Of fewer shards each file is cut at its row groups; of more, looking into each would take long."""
_ROWS_PER_BATCH = 64


def plan_dataset(settings: StreamedTextSettings, revision: str | None = None) -> tuple[ShardPlan, list[Document]]:
    """The shards of the dataset that `settings` name; at a commit, where one is given.

    Raises:
        DataError: it can't be found or reached, has no such split, or its rows no text.
    """
    files, revision = _files(settings, revision)
    shards = _stream(settings, revision).num_shards
    return ShardPlan(
        files=tuple(files),
        shards=tuple(Shard(number, 0, 0, 0, 0) for number in range(shards)),
        revision=revision,
    ), []


def read_dataset(plan: ShardPlan, number: int, settings: StreamedTextSettings) -> Iterator[Document]:
    """The documents of a shard, in their order, one at a time.

    Raises:
        DataError: it can't be read, or has changed.
    """
    for entry in plan.files:
        if entry.modified:
            refuse_changed(entry)
    stream, row = _kept_stream(settings, plan.revision), 0
    if stream.num_shards != len(plan.shards):
        raise DataError(
            f"{_named(settings)} has {stream.num_shards} shards, and had {len(plan.shards)}. Put it back as it was, or "
            "prepare the data anew in another folder."
        )
    try:
        for batch in stream.shard(num_shards=len(plan.shards), index=number).iter(batch_size=_ROWS_PER_BATCH):
            for value in batch[settings.text_field]:
                row += 1
                yield text_document(f"{settings.name}, shard {number}:{row}", value)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        raise _unreadable(settings, error, f"shard {number} behind its row {row}") from error


def _files(settings: StreamedTextSettings, revision: str | None) -> tuple[list[FileOfSource], str | None]:
    """The data files of the split with what tells their content, and the commit of the Hub that they are of."""
    files = _builder(settings, revision).config.data_files
    names = (files or {}).get(settings.split, ())
    origins = getattr(names, "origin_metadata", None) or [()] * len(names)
    found, commits = [], set()
    for name, origin in zip(names, origins, strict=True):
        if os.path.isfile(name):
            found.append(stamp(name, Path(name)))
            continue
        if len(origin) == 2:  # of a file on the Hub: the repository and the commit
            commits.add(origin[1])
        found.append(FileOfSource(name, name, 0, 0, " ".join(map(str, origin))))
    return found, commits.pop() if len(commits) == 1 else revision


def _builder(settings: StreamedTextSettings, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(settings.name, settings.config, revision=revision)
    # Depending on what is missing, datasets raises its own, requests', httpx's or Python's errors.
    except Exception as error:
        raise _unreadable(settings, error) from error


def _stream(settings: StreamedTextSettings, revision: str | None) -> Any:
    """The split as a stream of its texts alone, in as many shards as it has."""
    try:
        stream = _builder(settings, revision).as_streaming_dataset(split=settings.split)
        if stream.num_shards < _FEW:
            stream = stream.reshard()
        names = stream.column_names
        if names is None:
            names = list(next(iter(stream), {}))
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(settings, error) from error
    require_fields({"text_field": settings.text_field}, names, _named(settings))
    return stream.select_columns([settings.text_field])


_kept_stream = lru_cache(maxsize=2)(_stream)
"""Looking up the dataset takes long where it is on the Hub, and every shard asks for it."""


def _named(settings: StreamedTextSettings) -> str:
    return f"The dataset {settings.name!r}" + (f" ({settings.config})" if settings.config else "")


def _unreadable(settings: StreamedTextSettings, error: Exception, where: str | None = None) -> DataError:
    what = f", split {settings.split!r}" if where is None else f", split {settings.split!r}, {where}"
    return DataError(
        f"{_named(settings)}{what}, could not be streamed: {type(error).__name__}: {first_line(error).rstrip('.')}. "
        "Check the name, config and split, that its files are whole, and that the Hub can be reached."
    )
