"""Images with a class for each: folders of them by class, or rows; read once, split by content, kept as pixels.

Pixels are kept as whole numbers of 0 to 255, as many bytes as there are, and become a model's numbers when a batch is
made, by the image processor that goes with the model.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from auxin.data.collecting import Collected, ReadReport
from auxin.data.dataset import DatasetKind, ProgressCallback, SampleForm, SplitName, save_processor
from auxin.data.image_source import LabelledImagesSettings, image_documents, image_form
from auxin.data.labels import classes_of, counted
from auxin.data.packing import ContextWriter, DocumentSpool
from auxin.data.pictures import PictureReader, processor_digest, read_processor
from auxin.data.preparing import Begun, Manifest, Prepared, Steps, open_array, prepare_folder, write_array
from auxin.settings import Settings

FORMAT = 1
PROCESSOR = "processor"
"""The folder of the image processor in that of the data."""


class ImageSplitReport(Settings):
    """What one split holds."""

    images: int
    labels: tuple[int, ...]
    """How many of them each class has, in the order of the classes."""
    sha256: str
    """Digest of the pixels."""
    labels_sha256: str


class LabelledImagesReport(ReadReport):
    """What became of every image of the source, and what the splits hold."""

    labels: tuple[str, ...]
    """The classes, in the order of their numbers."""
    train: ImageSplitReport
    validation: ImageSplitReport


class _Manifest(Manifest):
    """What labelled_images.json holds."""

    settings: LabelledImagesSettings
    report: LabelledImagesReport
    shape: tuple[int, int, int]
    loaded_processor_digest: str | None


class LabelledPixels:
    """Images and their labels as a split of samples; see `dataset.Split`.

    Args:
        pixels: values of 0 to 255, (images, channels, height, width).
        labels: numbers of the classes, (images,).
        table: what a batch holds for each value of each channel, (channels, 256).
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, table: np.ndarray) -> None:
        self.pixels, self.labels, self.table = pixels, labels, table

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values` (rows, channels, height, width), 32-bit floats; `labels` (rows,), 64-bit integers."""
        chosen = list(rows)
        pixels = self.pixels[chosen]
        values = self.table[np.arange(len(self.table))[:, None, None], pixels]
        return {
            "pixel_values": torch.from_numpy(values),
            "labels": torch.from_numpy(self.labels[chosen].astype(np.int64)),
        }


class LabelledImages(Prepared[_Manifest]):
    """Prepared labelled images: memory-mapped pixels with their labels, the processor, and what they were made of."""

    noun: ClassVar[str] = "set of labelled images"
    manifest_file: ClassVar[str] = "labelled_images.json"
    manifest_class: ClassVar[type[Manifest]] = _Manifest
    version: ClassVar[int] = FORMAT
    bytes_per_unit: ClassVar[None] = None
    """There is no text."""

    def _open(self) -> None:
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in ("train", "validation"):
            images = self._of(name).images
            flat = open_array(self.directory / f"{name}.npy", (images, math.prod(self.manifest.shape)), (np.uint8,))
            labels = open_array(self.directory / f"{name}-labels.npy", (images,), (np.int32,))
            self._arrays[name] = flat.reshape(images, *self.manifest.shape), labels

    def _of(self, name: str) -> ImageSplitReport:
        return self.report.train if name == "train" else self.report.validation

    def _digests(self) -> Iterator[tuple[str, np.ndarray, str]]:
        for name, (pixels, labels) in self._arrays.items():
            yield f"{name}.npy", pixels, self._of(name).sha256
            yield f"{name}-labels.npy", labels, self._of(name).labels_sha256

    @property
    def named_digest(self) -> str | None:
        """Of the processor that the settings named."""
        return self.manifest.loaded_processor_digest

    @property
    def settings(self) -> LabelledImagesSettings:
        """The settings that they were prepared with."""
        return self.manifest.settings

    @property
    def report(self) -> LabelledImagesReport:
        """Images kept, removed and skipped, and what the splits hold."""
        return self.manifest.report

    @cached_property
    def form(self) -> SampleForm:
        """Labelled images."""
        return image_form(self.settings, self.report.labels, self.manifest.shape)

    @cached_property
    def _table(self) -> np.ndarray:
        return PictureReader(self.processor(), self.settings.num_channels).table

    def processor(self) -> Any:
        """The image processor, which makes of an image of the source what a batch holds for it."""
        return read_processor(self.directory / PROCESSOR)

    def split(self, name: SplitName) -> LabelledPixels:
        """The images of one split."""
        return LabelledPixels(*self._arrays[name], self._table)

    def describe(self) -> dict[str, str]:
        """What the images are, how many each class has, and what became of the others."""
        report = self.report
        channels, height, width = self.manifest.shape
        return {
            "source": self.settings.source,
            "images": f"{report.documents:,}",
            "left out": report.describe_left_out(),
            "pixels": f"{height} x {width}, {'grey' if channels == 1 else 'in colour'}",
            "training images": counted(report.train.images, report.labels, report.train.labels),
            "validation images": counted(report.validation.images, report.labels, report.validation.labels),
        }


def prepare(
    settings: LabelledImagesSettings, directory: str | Path, progress: ProgressCallback | bool = False
) -> LabelledImages:
    """Prepare labelled images in `directory`, or open those that are there; see `prepare_folder`.

    Of images whose pixels are equal once they have the model's size, one is kept, if their labels are equal, too; of
    those with another label the first is kept and the others are reported.

    Raises:
        DataError: the source can't be used, an image can't be read, a label is unknown, a class has no training
            example, a split would be empty, or the folder holds something else.
    """
    return prepare_folder(Steps(LabelledImages, image_documents, _begin, "image"), settings, directory, progress)


def _begin(settings: LabelledImagesSettings) -> Begun:
    reader = settings.reader()
    digest = None if settings.processor is None else processor_digest(reader.processor)

    def build(collected: Collected, directory: Path, advance: ProgressCallback) -> dict[str, Any]:
        spools = {"train": collected.train, "validation": collected.validation}
        counts = {name: Counter(_label(content) for content in spool.contents()) for name, spool in spools.items()}
        labels = classes_of(settings, counts, "images")
        splits = {name: _write_split(name, spool, labels, directory, advance) for name, spool in spools.items()}
        save_processor(reader.processor, directory / PROCESSOR)
        report = LabelledImagesReport(
            **collected.report(), labels=labels, train=splits["train"], validation=splits["validation"]
        )
        content = {
            "format": FORMAT,
            "documents": collected.digest(),
            "shape": reader.shape,
            "table": hashlib.sha256(reader.table.tobytes()).hexdigest(),
            "validation_fraction": settings.validation_fraction,
            "seed": settings.seed,
            "labels": labels,
            "splits": [[split.sha256, split.labels_sha256] for split in splits.values()],
        }
        fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        own = {"shape": reader.shape, "loaded_processor_digest": digest}
        return {"fingerprint": fingerprint, "report": report, **own}

    return Begun(build, f"The image processor {settings.processor}", digest)


def _label(content: bytes) -> str:
    return str(json.loads(content.partition(b"\0")[0]))


def _write_split(
    name: str, spool: DocumentSpool, labels: tuple[str, ...], directory: Path, advance: ProgressCallback
) -> ImageSplitReport:
    numbers = {label: number for number, label in enumerate(labels)}
    found: list[int] = []
    writer: ContextWriter | None = None
    for content in spool.contents():
        label, _, pixels = content.partition(b"\0")
        writer = writer or ContextWriter(directory / f"{name}.npy", len(pixels), np.dtype(np.uint8))
        writer.write(np.frombuffer(pixels, np.uint8))
        found.append(numbers[json.loads(label)])
        advance(name, len(found), len(spool))
    assert writer is not None  # a split without an image was refused
    _, digest = writer.finish()
    array = np.array(found, dtype=np.int32)
    write_array(directory / f"{name}-labels.npy", array)
    return ImageSplitReport(
        images=len(array),
        labels=tuple(np.bincount(array, minlength=len(labels)).tolist()),
        sha256=digest,
        labels_sha256=hashlib.sha256(array.tobytes()).hexdigest(),
    )


DATASET = DatasetKind("labelled_images", LabelledImagesSettings, prepare)
