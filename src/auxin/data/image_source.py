"""Where labelled images come from: the settings that say it, and how a file or a row becomes pixels with a class."""

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from auxin.data.dataset import SampleForm
from auxin.data.labels import LabelSettings
from auxin.data.pictures import ENDINGS, FILMS, PictureReader, made_processor, read_processor
from auxin.data.row_files import Row, read_file, row_format
from auxin.data.sources import Document, SourceFile, read_rows, source_files
from auxin.errors import DataError, placed

STANDARD_MEAN = STANDARD_STD = 0.5
"""Of each channel: values go from -1 to 1, as ViT's own processor has it."""


class LabelledImagesSettings(LabelSettings):
    """Labelled images: a folder for each class, Parquet or a Hugging Face dataset whose rows hold an image and its
    class.

    Raises:
        pydantic.ValidationError (ConfigError through `LabelledImagesSettings.parse`): a value is out of range, or a
            field that the source needs is missing.
    """

    kind: Literal["labelled_images"] = "labelled_images"
    """Says that these are labelled images."""
    source: Literal["files", "huggingface"] = "files"
    """`files`: the images and the files of rows among `paths`. `huggingface`: the dataset `name`."""
    paths: tuple[Path, ...] = ()
    """For `files`: files, folders (read recursively) and globs, a list or a single one. An image (PNG, JPEG, WebP, BMP,
    GIF, TIFF, PPM) has the class that its folder is called; `.parquet` holds rows. Other files are left out and
    counted."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Expected share of the images in the validation split. An image's side depends on its pixels and `seed` alone, so
    that it never changes when others are added, and equal images lie on one side."""
    max_documents: int | None = Field(default=None, ge=1)
    """Stop after this many distinct images, in the source's order; None reads all."""
    image_field: str = "image"
    """The field of a row that holds the image: the bytes of its file, or what Hugging Face datasets keep for one."""
    image_size: int | None = Field(default=None, ge=1, le=2**14)
    """Height and width in pixels; other images are resized to it, bilinear, whatever their shape. Needed without
    `processor`."""
    num_channels: Literal[1, 3] = 3
    """1: grey; an image in colour is then refused. 3: red, green and blue, which grey images have alike."""
    mean: tuple[float, ...] | None = None
    """What is taken from pixels, which go from 0 to 1; one number, or one for each channel. None: 0.5."""
    std: tuple[float, ...] | None = None
    """What they are divided by then. None: 0.5."""
    processor: Path | None = None
    """Instead of `image_size`, `mean` and `std`: the folder of a checkpoint, or of its image processor alone
    (`preprocessor_config.json`), which then says all that."""

    @model_validator(mode="before")
    @classmethod
    def _single_numbers(cls, values: Any) -> Any:
        if isinstance(values, dict):
            single = {key: (values[key],) for key in ("mean", "std") if isinstance(values.get(key), int | float)}
            return {**values, **single}
        return values

    @model_validator(mode="after")
    def _size_is_said_once(self) -> Self:
        if self.image_field == self.label_field:
            raise ValueError(f"image_field and label_field must differ; given: {self.image_field} for both")
        if self.processor is None and self.image_size is None:
            raise ValueError("image_size is missing. Give height and width in pixels, or a `processor`")
        for name in ("image_size", "mean", "std"):
            if self.processor is not None and getattr(self, name) is not None:
                raise ValueError(f"`processor` says {name} already. Leave `{name}` out, or `processor`")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) not in (1, self.num_channels):
                raise ValueError(f"{name} has {len(numbers)} numbers. Give one, or {self.num_channels}: one a channel")
            if not all(map(math.isfinite, numbers or ())) or (name == "std" and min(numbers or (1,)) <= 0):
                raise ValueError(
                    f"{name} is {', '.join(map(str, numbers))}. Give numbers{', above 0' * (name == 'std')}"
                )
        return self

    @property
    def fields(self) -> dict[str, str]:
        """What is read of a row, by the setting that names it."""
        return {"image_field": self.image_field, "label_field": self.label_field}

    def image_processor(self) -> Any:
        """The processor that is named, or that the settings make.

        Raises:
            DataError: the one that is named can't be loaded.
        """
        if self.processor is not None:
            return read_processor(self.processor)
        assert self.image_size is not None

        def each(numbers: tuple[float, ...] | None, standard: float) -> tuple[float, ...]:
            return numbers if numbers and len(numbers) > 1 else (numbers or (standard,)) * self.num_channels

        return made_processor(self.image_size, each(self.mean, STANDARD_MEAN), each(self.std, STANDARD_STD))

    def reader(self) -> PictureReader:
        """What makes pixels of the images; DataError as `image_processor`."""
        return PictureReader(self.image_processor(), self.num_channels)

    def form(self) -> SampleForm:
        """Labelled images; the size is the one asked for, or that of the processor named if it is there."""
        if self.image_size is not None:
            return image_form(self, self.label_names, (self.num_channels, self.image_size, self.image_size))
        if self.processor is not None and not self.processor.exists():
            return image_form(self, self.label_names, None)
        with placed("processor: "):
            return image_form(self, self.label_names, self.reader().shape)


def image_form(
    settings: LabelledImagesSettings, labels: tuple[str, ...] | None, shape: tuple[int, int, int] | None
) -> SampleForm:
    """The form of labelled images of `settings`.

    Args:
        settings: the settings.
        labels: the classes, where they are known.
        shape: channels, height and width, where they are known.
    """
    values: dict[str, Any] = {"num_channels": settings.num_channels}
    if shape is not None:
        _, height, width = shape
        values["image_size"] = height if height == width else [height, width]
    return SampleForm("image", 1, ("pixel_values", "labels"), labels=labels, config_values=values)


def image_documents(settings: LabelledImagesSettings) -> Iterator[Document]:
    """The images of the source as documents: the class as JSON, a zero, and the pixels, by which alone they are known.

    Raises:
        DataError: the source can't be used, an image can't be read, or a label is none of `labels`.
    """
    reader = settings.reader()
    for found in read_rows(settings, settings.fields) if settings.source == "huggingface" else _files(settings):
        row = _labelled(settings, found)
        if row.values is None:
            yield Document(row.name, None, row.skipped)
            continue
        image, label = row.values
        if image is None:
            yield Document(row.name, None, "no image")
        elif label is None or label == "":
            yield Document(row.name, None, "no label")
        else:
            pixels = _pixels(reader, row.name, image, settings).tobytes()
            yield Document(row.name, json.dumps(label).encode() + b"\0" + pixels, content=pixels)


def _labelled(settings: LabelledImagesSettings, row: Row) -> Row:
    """A row with the name of its class."""
    if row.values is None or row.values[1] in (None, ""):
        return row
    image, label = row.values
    return row._replace(values=(image, settings.label_name(label, row.name)))


def _files(settings: LabelledImagesSettings) -> Iterator[Row]:
    """The images of folders with their classes, and the rows of Parquet."""
    files = source_files(settings)
    images = [file for file in files if file.left_out is None and file.path.suffix.lower() in ENDINGS]
    tables = [file for file in files if file.left_out is None and file.path.suffix.lower() == ".parquet"]
    if not images and not tables:
        film = next((file.name for file in files if file.path.suffix.lower() in FILMS), None)
        raise DataError(
            f"{', '.join(map(str, settings.paths))} holds no image{f', and {film} is a film' if film else ''}. Give a "
            f"folder with a folder of images for each class ({', '.join(sorted(ENDINGS))}), or Parquet."
        )
    _check_folders(settings, images, tables)
    for file in files:
        ending = file.path.suffix.lower()
        if file.left_out is not None:
            yield Row(file.name, None, file.left_out)
        elif ending in ENDINGS:
            yield Row(file.name, (read_file(file.path), file.path.absolute().parent.name))
        elif ending in FILMS:
            raise DataError(f"{file.name} is a film. Save its frames as images, or leave it out.")
        elif ending == ".parquet":
            form = row_format(file.path)
            assert form is not None
            yield from form.rows(file.name, file.path, settings.fields)
        else:
            yield Row(file.name, None, "no image")


def _check_folders(
    settings: LabelledImagesSettings, images: Sequence[SourceFile], tables: Sequence[SourceFile]
) -> None:
    """Refuse folders of classes without an image, and images beside those, whose class would be the folder of all;
    DataError."""
    holding = {parent for file in (*images, *tables) for parent in file.path.parents}
    for given in settings.paths:
        root = given.expanduser()
        below = [path for path in root.rglob("*") if path.is_dir() and not path.is_symlink()] if root.is_dir() else []
        for folder in sorted(below):
            hidden = any(part.startswith(".") for part in folder.relative_to(root).parts)
            if not hidden and folder not in holding:
                raise DataError(
                    f"The folder {folder} holds no image, and would be a class of none. Put images there, or remove it."
                )
        beside = next((file for file in images if file.path.parent == root), None)
        if beside is not None and any(root in file.path.parents and file.path.parent != root for file in images):
            raise DataError(
                f"{beside.name} lies beside the folders of classes, and has none itself. Put it into one, or remove it."
            )


def _pixels(reader: PictureReader, name: str, image: Any, settings: LabelledImagesSettings) -> np.ndarray:
    """Of a file's bytes, alone or as Hugging Face's datasets keep them, or of a picture that they have read."""
    from PIL.Image import Image

    content = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(content, bytes):
        return reader.read(name, content)
    if isinstance(image, Image):
        return reader.pixels(name, image)
    raise DataError(
        f"{name}: {settings.image_field} is {reprlib.repr(image)}, and not the bytes of an image. Set `image_field` to "
        "a field of images, or save the images within the rows."
    )
