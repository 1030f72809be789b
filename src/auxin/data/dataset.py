"""What data of any kind is to those who train on it: two splits, a fingerprint, and what a sample looks like.

A kind of data is one module: settings, a function that prepares them once into a folder, and the `Dataset` that opens
it. The order in which a stage sees the samples is nobody's own: `auxin.data.loader` draws it from the seed, for all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, overload

from torch import Tensor

from auxin.settings import Settings
from auxin.words.registry import Registry

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with what is being done, the amount done and the total (None: unknown)."""
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True)
class SampleForm:
    """What one sample looks like, as far as it is known: settings tell most of it before anything is read."""

    unit: str
    """What budgets and books count, in the singular: "token", "example", "image", ..."""
    units: int
    """Of those in one sample."""
    tensors: tuple[str, ...]
    """Names of what a batch holds, all with the samples along the first axis: "input_ids", "labels", ..."""
    length: int | None = None
    """Tokens of a sample, padding included; None where a sample is not made of tokens."""
    vocab_size: int | None = None
    """Every token id is below it; None: not known yet, or no tokens."""
    mask_token_id: int | None = None
    """The id that stands for a hidden token, where the tokenizer has one."""
    labels: tuple[str, ...] | None = None
    """Names of the classes, in the order of their numbers; None: not known yet, or no classes."""
    config_values: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a new model's config that the data decides: vocab_size, eos_token_id, ..."""

    def amount(self, samples: int) -> int:
        """Units in so many samples."""
        return samples * self.units


class Processor(Protocol):
    """What turns raw inputs into a model's: a tokenizer, an image processor, a feature extractor; of transformers."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write it into a folder, from which its Auto class loads it again."""


def save_processor(processor: Processor, folder: Path) -> None:
    """Write `processor` into `folder`.

    Raises:
        OSError: it can't be written; the tokenizers package reports a full disk by an exception of no class.
    """
    try:
        processor.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:
            raise OSError(str(error)) from error
        raise


class Split(Protocol):
    """Samples in a fixed order."""

    def __len__(self) -> int:
        """How many there are."""

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The samples of these numbers as a batch on the CPU, by the names of `SampleForm.tensors`."""


class BatchOrder(Protocol):
    """Endless batches in a fixed order."""

    def batch(self, position: int) -> list[int]:
        """The numbers of the samples of batch number `position`."""


class Stream(Protocol):
    """Samples that nobody has counted: what is learnt of data too large to be prepared before it is. They have an order
    of their own, which goes through all of them, and then again in another way."""

    @property
    def about(self) -> int | None:
        """How many samples there are, estimated; None: nothing is known of that."""

    def order(self, batch_size: int, seed: int, position: int = 0) -> BatchOrder:
        """Batches by `seed`; what those from number `position` on need first is made ready at once."""

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The samples of these numbers of an order, as `Split.rows` gives them."""

    def close(self) -> None:
        """End what works ahead, since nothing is drawn for now."""


class Dataset(Protocol):
    """Prepared data. Training, evaluation, prices and reports know no more of it than this."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that decides a batch; where the files lie does not matter."""

    @property
    def form(self) -> SampleForm:
        """What a sample looks like; nothing in it is unknown."""

    @property
    def bytes_per_unit(self) -> float | None:
        """UTF-8 bytes of text per unit of the held-out split, by which losses of a whole text become bits per byte;
        None: not text alone."""

    @overload
    def split(self, name: Literal["validation"]) -> Split: ...

    @overload
    def split(self, name: Literal["train"]) -> Split | Stream: ...

    def split(self, name: SplitName) -> Split | Stream:
        """What is learnt, or what is held out."""

    def processor(self) -> Processor | None:
        """What goes with a model that learns this, so that users can give it raw inputs; None: there is none."""

    def describe(self) -> dict[str, str]:
        """What a report says about the data, by heading."""


class DatasetSettings(Settings):
    """The base of every kind's settings; each has a field `kind: Literal["its-name"]`."""

    kind: str
    """Which kind of data this is."""
    decide_no_sample: ClassVar[frozenset[str]] = frozenset()
    """Fields with other values of which prepared data, and a run that has begun, can be used."""

    def form(self) -> SampleForm:
        """What a sample will look like, as far as the settings tell; nothing is read but a tokenizer that is named."""
        raise NotImplementedError


@dataclass(frozen=True)
class DatasetKind:
    """One kind of data. A module of `auxin.data` holds it as `DATASET`; other packages name theirs in the entry point
    group "auxin.datasets"."""

    name: str
    """By which recipes call it."""
    settings: type[DatasetSettings]
    prepare: Callable[[Any, Path, ProgressCallback | bool], Dataset]
    """(settings, directory, progress) -> the data, prepared in `directory` or opened there if it is finished. Raises
    DataError when the folder holds something else, or the source can't be used."""


def _kinds_in(loaded: Any) -> Iterator[tuple[str, DatasetKind]]:
    found = getattr(loaded, "DATASET", None) if isinstance(loaded, ModuleType) else loaded
    if found is not None:
        if not isinstance(found, DatasetKind):
            raise TypeError(f"{found!r} is a {type(found).__name__}, not an auxin.data.dataset.DatasetKind")
        yield found.name, found


DATASETS = Registry("kind of data", "auxin.data", _kinds_in, plural="datasets")
