"""Labelled images: what a batch holds beside transformers' own processor, the split, and what is refused."""

import io
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import auxin.data.labelled_images as labelled
from auxin.data.collecting import CONFLICT, document_key, is_validation
from auxin.data.dataset import DATASETS
from auxin.data.image_source import LabelledImagesSettings
from auxin.data.labelled_images import LabelledImages, prepare
from auxin.data.loader import make_loader
from auxin.errors import ConfigError, DataError
from labelled import BARS, write_bars


def asked(paths: Path, **changes: Any) -> LabelledImagesSettings:
    values = {"paths": [str(paths)], "image_size": 8, "num_channels": 1, "validation_fraction": 0.3}
    return LabelledImagesSettings.parse({**values, **changes})


def samples(data: LabelledImages) -> list[tuple[str, bytes, str]]:
    """(split, pixels, label) of every sample."""
    assert data.form.labels is not None
    return [
        (name, pixels.tobytes(), data.form.labels[label])
        for name, (all_pixels, labels) in data._arrays.items()
        for pixels, label in zip(all_pixels, labels, strict=True)
    ]


def batch_of(data: LabelledImages, name: Any = "train") -> dict[str, torch.Tensor]:
    return data.split(name).rows(range(len(data.split(name))))


def test_every_image_is_there_with_its_folder_on_the_side_that_its_pixels_decide(tmp_path: Path) -> None:
    wanted = asked(write_bars(tmp_path / "bars"))
    data = prepare(wanted, tmp_path / "data")
    expected = set()
    for path in (tmp_path / "bars").rglob("*.png"):
        pixels = np.asarray(Image.open(path)).tobytes()
        side = "validation" if is_validation(document_key(pixels, 0), wanted) else "train"
        expected.add((side, pixels, path.parent.name))
    assert set(samples(data)) == expected
    assert len(samples(data)) == len(expected) == 90
    form = data.form
    assert (form.unit, form.units, form.length, form.labels) == ("image", 1, None, BARS)
    assert form.tensors == ("pixel_values", "labels")
    assert form.config_values == wanted.form().config_values == {"image_size": 8, "num_channels": 1}
    assert (data.bytes_per_unit, wanted.form().labels) == (None, None)
    assert DATASETS.find("labelled_images").settings is LabelledImagesSettings
    data.verify()
    told = data.describe()
    assert told["pixels"] == "8 x 8, grey"
    assert told["training images"].startswith(f"{data.report.train.images} (falling ")


@settings(deadline=None, max_examples=12)
@given(
    size=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    mode=st.sampled_from(["1", "L", "P", "RGB", "CMYK"]),
    channels=st.sampled_from([1, 3]),
    mean=st.floats(-1, 1),
    std=st.floats(0.01, 2),
)
def test_a_batch_holds_what_transformers_makes_of_the_images(
    size: int, shape: tuple[int, int], mode: str, channels: int, mean: float, std: float
) -> None:
    """Whatever their size and mode; the processor that goes with a model makes the same of the files again."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder, originals = Path(name), []
        for number in range(40):
            pixels = draw.integers(0, 256, (shape[1], shape[0]), dtype=np.uint8)
            if channels == 3 and mode not in ("1", "L"):
                pixels = draw.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(mode)
            path = folder / "in" / str(number % 2) / f"{number}.{'tif' if mode == 'CMYK' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if channels == 1 and mode == "CMYK":
                image = Image.fromarray(pixels).convert("RGB")
            image.save(path)
            originals.append(path)
        wanted = asked(folder / "in", image_size=size, num_channels=channels, mean=mean, std=std)
        if size * min(shape) <= 9 or mode == "1":
            with suppress(DataError):  # so small that all images of a class, or of a split, may look alike
                prepare(wanted, folder / "data")
            if not (folder / "data").exists():
                return
        data = prepare(wanted, folder / "data")
        assert data.form.config_values == {"image_size": size, "num_channels": channels}
        processor: Any = data.processor()
        processor.save_pretrained(folder / "again")
        processor = AutoImageProcessor.from_pretrained(folder / "again", backend="pil")
        made, by_hand = set(), []
        for path in originals:
            image = Image.open(path).convert("L" if channels == 1 else "RGB")
            array = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
            found = processor(images=array, return_tensors="pt", input_data_format="channels_first")
            made.add(found["pixel_values"][0].numpy().tobytes())
            resized = np.atleast_3d(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
            by_hand.append((resized.transpose(2, 0, 1) / 255 - mean) / std)
        batches = [batch_of(data, name)["pixel_values"] for name in ("train", "validation")]
        assert all(batch.dtype == torch.float32 and batch.shape[1:] == (channels, size, size) for batch in batches)
        assert {sample.numpy().tobytes() for batch in batches for sample in batch} == made
        for sample in torch.cat(batches).numpy():
            assert np.abs(np.stack(by_hand) - sample).max((1, 2, 3)).min() < 1e-5 / std


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=30), st.integers(0, 99))
def test_equal_images_lie_on_one_side_and_every_one_is_accounted_for(drawn: list[tuple[int, int]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bars(folder / "in", 60)
        known = [np.asarray(Image.open(path)) for path in sorted((folder / "in").rglob("*.png"))]
        drawn = [(picture, label) for picture, label in drawn if picture < len(known)]
        for number, (picture, label) in enumerate(drawn):
            # Another file of the same pixels, at the end of its folder.
            Image.fromarray(known[picture]).save(folder / "in" / BARS[label] / f"z{number}.bmp")
        data = prepare(asked(folder / "in", seed=seed), folder / "data")
        first: dict[bytes, str] = {}
        copies = conflicts = 0
        for path in sorted((folder / "in").rglob("*.*"), key=str):
            pixels, label = np.asarray(Image.open(path)).tobytes(), path.parent.name
            copies += first.get(pixels) == label
            conflicts += first.setdefault(pixels, label) != label
        found = samples(data)
        assert {pixels: label for _, pixels, label in found} == first
        assert len(found) == data.report.documents == len(first)
        assert data.report.duplicates == copies
        skipped = data.report.skipped.get(CONFLICT)
        assert (skipped.count if skipped else 0) == conflicts
        for side, split in (("train", data.report.train), ("validation", data.report.validation)):
            counts = Counter(label for of, _, label in found if of == side)
            assert split.labels == tuple(counts[label] for label in BARS)


def test_batches_go_on_from_any_position_with_the_same_bits(tmp_path: Path) -> None:
    data = prepare(asked(write_bars(tmp_path / "bars")), tmp_path / "data")
    whole = iter(make_loader(data.split("train"), 7, seed=3))
    before = [next(whole) for _ in range(12)]
    again = iter(make_loader(LabelledImages.load(tmp_path / "data").split("train"), 7, seed=3, position=5))
    for batch in before[5:]:
        other = next(again)
        assert all(torch.equal(batch[name], other[name]) for name in ("pixel_values", "labels"))


def test_rows_are_read_like_files(tmp_path: Path) -> None:
    """Parquet of Hugging Face's datasets, a folder that they read, and the files themselves."""
    bars = write_bars(tmp_path / "bars", 60)
    paths = sorted(bars.rglob("*.png"))
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [path.parent.name for path in paths],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "rows" / "of" / "bars").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "rows" / "of" / "bars" / "train.parquet"))
    plain = [{"picture": path.read_bytes(), "class": BARS.index(path.parent.name)} for path in paths]
    plain += [{"picture": paths[0].read_bytes(), "class": None}, {"picture": None, "class": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "plain.parquet")
    base = {"image_size": 8, "num_channels": 1, "validation_fraction": 0.3}
    wanted = [
        asked(bars),
        asked(tmp_path / "rows"),
        asked(tmp_path / "plain.parquet", image_field="picture", label_field="class", labels=list(BARS)),
        LabelledImagesSettings.parse({"name": str(tmp_path / "rows"), **base}),
    ]
    prints = [prepare(each, tmp_path / f"data{number}").fingerprint for number, each in enumerate(wanted)]
    assert len(set(prints)) == 1
    skipped = LabelledImages.load(tmp_path / "data2").report.skipped
    assert {reason: count.count for reason, count in skipped.items()} == {"no label": 1, "no image": 1}


def test_a_models_own_processor_says_size_and_numbers(tmp_path: Path) -> None:
    bars = write_bars(tmp_path / "bars", 60, size=12)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 10}, crop_size={"height": 6, "width": 8})
    processor.save_pretrained(tmp_path / "clip")
    wanted = asked(bars, image_size=None, num_channels=3, processor=str(tmp_path / "clip"))
    assert wanted.form().config_values == {"image_size": [6, 8], "num_channels": 3}
    data = prepare(wanted, tmp_path / "data")
    assert data.processor().to_dict() == processor.to_dict()
    found = {sample.numpy().tobytes() for sample in batch_of(data)["pixel_values"]}
    images = [Image.open(path).convert("RGB") for path in bars.rglob("*.png")]
    made = {processor(images=image, return_tensors="pt")["pixel_values"][0].numpy().tobytes() for image in images}
    assert found < made
    assert prepare(wanted, tmp_path / "data").fingerprint == data.fingerprint
    CLIPImageProcessorPil(size={"shortest_edge": 9}, crop_size={"height": 6, "width": 8}).save_pretrained(
        tmp_path / "clip"
    )
    with pytest.raises(DataError, match=r"The source has changed|image processor .*clip is not the one"):
        prepare(wanted, tmp_path / "data")
    with pytest.raises(DataError, match=r"processor: .*makes no pixels of 1 channels.*Set num_channels"):
        asked(bars, image_size=None, processor=str(tmp_path / "clip")).form()
    with pytest.raises(DataError, match=r"no image processor in .*none .*Save the model's there"):
        prepare(asked(bars, image_size=None, processor=str(tmp_path / "none")), tmp_path / "other")


def png(pixels: Any, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels))
    (image if mode is None else image.convert(mode)).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, GREY.T, GREY], -1)
CLEAR = np.dstack([COLOUR, GREY])
FRAMES = {"save_all": True, "append_images": [Image.fromarray(GREY.T)], "format": "GIF"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("level/x.png", b"no image", r"level/x.png is no image of PNG, JPEG, BMP, .*PPM. Mend it, or leave it out"),
        ("level/x.png", png(GREY)[:45], r"level/x.png is no image that can be read"),
        ("level/x.png", b"", "level/x.png is no image of PNG"),
        ("level/x.png", png(COLOUR), r"level/x.png is in colour, and num_channels: 1 .*Set num_channels: 3"),
        ("level/x.png", png(CLEAR), r"level/x.png has transparent parts.*Lay it on a background"),
        ("level/x.png", png(GREY, "P", transparency=0), "level/x.png has transparent parts"),
        ("level/x.png", png(GREY.astype(np.uint16)), r"level/x.png is of Pillow's mode I;16, and 8 bits"),
        ("level/x.gif", png(GREY, **FRAMES), r"level/x.gif has 2 frames.*Save the frames as images"),
        ("level/x.mp4", b"film", r"level/x.mp4 is a film. Save its frames as images, or leave it out"),
        ("none/x.txt", b"text", r"The folder .*none holds no image, and would be a class of none"),
        ("x.png", png(GREY), r"bars/x.png lies beside the folders of classes.*Put it into one"),
        ("other/x.png", png(GREY), r"other/x.png: .* 'other', which is none of `labels` \(falling, level, upright\)"),
    ],
    ids=map(str, range(12)),
)
def test_images_that_can_not_be_learnt_from(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write_bars(tmp_path / "bars", 60) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as told:
        prepare(asked(tmp_path / "bars", labels=list(BARS)), tmp_path / "data")
    assert "no image that can be read" in message or "can be read" not in str(told.value)
    assert not (tmp_path / "data").exists()


def test_sources_that_can_not_be_learnt_from(tmp_path: Path) -> None:
    bars = write_bars(tmp_path / "bars", 60)
    with pytest.raises(DataError, match="All images have the label 'level': there is nothing to tell apart"):
        prepare(asked(bars / "level"), tmp_path / "data")
    with pytest.raises(DataError, match="'none' has no training example"):
        prepare(asked(bars, labels=[*BARS, "none"]), tmp_path / "data")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"texts holds no image. Give a folder with a folder of images for each class"):
        prepare(asked(tmp_path / "texts"), tmp_path / "data")
    (tmp_path / "texts" / "a.mov").write_text("film")
    with pytest.raises(DataError, match=r"texts holds no image, and .*a.mov is a film"):
        prepare(asked(tmp_path / "texts"), tmp_path / "data")
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png"], "label": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:1: image is 'a.png', and not the bytes.*Set `image_field`"):
        prepare(asked(tmp_path / "a.parquet"), tmp_path / "data")
    with pytest.raises(DataError, match=r"No image fell into the train split.*Use more images"):
        prepare(asked(bars, max_documents=1, validation_fraction=0.999), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "stdlib"}, r"source: the standard library's files have no labels"),
        ({"image_size": None}, r"image_size is missing. Give height and width in pixels, or a `processor`"),
        ({"processor": "a"}, r"`processor` says image_size already. Leave `image_size` out"),
        ({"processor": "a", "image_size": None, "mean": 0.5}, "`processor` says mean already"),
        ({"mean": [0.1, 0.2]}, "mean has 2 numbers. Give one, or 1: one a channel"),
        ({"std": 0}, "std is 0.0. Give numbers, above 0"),
        ({"std": [float("nan")]}, "std is nan"),
        ({"num_channels": 2}, "num_channels"),
        ({"label_field": "image"}, "image_field and label_field must differ; given: image for both"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(Path("a"), **values)


@pytest.mark.parametrize("values", [{"std": 1e-300}, {"mean": 1e300}])
def test_numbers_that_are_not_finite_are_told(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"numbers of pixels that are not finite, with mean = .*Give others"):
        prepare(asked(write_bars(tmp_path / "bars", 60), **values), tmp_path / "data")


def test_numbers_as_classes_are_sorted_whatever_comes_first(tmp_path: Path) -> None:
    images = [png((GREY + shift).astype(np.uint8)) for shift in range(90)]
    rows = {"image": images, "label": ["10", "0", "00"] * 30}
    for name, order in (("one", 1), ("other", -1)):
        table = pyarrow.table({field: values[::order] for field, values in rows.items()})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        data = prepare(asked(tmp_path / f"{name}.parquet"), tmp_path / name)
        assert data.report.labels == ("0", "00", "10")


def test_what_else_lies_there_is_counted_and_turned_images_are_turned_back(tmp_path: Path) -> None:
    bars = write_bars(tmp_path / "bars", 60)
    (bars / "level" / "README.md").write_text("what this is")
    (bars / ".hidden").mkdir()
    (bars / ".hidden" / "a.png").write_bytes(png(GREY))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    (bars / "level" / "turned.png").write_bytes(png(GREY, exif=exif))
    data = prepare(asked(bars), tmp_path / "data")
    assert {reason: skipped.count for reason, skipped in data.report.skipped.items()} == {
        "no image": 1,
        "hidden file": 1,
    }
    assert np.rot90(GREY, -1).tobytes() in {pixels for _, pixels, _ in samples(data)}


def test_a_finished_folder_is_reused_and_what_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = asked(write_bars(tmp_path / "bars", 60))
    first = prepare(wanted, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(labelled, "_write_split", lambda *arguments: pytest.fail("built again"))
        assert prepare(wanted, tmp_path / "data").fingerprint == first.fingerprint
    with pytest.raises(DataError, match=r"of other settings \(mean: None there, \[0.4\] asked\)"):
        prepare(wanted.model_copy(update={"mean": (0.4,)}), tmp_path / "data")
    source = next((tmp_path / "bars" / "level").iterdir())
    source.write_bytes(png(GREY))
    with pytest.raises(DataError, match="source has changed"):
        prepare(wanted, tmp_path / "data")
    content = bytearray((first.directory / "train.npy").read_bytes())
    content[-12] ^= 1
    (first.directory / "train.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"train.npy is damaged"):
        LabelledImages.load(first.directory).verify()


def test_the_fingerprint_follows_content_and_settings(tmp_path: Path) -> None:
    bars = write_bars(tmp_path / "bars", 60)
    base = prepare(asked(bars), tmp_path / "base").fingerprint
    moved = write_bars(tmp_path / "moved" / "deeper", 60)
    assert prepare(asked(moved), tmp_path / "same").fingerprint == base
    other = write_bars(tmp_path / "other", 60)
    (other / "level" / "1.png").rename(other / "upright" / "x.png")
    changed = {
        "label": asked(other),
        "order": asked(bars, labels=list(reversed(BARS))),
        "size": asked(bars, image_size=7),
        "channels": asked(bars, num_channels=3),
        "mean": asked(bars, mean=0.4),
        "std": asked(bars, std=0.4),
        "seed": asked(bars, seed=1),
    }
    prints = {name: prepare(value, tmp_path / f"x-{name}").fingerprint for name, value in changed.items()}
    assert len({base, *prints.values()}) == len(prints) + 1
