"""Models from folders and from configs: with their weights, as configs alone, or with shapes and no data."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from auxin.accounting.machine import available_memory
from auxin.errors import CheckpointError, ConfigError, first_line
from auxin.foreign import offline, refuse_active, refuse_active_file, refuse_files_elsewhere, refuse_links_out
from auxin.models.configs import refuse_endless
from auxin.models.folders import CONFIG_FILE, model_folder
from auxin.models.stored_form import StoredForm
from auxin.models.ties import TIED, UNTIED, configs_with_ties, unmarked, untie, untied_on_loading
from auxin.models.weight_files import read_tensor, refuse_pieces, stored_tensors

_TASKS = (
    (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
    (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
)
REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ZeroDivisionError,
    KeyError,
    IndexError,
)
"""What constructors raise on values that they can't take."""


def load_config(folder: str | Path) -> PreTrainedConfig:
    """The config of a local Hugging Face model folder.

    Which parameters are one tensor is as `from_pretrained` finds it: where the config ties two that the folder holds
    with different values, it says that they are not tied (see `auxin.models.ties`). Only for that weights are read,
    where the folder has any.

    Raises:
        CheckpointError: the folder is missing, has no config.json, holds one that transformers can't read or whose
            model is code of the folder's own, or names what would be fetched or run (`auxin.foreign`).
    """
    folder = _model_folder(folder)
    return _with_stored_ties(_read_config(folder, folder / CONFIG_FILE), folder)


def load_config_file(path: str | Path) -> PreTrainedConfig:
    """The config in a file by itself, whatever its name; no weights are looked for beside it.

    Raises:
        CheckpointError: as `load_config`, or the file holds something else.
    """
    return _read_config(Path(path), Path(path))


def _read_config(source: Path, path: Path) -> PreTrainedConfig:
    """The config in the file `path`, for which transformers is given `source`: the file, or the folder it lies in."""
    try:
        with offline():
            values, _ = PreTrainedConfig.get_config_dict(source, local_files_only=True)
            refuse_active(values, str(path))
            if "model_type" not in values and source == path:
                raise CheckpointError(f"{path} has no model_type: it is no config of a transformers model. Give one.")
            refuse_endless(values)
            _refuse_own_code(values, path)
            config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except OfflineModeIsEnabled as error:
        wanted = str(error).partition(": offline mode")[0]
        raise CheckpointError(
            f"{path} names something on the Hub, and nothing is fetched for a folder ({wanted}). Say in the config "
            "what it is: backbone_config in place of backbone, for example."
        ) from error
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    return cast(PreTrainedConfig, config)


def _refuse_own_code(values: dict[str, Any], path: Path) -> None:
    """CheckpointError where the model is none of transformers', but code that the config in `path` names."""
    model_type = str(values.get("model_type"))
    if "auto_map" in values and model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: model_type {model_type!r} is none of transformers', and auto_map names code of the "
            "model's own, which is not run. Give a model that transformers has, or one that a package of yours "
            "registers with it."
        )


def _with_stored_ties(config: PreTrainedConfig, folder: Path) -> PreTrainedConfig:
    """`config`, or one that tells which of the tensors in `folder` are tied where it doesn't."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    if not any(getattr(part, TIED, False) for part in (config, *parts)) and not hasattr(config, UNTIED):
        return config
    stored, plain = stored_tensors(folder), unmarked(config)
    if not stored:
        return config
    try:
        bare = skeleton(plain)
        ties, form = bare.all_tied_weights_keys, StoredForm(bare)
        names = {form.loaded_as(name): name for name in stored}
        untied = untied_on_loading(ties, names, lambda name: read_tensor(stored[names[name]], names[name]))
        found = configs_with_ties(plain, ties, untied) if untied else []
        fitting = (each for each in found if skeleton(each).all_tied_weights_keys.keys() == ties.keys() - set(untied))
        return next(fitting, plain)
    except (*REFUSALS, SafetensorError, OSError):
        return config  # what can't be built or read is refused, with its reason, where that is done


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    model_class: Any = None,
) -> PreTrainedModel:
    """Load the model of a checkpoint folder, or of any local Hugging Face model folder.

    Args:
        folder: the folder.
        device: where to put it.
        dtype: of its weights; None is the type they were saved in. Training needs torch.float32.
        model_class: what loads it; default: the class that its config names.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or holds no model. A weight that is missing is an
            error, where transformers would warn and draw a random one.
    """
    folder = _model_folder(folder)
    config = load_config(folder)
    if model_class is None:
        model_class = model_class_of(config)
    model, missing = _from_pretrained(folder, model_class, dtype=dtype or "auto", config=config)
    _refuse_missing(folder, missing)
    torch.nn.Module.to(model, device)
    return model


def load_with_new_head(
    folder: str | Path, config: PreTrainedConfig, saved: PreTrainedModel
) -> tuple[PreTrainedModel, list[str]]:
    """Load a checkpoint as a model with another head, of which what the checkpoint's own class does not have is drawn
    from torch's generator.

    Args:
        folder: the checkpoint.
        config: the model's, with the class in `architectures`.
        saved: the checkpoint's own model; its weights are not looked at.

    Returns:
        The model in the type of its saved weights, and the names of the weights that were drawn.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or lacks a weight that its own class has.
    """
    folder = _model_folder(folder)
    model, missing = _from_pretrained(folder, model_class_of(config), dtype="auto", config=copy.deepcopy(config))
    own = {_below_head(name, saved) for name in saved.state_dict()}
    _refuse_missing(folder, [name for name in missing if _below_head(name, model) in own])
    return model, missing


def _below_head(name: str, model: PreTrainedModel) -> str:
    """A weight's name in the model without a head, which is a part of one with a head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _from_pretrained(folder: Path, model_class: Any, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the weights that the folder lacks."""
    refuse_pieces(folder)
    try:
        with no_progress_bar(), offline():
            model, info = model_class.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
            )
    except UnpicklingError as error:
        raise CheckpointError(
            f"{folder} can't be loaded: its weights are in a pickle, and of one nothing but tensors is read. Load the "
            "model where you trust it, and save it with save_pretrained."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} can't be loaded as {_in_words(model_class)}: {first_line(error).rstrip('.')}. Restore it or use "
            "another one."
        ) from error
    return model, sorted(info["missing_keys"])


def _refuse_missing(folder: Path, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weight(s) that its config asks for, the first: {missing[0]}. "
            "Restore it or use another one."
        )


def model_class_of(config: PreTrainedConfig) -> Any:
    """The class that `config` was saved with, one of transformers'; without one, the Auto class of the first task that
    its type has: language modelling from one sequence to another, masked or causal, classifying images or texts; else
    that of models without a task."""
    name = next(iter(config.architectures or []), "")
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return next((auto for auto, mapping in _TASKS if type(config) in mapping), AutoModel)


def task_classes(auto_class: Any, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an Auto class has for models of `config`; none where it has none."""
    found = auto_class._model_mapping.get(type(config), None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def is_ctc(model: PreTrainedModel) -> bool:
    """Whether `model` reads a text out of a recording, with labels that are at no place of its output (CTC)."""
    return isinstance(model, task_classes(AutoModelForCTC, model.config))


def skeleton(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A model of `config` on the meta device, its non-persistent buffers real, as after loading a checkpoint.

    Args:
        config: the config; the skeleton gets a copy.
        model_class: the class of the model; None means the one that the config was saved with.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"), offline():
        model = new_model(config, model_class)
        untie(model)
    fill_buffers(model, "", model)
    return model


def new_model(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A model of `config` with random weights, drawn from torch's generator.

    Args:
        config: the config.
        model_class: the class of the model; None means the one that the config was saved with.
    """
    found: Any = model_class or model_class_of(config)
    model = found(config) if issubclass(found, PreTrainedModel) else found.from_config(config, trust_remote_code=False)
    return cast(PreTrainedModel, model)


def initialisers(model: PreTrainedModel, path: str, part: nn.Module) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """The modules of `part`, each with the innermost model that holds it: that one's `_init_weights` is its rule.

    Args:
        model: the whole model.
        path: where in it `part` stands, or will stand.
        part: a module.
    """
    above: PreTrainedModel = model
    names = path.split(".")
    for length in range(1, len(names)):
        module = model.get_submodule(".".join(names[:length]))
        above = module if isinstance(module, PreTrainedModel) else above
    holders: dict[str, PreTrainedModel] = {}
    for name, module in part.named_modules():
        holder = holders[name.rpartition(".")[0]] if name else above
        holders[name] = module if isinstance(module, PreTrainedModel) else holder
        yield module, holders[name]


def fill_buffers(model: PreTrainedModel, path: str, part: nn.Module) -> None:
    """Make the buffers outside of checkpoints real in `part`, which stands or will stand at `path` of `model`, with the
    values that loading gives them.

    Raises:
        ConfigError: there is no memory for them.
    """
    _refuse_large_buffers(part)
    for module, holder in initialisers(model, path, part):
        names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        for name in names:
            module._buffers[name] = torch.zeros_like(cast(Tensor, module._buffers[name]), device="cpu")
        if names:
            # Buffers outside of checkpoints are filled by a model's own initialisation; on parameters without data
            # that does nothing.
            holder._init_weights(module)


def _refuse_large_buffers(part: nn.Module) -> None:
    """ConfigError when the buffers outside of checkpoints need more memory than there is: a table of positions, say."""
    sizes = {
        f"{path}.{name}".lstrip("."): buffer.numel() * buffer.element_size()
        for path, module in part.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }
    needed, room = sum(sizes.values()), available_memory()
    if room is not None and needed > room:
        largest = max(sizes, key=sizes.__getitem__)
        raise ConfigError(
            f"the tables that no checkpoint holds need {needed:,} bytes, {sizes[largest]:,} of them {largest}, and "
            f"there is memory for {room:,}. Give a smaller size, of the positions most likely"
        )


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Within the context, transformers draws no bar of its own for every folder it reads or writes."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _in_words(model_class: Any) -> str:
    return "a causal language model" if model_class is AutoModelForCausalLM else model_class.__name__


def _model_folder(path: str | Path) -> Path:
    folder = model_folder(path)
    refuse_links_out(folder, below=("training",))
    for index in sorted(folder.glob("*.index.json")):
        refuse_files_elsewhere(index)
    refuse_active_file(folder / "adapter_config.json")  # which transformers follows where peft is installed
    return folder
