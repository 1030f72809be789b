"""The structure of a model without its weights: configs as values, and skeletons of edited models."""

import copy
import json
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from auxin.edits.kinds.module_edits import StructuralEdit
from auxin.edits.mark import REPLAY_METHOD
from auxin.edits.tensor_names import tensor_names
from auxin.errors import CheckpointError, PlanError, unknown_name
from auxin.foreign import refuse_active, refuse_setting
from auxin.models.configs import edited_config as edited_config
from auxin.models.configs import refuse_endless
from auxin.models.deferred import undeferred
from auxin.models.loading import REFUSALS, skeleton
from auxin.models.ties import configs_with_ties, unmarked
from auxin.nn.bricks import Brick

Watcher = Callable[[Any, PreTrainedModel], None]

_EDITS: TypeAdapter[list[Any]] = TypeAdapter(list[StructuralEdit])


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The config as JSON values, its type's defaults left out."""
    values = json.loads(config.to_json_string(use_diff=True))
    return {**values, "model_type": config.model_type}


def other_architecture(
    model: PreTrainedModel, model_type: str, values: dict[str, Any]
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Config and class of a model of the architecture `model_type` that does what `model` does.

    Values that both configs know by one name are carried over.

    Raises:
        PlanError: there is no such architecture, it has no model for the same task, or a value is refused.
    """
    if model_type not in CONFIG_MAPPING:
        raise PlanError(unknown_name("architecture", model_type, CONFIG_MAPPING))
    refuse_setting(values)
    cls = CONFIG_MAPPING[model_type]
    tasks = [mapping for mapping in vars(modeling_auto).values() if isinstance(mapping, _LazyAutoMapping)]
    same = (mapping for mapping in tasks if cls in mapping and mapping.get(type(model.config), None) is type(model))
    task = next(same, None)
    if task is None:
        raise PlanError(f"{model_type} has no model that does what a {type(model).__name__} does")
    known = cls().to_dict()
    if unknown := [key for key in values if key not in known]:
        raise PlanError(f"{cls.__name__} has no value {unknown[0]!r}")
    own = {"model_type", "architectures", "transformers_version", "quantization_config", "_name_or_path"}
    carried = {key: value for key, value in model.config.to_dict().items() if key in known and key not in own}
    try:
        return cls.from_dict({**carried, **copy.deepcopy(values)}), cast(type[PreTrainedModel], undeferred(task[cls]))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise PlanError(f"the config of {model_type} refuses it: {error.__cause__ or error}") from error


def config_from_values(values: dict[str, Any]) -> PreTrainedConfig:
    """The config that `config_values` describes.

    Raises:
        PlanError: there is no such architecture, its config refuses a value, or one names what would be fetched or run.
        ConfigError: a stack is too deep.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise PlanError(f"model_type: {unknown_name('architecture', str(model_type), CONFIG_MAPPING)}")
    refuse_active(values, "made_for", PlanError)
    refuse_endless(values)
    try:
        # JSON has no infinity; configs write it in another way, and read it again only from their own files.
        values = PreTrainedConfig._decode_special_floats(values)
        rest = {key: value for key, value in values.items() if key != "model_type"}
        return AutoConfig.for_model(model_type, **rest)
    except (*REFUSALS, StrictDataclassError, OverflowError) as error:
        raise PlanError(f"{model_type} refuses its config: {error.__cause__ or error}") from error


def saved_and_read(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config as it is after it was written to a config.json and read again.

    Raises:
        PlanError: it can't be read again.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.to_json_file(Path(folder) / "config.json")
            return type(config).from_pretrained(folder, local_files_only=True)
    except (*REFUSALS, OSError, StrictDataclassError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise PlanError(f"{type(config).__name__} refuses what it wrote: {error.__cause__ or error}") from error


def structural_edits(config: PreTrainedConfig) -> list[Any]:
    """The edits of the module tree that a model of `config` has gone through.

    Raises:
        CheckpointError: they can't be read.
    """
    stored = _stored(config)
    if stored.get("quant_method") != REPLAY_METHOD:
        return []
    try:
        return _EDITS.validate_python(stored.get("edits", []))
    except ValidationError as error:
        raise CheckpointError(
            f"the config's quantization_config holds edits that this version of auxin can't read: {error}. Use the "
            "version that wrote them, or a later one."
        ) from error


def with_structural_edits(config: PreTrainedConfig, edits: list[Any]) -> None:
    """Write `edits` into `config`, which then builds the edited model wherever auxin is imported."""
    if edits:
        config.quantization_config = {"quant_method": REPLAY_METHOD, "edits": written(edits)}
    elif _stored(config).get("quant_method") == REPLAY_METHOD:
        del config.quantization_config


def written(edits: list[Any]) -> list[dict[str, Any]]:
    """Structural edits as they stand in a config."""
    return cast(list[dict[str, Any]], _EDITS.dump_python(edits, mode="json", exclude_defaults=True))


def refuse_quantized(model: PreTrainedModel) -> None:
    """PlanError when the weights of `model` are packed by a quantizer."""
    method = _stored(model.config).get("quant_method")
    if method in (None, REPLAY_METHOD):
        # What is quantized in place leaves nothing in the config: PyTorch's own are modules, those of torchao and
        # bitsandbytes are tensors of other kinds.
        packed = chain(
            (type(module) for module in model.modules() if ".quantized." in f"{type(module).__module__}."),
            (kind for kind in map(type, model.parameters()) if kind.__module__.partition(".")[0] != "torch"),
        )
        method = next((f"{found.__module__}.{found.__name__}" for found in packed), None)
    if method is not None:
        raise PlanError(
            f"The model is quantized ({method}); its packed weights can't be changed or measured. Dequantize it first, "
            "save it, and remove quantization_config from its config."
        )


def edited_skeleton(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None, before_each: Watcher | None = None
) -> PreTrainedModel:
    """A model of `config` on the meta device, its structural edits done; buffers that no checkpoint holds are real.

    Args:
        config: the config; the skeleton gets a copy.
        model_class: the class of the model; None means the one that the config was saved with.
        before_each: called with every structural edit and the skeleton that it is about to be done to.
    """
    model = skeleton(config, model_class)
    if edits := structural_edits(config):
        with_structural_edits(model.config, rebuild(model, edits, before_each))
    return model


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """The skeleton of `model`, whose parameters are one tensor where the model's are, whatever its config says of it;
    the skeleton's own config tells it (`tie_word_embeddings`, or see `auxin.models.ties`).

    Raises:
        PlanError: no config tells of a model with such ties; the message names two of the parameters.
    """
    found = edited_skeleton(model.config, type(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if _ties(found) == _ties(model) or parameters.keys() != dict(found.named_parameters(remove_duplicate=False)).keys():
        return found
    plain = unmarked(model.config)
    told = edited_skeleton(plain, type(model)).all_tied_weights_keys
    untied = [name for name, kept in told.items() if parameters.get(name) is not parameters.get(kept)]
    for config in configs_with_ties(plain, told, untied):
        found = edited_skeleton(config, type(model))
        if _ties(found) == _ties(model):
            return found
    raise PlanError(_ties_in_words(_ties(model), _ties(found)))


def _ties(model: PreTrainedModel) -> set[frozenset[str]]:
    """The names of every tensor that has several."""
    return {frozenset(names) for names in tensor_names(model).values() if len(names) > 1}


def _ties_in_words(actual: set[frozenset[str]], told: set[frozenset[str]]) -> str:
    """Which two parameters are tied against what a config can say, or are not."""
    for names in sorted(map(sorted, actual)):
        apart = [name for name in names[1:] if not any({names[0], name} <= group for group in told)]
        if apart:
            return (
                f"{names[0]} and {apart[0]} are one tensor, and the model's config takes them for two. Give each its "
                "own torch.nn.Parameter, or tie them by a plan (tie_parameters)."
            )
    for names in sorted(map(sorted, told)):
        apart = [name for name in names[1:] if not any({names[0], name} <= group for group in actual)]
        if apart:
            return (
                f"{names[0]} and {apart[0]} are two tensors, and the model's config takes them for one. Call "
                "model.tie_weights(), or set tie_word_embeddings = False in its config and give every tied parameter "
                "its own torch.nn.Parameter."
            )
    raise AssertionError("the ties differ")


def rebuild(model: PreTrainedModel, edits: list[Any], before_each: Watcher | None = None) -> list[Any]:
    """Do structural `edits` to a model on the meta device; the buffers of bricks become real.

    Returns:
        The edits as `model` has them: where its class is not the one that they were saved with, paths begin elsewhere,
        and edits of a head that it lacks are left out.

    Raises:
        CheckpointError: an edit means nothing in `model`, which has the part that it should be in.
    """
    done = []
    for edit in edits:
        here = _in_class_of(model, edit)
        if here is None:
            continue
        if before_each is not None:
            before_each(here, model)
        here.rebuild(model)
        done.append(here)
    # Where a brick stands that has no such parameter, nothing is tied any more.
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = {tied: kept for tied, kept in (model.all_tied_weights_keys or {}).items() if {tied, kept} <= parameters}
    if ties != model.all_tied_weights_keys:
        model.all_tied_weights_keys = ties
    # A brick of another shape has parameters of its own: what was one tensor has to become one again.
    for tied, kept in ties.items():
        owner, _, name = tied.rpartition(".")
        if model.get_parameter(tied) is not (parameter := model.get_parameter(kept)):
            setattr(model.get_submodule(owner), name, parameter)
    fill_brick_buffers(model)
    return done


def _in_class_of(model: PreTrainedModel, edit: Any) -> Any | None:
    """`edit`, which was saved with another class of the same architecture it may be, as `model` has it: what stands
    below the base model's name in a model with a head stands at the top of one without. None where `model` has not the
    part of the model that it belongs to."""
    below = f"{model.base_model_prefix}."
    has_head = isinstance(getattr(model, model.base_model_prefix, None), nn.Module)
    moved = edit.moved(lambda path: f"{below}{path}" if has_head else path.removeprefix(below))
    for found in (edit, moved):
        if found.means_something_in(model):
            return found
    children = {name for name, _ in model.named_children()}
    if children & {edit.place.split(".")[0], moved.place.split(".")[0]}:
        raise CheckpointError(
            f"a {type(model).__name__} has nothing that the structural edit of {edit.place} in its config's "
            f"quantization_config could mean. Load it as what it was saved as "
            f"({', '.join(model.config.architectures or ['not named there'])})."
        )
    return None


def fill_brick_buffers(model: nn.Module) -> None:
    """Give the bricks' buffers that have no data the values that follow from the bricks' settings."""
    for module in model.modules():
        if not hasattr(module, "reset_buffers"):
            continue
        loaded = {
            name: buffer.clone()
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta and name not in module._non_persistent_buffers_set
        }
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        cast(Any, module).reset_buffers()
        module._buffers.update(loaded)
        if isinstance(module, Brick):
            module.filled()


def _stored(config: PreTrainedConfig) -> dict[str, Any]:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return {}
    return dict(stored if isinstance(stored, dict) else stored.to_dict())
