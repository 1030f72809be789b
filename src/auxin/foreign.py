"""What comes from elsewhere is data: for a model folder, a plan or a recipe nothing of it is run, nothing that it names
is fetched, and no file is read that lies outside of it.

transformers has many ways from a value in a config to code: `auto_map` names modules of the folder or of a repository
(and asks on the terminal whether to run them), an implementation of attention or of experts can be a kernel on the Hub,
a backbone a model there, and arguments are handed to timm, which unpickles. Those that it has today are refused by
name; whatever else it may come to fetch is stopped by `offline`.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auxin.errors import AuxinError, CheckpointError, PlanError

_ATTENTION = ("eager", "sdpa", "flex_attention")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_IMPLEMENTATIONS = {
    f"{before}{kind}_implementation{after}": known
    for kind, known in (("attn", _ATTENTION), ("experts", _EXPERTS))
    for before, after in (("", ""), ("_", ""), ("_", "_internal"))
}
"""What transformers has within itself. Others are kernels, by their repository or by a name that stands for one: for
want of its package, flash_attention_2 becomes a repository, too."""
_MODELS = ("backbone", "architecture")
"""Names of a model of timm ("resnet50"), or of one on the Hub or in a file ("hf-hub:org/name", "org/name")."""
_ARGUMENTS = ("model_args", "timm_kwargs", "backbone_kwargs")
"""Arguments that timm's `create_model` is called with."""
_LOADING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
"""Those of them that make it fetch weights or unpickle a file."""
_FILE_LISTS = ("configuration_files", "fast_tokenizer_files")
"""Names of other files that are read in place of config.json or tokenizer.json."""
_LABELS = ("id2label", "label2id")
"""Names of classes, which may be any words."""
_NOT_SET = frozenset(
    {
        *("auto_map", "custom_pipelines", "trust_remote_code", "custom_generate"),
        *("name_or_path", "quantization_config", "transformers_weights", "extra_files", "extra_config_files"),
        *("kernel_config", "use_kernels", "use_pretrained_backbone", "use_timm_backbone"),
        *("index_path", "passages_path"),
        *(*_MODELS, *_ARGUMENTS, *_FILE_LISTS),
    }
)
"""Values that say where a model or its code is from and how it is stored, not what it is."""


def refuse_active(values: Mapping[str, Any], where: str, error: type[AuxinError] = CheckpointError) -> None:
    """Refuse a config, or another file of JSON values in a model folder, that would make transformers fetch or run
    something that the folder names.

    Args:
        values: what it says.
        where: it stands.
        error: what to raise.

    Raises:
        the error: there is such a value.
    """
    for name, reason in _active(values):
        raise error(f"{where}: {name}: {reason}. Take it out.")


def refuse_active_file(path: Path, error: type[AuxinError] = CheckpointError) -> None:
    """As `refuse_active`, for a file of JSON that may be there; what can't be read is left to who needs it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(values, dict):
        refuse_active(values, str(path), error)


def refuse_setting(values: Mapping[str, Any], where: str = "", error: type[AuxinError] = PlanError) -> None:
    """Refuse to set what `refuse_active` refuses in a config, and all that says where a model is from.

    Args:
        values: new values of a config, by dotted names.
        where: put in front of the message.
        error: what to raise.

    Raises:
        the error: there is such a value.
    """
    from transformers import PreTrainedConfig

    own = {name for name in values if name.rpartition(".")[2].startswith("_")}
    for name in _names(values):
        last = name.rpartition(".")[2]
        if callable(getattr(PreTrainedConfig, last, None)):
            raise error(f"{where}{name} is no value of a config, but belongs to its class. Leave it out.")
        if last in _NOT_SET or (name in own and last not in _IMPLEMENTATIONS):
            raise error(
                f"{where}{name} can't be set: it says where a model or its code is from, or how it is stored, and "
                "nothing of its structure. Leave it out."
            )
    for name, reason in _active(values):
        raise error(f"{where}{name}: {reason}. Leave it out.")


def _active(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The dotted name of each value that would fetch or run something, and what it would do."""
    for key, value in values.items():
        name, last = f"{path}{key}", str(key).rpartition(".")[2]
        if last in _IMPLEMENTATIONS:
            known = _IMPLEMENTATIONS[last]
            for text in _texts(value):
                if text not in known:
                    yield (
                        name,
                        f"{text!r} is no implementation that transformers has within itself ({', '.join(known)}), but "
                        "names code that it would fetch and run",
                    )
        elif last in _MODELS and isinstance(value, str) and ("/" in value or ":" in value):
            yield name, f"{value!r} names a model elsewhere, which transformers or timm would fetch"
        elif last == "transformers_weights" and value is not None:
            yield name, f"{value!r} would be loaded in place of the folder's model.safetensors"
        elif last in _FILE_LISTS and any(os.path.basename(text) != text for text in _texts(value)):
            yield name, "it names files outside of the folder"
        elif last == "megatron_config" and value is not None:
            yield name, "it makes peft import a module by its name"
        elif isinstance(value, Mapping) and last not in _LABELS:
            if last in _ARGUMENTS and (loading := next((word for word in _LOADING if value.get(word)), None)):
                yield f"{name}.{loading}", "it makes timm fetch weights or load a file"
            yield from _active(value, f"{name}.")
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _active(item, f"{name}.{place}.")


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value: itself, or those that it holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _names(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted names of all values but None, those of groups of values among them."""
    for key, value in values.items():
        if value is not None:
            yield f"{path}{key}"
        if isinstance(value, Mapping) and key not in _LABELS:
            yield from _names(value, f"{path}{key}.")


class _Switch:
    """Counts who wants huggingface_hub to be offline: of several at once, in threads, the last one puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted, self._before = 0, False

    def add(self, number: int) -> None:
        from huggingface_hub import constants

        with self._lock:
            if not self._wanted:
                self._before = constants.HF_HUB_OFFLINE
            self._wanted += number
            constants.HF_HUB_OFFLINE = bool(self._wanted) or self._before


_switch = _Switch()


@contextmanager
def offline() -> Iterator[None]:
    """Within the context huggingface_hub, through which transformers, peft and kernels fetch, reaches nothing; in other
    threads neither, as it has one switch for the process."""
    _switch.add(1)
    try:
        yield
    finally:
        _switch.add(-1)


def lies_outside(path: Path, folder: Path) -> bool:
    """Whether `path`, which is below `folder` by its name, lies elsewhere: a link leads out of it, or a "..".

    A snapshot in the Hugging Face cache is made of links into the `blobs` beside the snapshots, which belong to it.
    """
    root = Path(os.path.realpath(folder))
    homes = [root, *(above.parent / "blobs" for above in root.parents if above.name == "snapshots")]
    real = Path(os.path.realpath(path))
    return not any(real.is_relative_to(home) for home in homes)


def refuse_files_elsewhere(index: Path) -> None:
    """CheckpointError where the index of weights in pieces names a file outside of its folder; what can't be read is
    left to who needs it."""
    try:
        files = {str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    for file in sorted(files):
        if lies_outside(index.parent / file, index.parent):
            raise CheckpointError(f"{index} names {file!r}, which lies outside of the folder. Copy the file into it.")


def refuse_links_out(folder: Path, error: type[AuxinError] = CheckpointError, below: Iterable[str] = ()) -> None:
    """Refuse a model folder with a link that leads out of it: what lies elsewhere would be read, and copied, in its
    name.

    Args:
        folder: the folder; its own entries are looked at.
        error: what to raise.
        below: folders in it, by name, whose entries are looked at as well.

    Raises:
        the error: there is such a link.
    """
    for parent in (folder, *(folder / name for name in below)):
        if parent.is_dir():
            _refuse_links(folder, sorted(parent.iterdir()), error)


def refuse_links_out_anywhere(folder: Path) -> None:
    """As `refuse_links_out`, for a folder that is copied as a whole: all that is below it is looked at, and a link to a
    folder that it lies in is refused, too, as copying would not end.

    Raises:
        CheckpointError: there is such a link.
    """
    for parent, folders, files in os.walk(folder):
        paths = [Path(parent, name) for name in sorted([*folders, *files])]
        _refuse_links(folder, paths, CheckpointError)
        for path in paths:
            if path.is_symlink() and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path)):
                raise CheckpointError(f"{path} is a link to a folder that it lies in itself. Take the link away.")


def _refuse_links(folder: Path, paths: Iterable[Path], error: type[AuxinError]) -> None:
    for path in paths:
        if path.is_symlink() and lies_outside(path, folder):
            raise error(
                f"{path} is a link that leads out of the folder, to {os.path.realpath(path)}: nothing from elsewhere "
                "is read or copied in a model's name. Put a copy there, or take the link away."
            )
