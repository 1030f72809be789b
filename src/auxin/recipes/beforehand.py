"""What a run needs beside its recipe, looked for before anything is made: sources of the data, and devices."""

from pathlib import Path

from auxin.data.settings import SourceSettings
from auxin.data.sources import source_files
from auxin.data.tokenizer import read_tokenizer
from auxin.errors import placed
from auxin.recipes.schema import Recipe, TrainStage
from auxin.training.hardware import choose_device


def check_needs(recipe: Recipe, data_directory: Path) -> None:
    """Devices, and, where no data was prepared in `data_directory` yet, sources.

    Raises:
        ConfigError, DataError: as the two below.
    """
    check_devices(recipe)
    if not data_directory.exists():
        check_sources(recipe)


def check_sources(recipe: Recipe) -> None:
    """DataError when a file that the data is made of, or its tokenizer, is not there. Nothing is fetched: what is
    behind a name on the Hub is found out by the run."""
    data = recipe.data
    with recipe.at():
        if isinstance(data, SourceSettings) and data.source == "files":
            with placed("data.paths: "):
                source_files(data)
        tokenizer: Path | None = getattr(data, "tokenizer", None)
        if tokenizer is not None and not tokenizer.exists():
            with placed("data.tokenizer: "):
                read_tokenizer(tokenizer)


def check_devices(recipe: Recipe) -> None:
    """ConfigError when a stage is to be trained on a device that this machine has not."""
    for branch in recipe.branches:
        for stage in branch.stages:
            if isinstance(stage, TrainStage):
                # The recipe's own device is every stage's.
                place = recipe.at(branch, stage) if "device" in stage.settings else recipe.at()
                with place, recipe.at_setting(stage):
                    choose_device(recipe.training_settings(stage, flops=1.0).device)
