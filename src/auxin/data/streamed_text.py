"""Packed text of a corpus that is too large to be prepared before a training: a sample is read first, and the rest
while it is learnt.

Prepared are the tokenizer, the held-out contexts of the sample, and the plan of the shards. Shards become contexts when
the order of the training comes to them (`shard_cache`), by a process that works ahead (`shards_ahead`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from auxin.data.collecting import Collected
from auxin.data.corpus import PackedData
from auxin.data.dataset import DatasetKind, ProgressCallback, SampleForm, SplitName
from auxin.data.huggingface_shards import plan_dataset, read_dataset
from auxin.data.loader import Contexts, permutation
from auxin.data.packing import DocumentSpool, SplitReport, pack, token_dtype
from auxin.data.prepared_text import PreparedText, TextManifest, TextReport, with_tokenizer
from auxin.data.preparing import Manifest, Steps, open_array, other_settings, prepare_folder
from auxin.data.settings import packed_form
from auxin.data.shard_cache import Cutting, ShardCache
from auxin.data.shard_plan import ShardPlan, plan_files, read_files, refuse_other_files, touched
from auxin.data.shards_ahead import ShardsAhead
from auxin.data.sources import Document
from auxin.data.stream_order import StreamOrder, place_of
from auxin.data.streamed_settings import StreamedTextSettings
from auxin.data.tokenizer import load_tokenizer, plain_backend, tokenizer_digest, vocabulary_fields
from auxin.errors import ConfigError, DataError, reason
from auxin.files import write_text

FORMAT = 1
SHARDS = "shards"
"""The folder of tokenized shards in that of the stream."""
_PLAN = "plan.json"
_PLACES = 8
"""Of the corpus, from which the sample is taken."""


class StreamReport(TextReport):
    """What became of every document of the sample, and what there is beside it."""

    validation: SplitReport
    """The held-out documents of the sample."""
    shards: int
    """Of the whole corpus."""
    source_bytes: int | None
    """About how many bytes the whole corpus has, as it is stored but not compressed; None: not known."""


class _Manifest(TextManifest):
    """What stream.json holds."""

    settings: StreamedTextSettings
    separator: int
    report: StreamReport


class StreamedText(PreparedText[_Manifest]):
    """A prepared stream: the held-out contexts of a sample, a tokenizer, and shards that are read when they are
    needed."""

    noun: ClassVar[str] = "stream"
    manifest_file: ClassVar[str] = "stream.json"
    manifest_class: ClassVar[type[Manifest]] = _Manifest
    version: ClassVar[int] = FORMAT

    def _open(self) -> None:
        report = self.report.validation
        shape = (report.contexts, self.context_length)
        self.validation = open_array(self.directory / "validation.npy", shape, (np.uint16, np.uint32))
        """Token ids of the held-out documents of the sample, (num_contexts, context_length)."""
        self._ahead = ShardsAhead(self.directory)

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that read batches: opened there anew."""
        return type(self), (self.directory, self.manifest)

    def _digests(self) -> Iterator[tuple[str, np.ndarray, str]]:
        yield "validation.npy", self.validation, self.report.validation.sha256

    @property
    def settings(self) -> StreamedTextSettings:
        """The settings that it was prepared with."""
        return self.manifest.settings

    @property
    def report(self) -> StreamReport:
        """The sample's documents kept, removed and skipped, and the number of shards."""
        return self.manifest.report

    def of(self, settings: StreamedTextSettings) -> Self:
        """The same with those settings that decide no sample."""
        return type(self)(self.directory, self.manifest.model_copy(update={"settings": settings}))

    @cached_property
    def form(self) -> SampleForm:
        """Contexts of tokens."""
        return packed_form(self.settings, self.vocab_size, self.tokenizer())

    @overload
    def split(self, name: Literal["validation"]) -> Contexts: ...

    @overload
    def split(self, name: Literal["train"]) -> "TextStream": ...

    def split(self, name: SplitName) -> "Contexts | TextStream":
        """The held-out contexts, or those of the shards."""
        return Contexts(self.validation) if name == "validation" else TextStream(self)

    @property
    def bytes_per_unit(self) -> float:
        """UTF-8 bytes of text per token of the packed validation split, as `PackedData` has it."""
        return self.report.validation.packed_bytes / self.report.validation.tokens

    @cached_property
    def plan(self) -> ShardPlan:
        """The shards.

        Raises:
            DataError: the file is damaged.
        """
        path = self.directory / _PLAN
        try:
            return ShardPlan.parse(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # a ConfigError is a ValueError
            why = str(error) if isinstance(error, ConfigError) else reason(error)
            raise DataError(
                f"{path} is damaged: {why.rstrip('.')}. Delete {self.directory} and prepare again."
            ) from error

    def documents(self, number: int) -> Iterable[Document]:
        """The documents of a shard, held-out ones too, in their order.

        Raises:
            DataError: it can't be read, or has changed.
        """
        return _read(self.plan, number, self.settings)

    def new_cache(self, read: Callable[[int], Iterable[Document]]) -> ShardCache:
        """The tokenized shards, of documents that `read` yields."""
        backend, dtype = plain_backend(self.tokenizer()), token_dtype(self.vocab_size)
        cutting = Cutting(self.settings, backend, self.manifest.separator, self.context_length, dtype)
        return ShardCache(self.directory / SHARDS, read, cutting, self.plan.named, 2 * self.settings.shuffle_shards)

    @cached_property
    def cache(self) -> ShardCache:
        """The tokenized shards."""
        return self.new_cache(self.documents)

    @property
    def ahead(self) -> ShardsAhead:
        """What tokenizes shards before they are needed."""
        return self._ahead

    def describe(self) -> dict[str, str]:
        """What the documents are, and what became of those of the sample."""
        size = self.report.source_bytes
        return {
            "source": self.settings.source,
            "shards": f"{self.report.shards:,}" + ("" if size is None else f", about {size:,} bytes"),
            "documents of the sample": f"{self.report.documents:,}",
            "left out of the sample": self.report.describe_left_out(),
            "vocabulary": f"{self.vocab_size:,}",
            "context length": f"{self.context_length:,}",
            "validation tokens": f"{self.report.validation.tokens:,}",
        }


def held_out_text(directory: str | Path) -> PackedData | StreamedText:
    """The prepared text in `directory`, a corpus or a stream, whose held-out contexts are there to be scored.

    Raises:
        DataError: there is none, or it is damaged.
    """
    kind = StreamedText if (Path(directory) / StreamedText.manifest_file).is_file() else PackedData
    return kind.load(directory)


class TextStream:
    """The contexts of the shards; see `dataset.Stream`."""

    def __init__(self, data: StreamedText) -> None:
        self._data = data
        self._window: list[int] = []
        self._before: list[int] = []

    @property
    def about(self) -> int | None:
        """Contexts, estimated by the bytes of the corpus and the tokens that those of the sample made."""
        size, data = self._data.report.source_bytes, self._data
        if size is None:
            return None
        learnt = size * (1 - data.settings.validation_fraction)
        return round(learnt / data.bytes_per_unit / data.context_length)

    def order(self, batch_size: int, seed: int, position: int = 0) -> StreamOrder:
        """Batches by `seed`; the shards that those from number `position` on need first are tokenized at once.

        Raises:
            DataError: one can't be read, or none has a context.
        """
        shards, window = len(self._data.plan.shards), self._data.settings.shuffle_shards
        return StreamOrder(shards, window, seed, batch_size, self._contexts, self._ready, position)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` (rows, context_length), 64-bit integers, of contexts by the numbers of an order.

        Raises:
            DataError: a shard that was removed from the disk meanwhile can't be read any more.
        """
        places = map(place_of, rows)
        found = np.stack([self._data.cache.array(shard)[row] for shard, row in places])
        return {"input_ids": torch.from_numpy(found.astype(np.int64))}

    def close(self) -> None:
        """End the process that works ahead; the next window starts it again."""
        self._data.ahead.end()

    def _contexts(self, shard: int) -> int | None:
        record = self._data.cache.known(shard)
        return None if record is None else record.contexts

    def _ready(self, shards: Sequence[int], behind: Sequence[int]) -> None:
        """Make a window ready together with the process that works ahead, which begins at its other end."""
        cache = self._data.cache
        self._data.ahead.ask([*reversed(shards[1:]), *behind])
        for shard in shards:
            cache.ensure(shard)
        if list(shards) != self._window:  # which is made ready twice where its contexts had to be counted
            self._before, self._window = self._window, list(shards)
        # Processes that read batches may be behind by a window.
        cache.keep({*self._before, *shards, *behind}, self._data.settings.cache_bytes)


def prepare(
    settings: StreamedTextSettings, directory: str | Path, progress: ProgressCallback | bool = False
) -> StreamedText:
    """Prepare a stream in `directory`, or open the one that is there; see `prepare_folder`.

    Args:
        settings: the stream.
        directory: the folder to fill; the tokenized shards are kept in it, too.
        progress: a callback, or True for progress bars.

    Raises:
        DataError: the source can't be used or has changed, the sample has no held-out document, or the folder holds
            something else.
    """
    directory = Path(directory).absolute()
    before = _there(settings, directory)
    plan, left_out = _plan(settings, None if before is None else before.plan.revision)
    if before is not None:
        refuse_other_files(before.plan, plan, directory)
        before.cache.refuse_other_documents(touched(before.plan, plan))
    begin = with_tokenizer(load_tokenizer, DocumentSpool.texts, partial(_build, plan=plan))
    steps = Steps(StreamedText, partial(_sample, plan, left_out), begin)
    return prepare_folder(steps, settings, directory, progress).of(settings)


def _there(settings: StreamedTextSettings, directory: Path) -> StreamedText | None:
    """The stream of the same settings in `directory`; None where there is none, or what is wrong is told later."""
    if (directory / StreamedText.manifest_file).is_file():
        data = StreamedText.load(directory)
        if not other_settings(data.settings, settings):
            return data
    return None


def _plan(settings: StreamedTextSettings, revision: str | None) -> tuple[ShardPlan, list[Document]]:
    return plan_dataset(settings, revision) if settings.source == "huggingface" else plan_files(settings)


def _read(plan: ShardPlan, number: int, settings: StreamedTextSettings) -> Iterator[Document]:
    return (read_dataset if settings.source == "huggingface" else read_files)(plan, number, settings)


def _sample(plan: ShardPlan, left_out: Sequence[Document], settings: StreamedTextSettings) -> Iterator[Document]:
    """The documents that are read before a training begins: the first ones of shards in an order by the seed, of each
    its share of the bytes."""
    yield from left_out
    order = permutation(len(plan.shards), f"{settings.seed}:sample").tolist()
    share = settings.sample_bytes / min(_PLACES, len(order))
    left = settings.sample_bytes
    for number in order:
        own = 0
        for document in _read(plan, number, settings):
            yield document
            own += len(document.data or b"")
            if own >= share:
                break
        left -= own
        if left <= 0:
            return


def _build(
    settings: StreamedTextSettings,
    collected: Collected,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    advance: ProgressCallback,
    plan: ShardPlan,
) -> dict[str, Any]:
    vocab_size = vocabulary_fields(tokenizer)["vocab_size"]
    backend, separator = plain_backend(tokenizer), int(tokenizer.eos_token_id)
    spool, path = collected.validation, directory / "validation.npy"

    def told(done: int) -> None:
        advance("validation", done, spool.size)

    held_out = pack(spool, backend, separator, path, settings.context_length, token_dtype(vocab_size), told)
    write_text(directory / _PLAN, plan.model_dump_json())
    report = StreamReport(
        **collected.report(),
        vocab_size=vocab_size,
        validation=held_out,
        shards=len(plan.shards),
        source_bytes=plan.size,
    )
    fingerprint = _fingerprint(settings, plan, tokenizer_digest(tokenizer), held_out)
    return {"fingerprint": fingerprint, "report": report, "separator": separator}


def _fingerprint(settings: StreamedTextSettings, plan: ShardPlan, tokenizer: str, held_out: SplitReport) -> str:
    content = {
        "format": FORMAT,
        "files": [[Path(entry.name).name, entry.size, entry.digest] for entry in plan.files],
        "shards": plan.shards,
        "revision": plan.revision,
        "text_field": settings.text_field,
        "tokenizer": tokenizer,
        "context_length": settings.context_length,
        "validation_fraction": settings.validation_fraction,
        "seed": settings.seed,
        "shuffle_shards": settings.shuffle_shards,
        "validation": held_out.sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


DATASET = DatasetKind("streamed_text", StreamedTextSettings, prepare)
