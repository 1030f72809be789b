"""A recipe of a ViT: priced, built, trained on images, pruned by methods that look at them, mended, measured, reported;
from a checkpoint; killed and finished to the same bits; and what does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from auxin.errors import ConfigError, DataError
from auxin.models.loading import load_model
from auxin.recipes import Recipe, price_recipe, run_recipe
from labelled import BARS, write_bars
from recipes.killed import check_killed_and_finished

VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "hidden_dropout_prob": 0.1,
}
TRAIN = {"kind": "train", "name": "train", "settings": {"samples": 1280}}
PRUNING: dict[str, dict[str, Any]] = {"random": {}, "taylor": {}, "optin": {"group_size": 8}, "finercut": {}}
"""Methods that look at nothing, at gradients, at features and at losses, with their settings beside the target."""


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bars(tmp_path_factory.mktemp("bars"), 240, size=9)


def image_recipe(bars: Path, *stages: dict[str, Any], build: dict[str, Any] | None = None, **data: Any) -> Recipe:
    images = {"kind": "labelled_images", "paths": [str(bars)], "image_size": 8, "num_channels": 1, "labels": list(BARS)}
    common = {"batch_size": 16, "learning_rate": 5e-3, "log_interval": 5, "tensorboard": False, "device": "cpu"}
    first = {"kind": "build", **(build or {"model_type": "vit", "config": VIT})}
    return Recipe.parse(
        {
            "name": "bars",
            "title": "A tiny ViT",
            "data": {**images, "validation_fraction": 0.25, **data},
            "training": {"objective": "classification", **common},
            "measures": ["accuracy", "loss"],
            "branches": [{"name": "main", "title": "main", "stages": [first, *stages]}],
        }
    )


def whole_recipe(bars: Path) -> Recipe:
    """A ViT, and a branch for each method that makes it smaller."""
    base = image_recipe(bars, TRAIN).model_dump(mode="json")
    for method, settings in PRUNING.items():
        wanted = {"target": {"parameters": 0.8}, **settings}
        change = {"kind": "change", "method": method, "settings": wanted}
        if method != "random":
            change["calibration"] = {"samples": 12, "batch_size": 5}
        branch = {"name": method, "title": method, "fork": "main/train", "stages": [change]}
        if method == "taylor":
            branch["stages"] += [{"kind": "train", "name": "mend", "settings": {"samples": 160}}, {"kind": "evaluate"}]
        base["branches"].append(branch)
    return Recipe.parse(base)


@pytest.fixture(scope="module")
def run(bars, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "out"
    lines: list[str] = []
    return directory, run_recipe(whole_recipe(bars), directory, "auxin run v.yaml", lines.append), lines


def test_a_vit_learns_what_is_in_images_and_goes_with_its_processor(run, bars):
    directory, results, _ = run
    main = results.branches[0]
    assert main.ledger.stages[1].value_before < 0.6 < 0.85 < main.value
    taylor = next(branch for branch in results.branches if branch.name == "taylor")
    assert taylor.value > 0.8
    folder = directory / "branches/taylor/03-evaluate/checkpoint"
    # Who loads it with transformers alone gets the sizes, the names and the numbers.
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    paths = sorted(bars.rglob("*.png"))
    images = [np.asarray(Image.open(path))[None] for path in paths]
    inputs = processor(images=images, return_tensors="pt", input_data_format="channels_first")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    told = [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
    assert np.mean([label == path.parent.name for label, path in zip(told, paths, strict=True)]) > 0.8
    assert (model.config.image_size, model.config.num_channels) == (8, 1)


def test_methods_look_at_images_and_take_what_was_asked(run):
    _, results, _ = run
    whole = results.branches[0].parameters
    for branch in results.branches[1:]:
        change = next(stage for stage in branch.ledger.stages if stage.kind == "change")
        assert change.parameters <= 0.8 * whole, branch.name
        assert 0 <= change.value_after <= 1
        if branch.name != "random":
            assert change.units >= 12, f"{branch.name} looked at no image"


def test_the_price_is_what_was_paid_and_the_report_speaks_of_images(run, bars):
    directory, results, lines = run
    price = price_recipe(whole_recipe(bars))
    assert price.unit == results.unit == "image"
    for name in ("main", "taylor"):
        branch = next(branch for branch in results.branches if branch.name == name)
        # Which units go is not known before, so that what follows a method that looks at weights is an estimate.
        assert branch.flops == pytest.approx(price.branch_flops[name], rel=1e-9 if name == "main" else 1e-2)
    assert results.data["pixels"] == "8 x 8, grey"
    assert "1,280 images" in "\n".join(lines)
    report = (directory / "report.html").read_text()
    assert "images" in report
    assert "8 x 8, grey" in report


def test_a_killed_run_goes_on_to_the_same_bits(run, bars, tmp_path):
    directory, _, _ = run
    whole = whole_recipe(bars).model_dump(mode="json")
    whole["branches"] = [branch for branch in whole["branches"] if branch["name"] in ("main", "taylor")]
    recipe = Recipe.parse(whole)
    begun, final = "branches/taylor/02-mend/checkpoints", "branches/taylor/03-evaluate/checkpoint/model.safetensors"
    check_killed_and_finished(recipe, tmp_path, begun, final, directory)


def test_a_checkpoint_is_trained_on_with_its_own_processor(run, bars, tmp_path):
    directory, _, _ = run
    source = directory / "branches/taylor/03-evaluate/checkpoint"
    stage = {"kind": "train", "name": "train", "settings": {"steps": 2}}
    own = {"image_size": None, "processor": str(source)}
    run_recipe(image_recipe(bars, stage, build={"checkpoint": str(source)}, **own), tmp_path / "out", "", print)
    adopted = tmp_path / "out/branches/main/01-build/checkpoint"
    assert type(load_model(adopted)).__name__ == "ViTForImageClassification"
    before, after = (json.loads((path / "preprocessor_config.json").read_text()) for path in (source, adopted))
    assert before == after
    for changes, message in (
        ({"image_size": 4}, r"image_size: the model's is 8, and the data's 4. Set data.image_size: 8"),
        ({"num_channels": 3}, r"num_channels: the model's is 1, and the data's 3"),
        ({"mean": 0.3}, r"another image processor than the data.*Set data.processor: .*checkpoint"),
        ({"labels": list(reversed(BARS))}, "id2label: the model's classes are falling, level, upright"),
    ):
        wanted = image_recipe(bars, stage, build={"checkpoint": str(source)}, **changes)
        with pytest.raises(ConfigError, match=message):
            run_recipe(wanted, tmp_path / str(changes), "", print)


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({}, {"image_size": 10}, r"patch_size: images of 10 pixels .* patches of 4.*Set data.image_size: 8 or 12"),
        ({}, {"image_size": 3}, r"patch_size: images of 3 pixels .*Set data.image_size: 4, or a patch_size"),
        ({"image_size": 16}, {}, r"image_size: the model's is 16, and the data's 8. Set data.image_size: 16"),
    ],
)
def test_models_that_do_not_fit_the_images_are_refused_before_work_starts(bars, tmp_path, changes, data, message):
    build = {"model_type": "vit", "config": {**VIT, **changes}}
    with pytest.raises(ConfigError, match=message):
        price_recipe(image_recipe(bars, TRAIN, build=build, **data))
    with pytest.raises(ConfigError, match=message):
        run_recipe(image_recipe(bars, TRAIN, build=build, **data), tmp_path / "out", "", print)
    assert not (tmp_path / "out" / "data").exists()


def test_what_is_not_for_images_is_refused(bars, tmp_path):
    with pytest.raises(ConfigError, match=r"bert has no class .*AutoModelForImageClassification"):
        price_recipe(image_recipe(bars, TRAIN, build={"model_type": "bert", "config": {}}))
    whole = image_recipe(bars, TRAIN).model_dump(mode="json")
    for objective in ("causal", "masked_language", "span_corruption"):
        with pytest.raises(ConfigError, match="objective"):
            price_recipe(Recipe.parse({**whole, "training": {**whole["training"], "objective": objective}}))
    budget = {"kind": "train", "name": "train", "settings": {"tokens": 100}}
    with pytest.raises(ConfigError, match="tokens: 100 is no budget for data that is counted in images"):
        price_recipe(image_recipe(bars, budget))
    missing = image_recipe(bars, TRAIN, image_size=None, processor=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"data.processor: There is no image processor in"):
        run_recipe(missing, tmp_path / "out", "", print)
    with pytest.raises(DataError, match=r"data.paths: .*none does not exist"):
        run_recipe(image_recipe(tmp_path / "none", TRAIN), tmp_path / "out", "", print)
