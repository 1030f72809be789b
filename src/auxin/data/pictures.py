"""Pictures as a model of images sees them: read by Pillow, brought to the model's size by a processor of transformers.

A processor first makes whole pixels of the model's size, values of 0 to 255, and then a number of each value. Pixels
are what is kept; what the processor makes of the 256 values of each channel is a table, by which batches are made.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from auxin.errors import DataError, reason
from auxin.foreign import offline, refuse_active_file, refuse_links_out

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm"})
"""Endings of files that hold a picture."""
FILMS = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp"})
"""Endings of files that hold many."""
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes of 8 bits a channel at most."""


def made_processor(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """A ViT's processor: pictures resized to (size, size), bilinear, values from 0 to 1 less `mean` over `std`."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sides = {"height": size, "width": size}
    return ViTImageProcessorPil(size=sides, image_mean=list(mean), image_std=list(std))


def has_processor(folder: Path) -> bool:
    """Whether the file of an image processor lies in `folder`."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def read_processor(folder: Path) -> Any:
    """Load an image processor from a folder, by Pillow, so that all machines make the same pixels; nothing is fetched
    and no code of the folder is run.

    Raises:
        DataError: there is none, or it can't be loaded.
    """
    if not has_processor(folder):
        raise DataError(
            f"There is no image processor in {folder} ({PROCESSOR_FILES[0]} is missing). Save the model's there, give "
            "another folder, or set image_size instead."
        )
    refuse_links_out(folder, DataError)
    for name in ("config.json", *PROCESSOR_FILES):
        refuse_active_file(folder / name, DataError)
    try:
        from transformers import AutoImageProcessor

        with offline():
            return AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except Exception as error:  # each processor has reasons of its own
        raise DataError(
            f"{folder} holds no image processor that can be loaded: {type(error).__name__}: {error} Mend it, or set "
            "image_size instead."
        ) from error


def processor_digest(processor: Any) -> str:
    """Hex SHA-256 of all its settings."""
    values = processor.to_dict()
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


class PictureReader:
    """Makes pixels of pictures, and tells what becomes of them in a batch.

    Args:
        processor: of images.
        channels: 1 or 3.

    Raises:
        DataError: the processor makes something else of a picture than an array of numbers of that many channels.
    """

    def __init__(self, processor: Any, channels: int) -> None:
        self.processor, self.channels = processor, channels
        all_values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(channels, 0)
        try:
            self.shape: tuple[int, int, int] = self._shaped(all_values).shape
            with np.errstate(all="ignore"):  # what is not finite is told below
                table = self._called(all_values, do_resize=False, do_center_crop=False, do_pad=False)
            self.table = np.asarray(table, dtype=np.float32).reshape(channels, 256)
            """What a batch holds for each value of each channel, (channels, 256)."""
        except Exception as error:  # each processor has reasons of its own
            raise DataError(
                f"The {type(processor).__name__} makes no pixels of {channels} channels: {reason(error)}. Set "
                "num_channels to the model's, give another processor, or set image_size instead."
            ) from error
        if not np.isfinite(self.table).all():
            raise DataError(
                f"The {type(processor).__name__} makes numbers of pixels that are not finite, with mean = "
                f"{processor.image_mean} and std = {processor.image_std} of pixels from 0 to 1. Give others (0.5)."
            )

    def read(self, name: str, content: bytes) -> np.ndarray:
        """The pixels of a picture's file, (channels, height, width), values of 0 to 255.

        Raises:
            DataError: it is no picture that can be read, has several frames, transparent parts, or more than `channels`
                can hold. Messages begin with `name`.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                image.load()
                return self.pixels(name, image)
        except DataError:  # which is a ValueError
            raise
        except UnidentifiedImageError as error:  # whose text names an object
            raise DataError(f"{name} is no image of {', '.join(_FORMATS)}. Mend it, or leave it out.") from error
        # Pillow raises many things for broken files, SyntaxError among them, and refuses those that unpack endlessly.
        except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{name} is no image that can be read: {reason(error).rstrip('.')}. Mend it, or leave it out."
            ) from error

    def pixels(self, name: str, image: "Image") -> np.ndarray:
        """As `read`, of a picture that Pillow has read."""
        from PIL import ImageOps

        if getattr(image, "n_frames", 1) > 1:
            raise DataError(
                f"{name} has {image.n_frames} frames, and a sample is one picture. Save the frames as images, or leave "  # type: ignore[attr-defined]
                "it out."
            )
        if image.mode not in (*_GREY, *_COLOUR):
            raise DataError(
                f"{name} is of Pillow's mode {image.mode}, and 8 bits a channel are read. Convert it to 8 bits of grey "
                "or RGB."
            )
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            extrema: Any = image.convert("RGBA").getextrema()  # (least, most) of each channel
            if extrema[3][0] < 255:
                raise DataError(
                    f"{name} has transparent parts, for which a model has no channel. Lay it on a background and save "
                    "it again."
                )
        turned = ImageOps.exif_transpose(image)
        if self.channels == 3 or turned.mode in _GREY:
            array = np.asarray(turned.convert("L" if self.channels == 1 else "RGB"))
        else:
            array = np.asarray(turned.convert("RGB"))
            if (array != array[..., :1]).any():
                raise DataError(
                    f"{name} is in colour, and num_channels: 1 is for grey images. Set num_channels: 3, or convert it "
                    "to grey."
                )
            array = array[..., 0]
        channels_first = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        found = self._shaped(channels_first)
        if found.shape != self.shape:
            raise DataError(
                f"{name} becomes pixels of shape {list(found.shape)}, others {list(self.shape)}: the "
                f"{type(self.processor).__name__} does not bring all images to one size. Resize them before, or set "
                "image_size instead of processor."
            )
        return found

    def _shaped(self, channels_first: np.ndarray) -> np.ndarray:
        pixels = self._called(channels_first, do_rescale=False, do_normalize=False)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != self.channels:
            raise ValueError(f"it makes {pixels.dtype} of shape {list(pixels.shape)} of them")
        return pixels

    def _called(self, channels_first: np.ndarray, **changes: bool) -> np.ndarray:
        found = self.processor(
            images=channels_first, return_tensors="np", input_data_format="channels_first", **changes
        )
        return np.asarray(found["pixel_values"])[0]
