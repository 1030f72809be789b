"""The folders of models: that a path is one of them, or what was most likely meant."""

import os
from collections import deque
from pathlib import Path

from auxin.errors import CheckpointError, listed
from auxin.files import existing_folder as _existing_folder
from auxin.models.weight_files import first_file

CONFIG_FILE = "config.json"
DEEPEST = 7
"""Folders below one that is no model in which models are looked for: those of a run with several seeds lie six deep."""
MOST_LOOKED_AT = 5000
"""Folders that are looked at for them."""


def existing_folder(path: str | Path) -> Path:
    """`path`; CheckpointError when it is no folder."""
    return _existing_folder(path, "the folder of a checkpoint", CONFIG_FILE)


def model_folder(path: str | Path) -> Path:
    """`path`, the folder of a model.

    Raises:
        CheckpointError: it is none. Where checkpoints lie in it, as in the folder of a run or of a stage, the message
            names them.
    """
    folder = existing_folder(path)
    if (folder / CONFIG_FILE).is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter and no model. Load its model with it (peft), merge them (merge_and_unload) and "
            "save that."
        )
    if found := _newest_below(folder):
        raise CheckpointError(
            f"{folder} holds checkpoints and is none itself. Give one of those in it: {listed(found, whole=True)}"
        )
    raise CheckpointError(f"{folder} has no {CONFIG_FILE}: it is no model folder, or an incomplete copy of one.")


def _newest_below(folder: Path) -> list[Path]:
    """The folders of models in `folder`; of several that lie side by side by their step, the newest."""
    found: list[Path] = []
    open_ones, looked_at = deque([(folder, 0)]), 0
    while open_ones and looked_at < MOST_LOOKED_AT:
        inner, depth = open_ones.popleft()
        looked_at += 1
        if (inner / CONFIG_FILE).is_file():
            # A file of that name alone is anybody's.
            found += [inner] if first_file(inner) is not None or any(inner.glob("*.bin")) else []
        elif depth < DEEPEST:
            open_ones += [(below, depth + 1) for below in _folders_in(inner)]
    steps = {path.parent: path for path in sorted(found) if path.name.startswith("step-")}
    return sorted(path for path in found if steps.get(path.parent, path) == path)


def _folders_in(folder: Path) -> list[Path]:
    """Those that are neither hidden nor kept aside, nor links, which may lead round."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith((".", "damaged-", "former-"))]
