"""A recipe of a TokenFormer of images: priced, built, trained, grown by tokens, trained on; from the command line; and
presets where the data does not fit them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from auxin.cli import app
from auxin.errors import ConfigError, PlanError
from auxin.models.tokenformer.presets import preset_config
from auxin.recipes import Recipe, price_recipe, run_recipe
from auxin.recipes.library import training_recipe
from labelled import BARS, write_bars

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "qkv_tokens": 16,
    "proj_tokens": 16,
    "ffn_tokens": 64,
}
GROWN = {"qkv_tokens": 24, "proj_tokens": 24, "ffn_tokens": 96}
STAGES: list[dict[str, Any]] = [
    {"kind": "build", "model_type": "vision_tokenformer", "config": SMALL},
    {"kind": "train", "name": "train", "settings": {"samples": 960}},
    {"kind": "change", "name": "grow", "tokens": GROWN},
    {"kind": "train", "name": "on", "settings": {"samples": 320}},
    {"kind": "evaluate"},
]


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bars(tmp_path_factory.mktemp("bars"), 240, size=9)


def recipe(bars: Path, *stages: dict[str, Any], **data: Any) -> Recipe:
    images = {"kind": "labelled_images", "paths": [str(bars)], "image_size": 8, "num_channels": 1, "labels": list(BARS)}
    common = {"batch_size": 16, "learning_rate": 5e-3, "log_interval": 5, "tensorboard": False, "device": "cpu"}
    return Recipe.parse(
        {
            "name": "bars",
            "title": "A tiny TokenFormer of images",
            "data": {**images, "validation_fraction": 0.25, **data},
            "training": {"objective": "classification", **common},
            "measures": ["accuracy", "loss"],
            "branches": [{"name": "main", "title": "main", "stages": list(stages)}],
        }
    )


@pytest.fixture(scope="module")
def run(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("run") / "out"
    return directory, run_recipe(recipe(bars, *STAGES), directory, "auxin run v.yaml", print)


def test_it_learns_grows_without_a_change_and_learns_on(run: tuple[Path, Any], bars: Path) -> None:
    directory, results = run
    main = results.branches[0]
    train, grow = main.ledger.stages[1:3]
    assert train.value_before < 0.6 < 0.8 < train.value_after
    assert grow.value_after == pytest.approx(train.value_after, abs=1e-6)
    assert main.value > 0.8
    model = AutoModelForImageClassification.from_pretrained(directory / "branches/main/05-evaluate/checkpoint")
    assert (model.config.ffn_tokens, model.config.qkv_tokens) == ([64, 32], [16, 8])
    assert (model.config.num_channels, model.config.image_size, list(model.config.id2label.values())) == (
        1,
        8,
        list(BARS),
    )
    assert model.num_parameters() == main.parameters == model.config.num_parameters()
    new = model.model.layers[0].mlp.value_tokens[64:]
    assert new.abs().max() > 0  # they were zero when they came, and have learnt
    price = price_recipe(recipe(bars, *STAGES))
    assert main.flops == pytest.approx(price.branch_flops["main"], rel=1e-9)


def test_the_command_line_grows_a_checkpoint(run: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = run
    source = directory / "branches/main/05-evaluate/checkpoint"
    done = CliRunner().invoke(app, ["grow", str(source), "--ffn-tokens", "120", "-o", str(tmp_path / "grown")])
    assert done.exit_code == 0, done.output
    models = [AutoModelForImageClassification.from_pretrained(path).eval() for path in (source, tmp_path / "grown")]
    assert models[1].config.ffn_tokens == [64, 32, 24]
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(models[1](images).logits, models[0](images).logits, rtol=1e-5, atol=1e-5)
    preset_config("vit-b16-86m").save_pretrained(tmp_path / "preset")
    done = CliRunner().invoke(app, ["grow", str(tmp_path / "preset"), "--to", "vit-b16-115m", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "114,759,400" in done.output


def test_presets_are_built_for_the_data_and_grow_to_presets(bars: Path) -> None:
    build = {"kind": "build", "preset": "vit-b16-86m"}
    grow = {"kind": "change", "name": "grow", "to": "vit-b16-115m"}
    train = {"kind": "train", "name": "train", "settings": {"samples": 16}}
    price = price_recipe(recipe(bars, build, grow, train, image_size=32))
    tokens, width = 2 * 12 * 768 * 8 * 768, 768
    rest = (16 * 16 * width + width) + width + 5 * width + 2 * width + 3 * (width + 1)
    assert price.stages[-1].parameters == tokens + rest
    assert price.stages[0].parameters == rest + 3 * tokens // 4


def test_presets_of_other_data_are_refused_before_work_starts(bars: Path, tmp_path: Path) -> None:
    text = {"kind": "build", "preset": "124m"}
    with pytest.raises(ConfigError, match=r"preset: tokenformer has no class for the objective 'classification'"):
        run_recipe(recipe(bars, text, STAGES[1]), tmp_path / "out", "", print)
    images = recipe(bars, {"kind": "build", "preset": "vit-b16-86m"}, STAGES[1], image_size=40)
    with pytest.raises(PlanError, match=r"main/build: config: .*patches of 16 pixels for a side of 40"):
        run_recipe(images, tmp_path / "out", "", print)
    other = recipe(bars, STAGES[0], {"kind": "change", "name": "grow", "to": "124m"})
    with pytest.raises(PlanError, match=r"to: .*the preset is a tokenformer"):
        price_recipe(other)
    assert not (tmp_path / "out").exists()
    words = training_recipe("vit-b16-86m", {"paths": [str(bars)]}, {"steps": 2})
    with pytest.raises(ConfigError, match=r"preset: vision_tokenformer has no class for the objective 'causal'"):
        run_recipe(words, tmp_path / "out", "", print)
