"""Reading what a model folder says about itself."""

from pathlib import Path
from typing import cast

from transformers import AutoConfig, PreTrainedConfig

from auxin.errors import CheckpointError


def load_config(folder: str | Path) -> PreTrainedConfig:
    """The config of a local Hugging Face model folder; no weights are read.

    Raises:
        CheckpointError: the folder is missing, has no config.json, or holds one that transformers can't read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist or is no folder. Give the folder of a checkpoint.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no model folder, or an incomplete copy of one.")
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}/config.json can't be read: {error}") from error
