"""The model that each stage of a recipe leaves, known before anything is trained."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from auxin.accounting import count_parameters
from auxin.data.dataset import SampleForm
from auxin.edits import Plan, planned_config
from auxin.edits.structure import edited_config, edited_skeleton, structural_edits
from auxin.errors import ConfigError, PlanError, first_line, placed, unknown_name
from auxin.foreign import refuse_setting
from auxin.methods import method as find_method
from auxin.methods.grow.tokenformer import plan_token_growth, token_growth_to
from auxin.models.anatomy.parts import base_prefix
from auxin.models.configs import refuse_endless
from auxin.models.loading import REFUSALS, load_config, task_classes
from auxin.models.tokenformer.presets import preset_config
from auxin.models.tokenformer.slots import ParameterTokensConfig
from auxin.objectives.calibration import CalibrationSettings
from auxin.objectives.objective import ObjectiveSettings, is_encoder_decoder
from auxin.planning.bench import Bench
from auxin.planning.hooks import asked_by
from auxin.planning.method import Method, asked_data, estimate_plan, make_plan
from auxin.recipes.schema import BuildStage, ChangeStage, Recipe, TrainStage
from auxin.recipes.stage_hooks import refuse_with_lora
from auxin.settings import Settings

_HIDDEN_FIELDS = {"_name_or_path", "transformers_version", "architectures", "auto_map", "torch_dtype"}
"""Fields that saved configs have and nobody sets."""
_COMMON_FIELDS = _HIDDEN_FIELDS | {
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "tie_word_embeddings", "use_cache", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "is_decoder", "is_encoder_decoder"),
    *("output_attentions", "output_hidden_states", "return_dict", "attn_implementation", "pruned_heads"),
    *("add_cross_attention", "cross_attention_hidden_size", "decoder_start_token_id", "prefix", "task_specific_params"),
    *("tie_encoder_decoder", "torchscript", "use_bfloat16", "finetuning_task", "tf_legacy_loss", "tokenizer_class"),
    *("quantization_config",),
}
"""Fields that any transformers config may have, today or in files written by earlier versions."""

StageConfigs = dict[str, dict[str, PreTrainedConfig]]
"""Branch name -> stage name -> the config of the model which that stage leaves; of `estimated_stages` a likely one."""


def stage_configs(recipe: Recipe, form: SampleForm) -> StageConfigs:
    """Follow every branch of `recipe` on configs alone.

    Args:
        recipe: the recipe.
        form: of the data's samples; config fields that it does not know yet (vocab_size, ...) are those that a model
            has of itself.

    Raises:
        ConfigError, PlanError: a model that can't be built or a growth that can't be done, before any work starts.
    """
    structures: StageConfigs = {}
    brought: dict[tuple[str, str], list[str]] = {}
    """Kinds of hooks that changes bring along for the next train stage, by the branch and stage before it."""
    for branch in recipe.branches:
        config: PreTrainedConfig | None = None
        hooks: list[str] = []
        if branch.fork is not None:
            parent, _, stage_name = branch.fork.partition("/")
            config, hooks = structures[parent][stage_name], brought[parent, stage_name]
        stages: dict[str, PreTrainedConfig] = {}
        for stage in branch.stages:
            with recipe.at(branch, stage):
                if isinstance(stage, BuildStage):
                    config = built_config(stage, structures, form, recipe.objective)
                elif isinstance(stage, ChangeStage):
                    assert config is not None  # the schema: a branch begins with a build or a fork
                    found, brings = _changed(_Change(stage, config, recipe.seed))
                    config, hooks = copy.deepcopy(found), [*hooks, *brings]
                elif isinstance(stage, TrainStage):
                    assert config is not None
                    refuse_with_lora(stage, [*hooks, *(hook.kind for hook in stage.hooks)])
                    hooks = []
                    for hook in stage.hooks:
                        with placed("hooks: "):
                            hook.check(config)
            brought[branch.name, stage.name] = hooks
            assert config is not None
            stages[stage.name] = config
        structures[branch.name] = stages
    return structures


class _Change:
    """A change of a model; equal to one that asks for the same of the same."""

    def __init__(self, stage: ChangeStage, config: PreTrainedConfig, seed: int) -> None:
        self.stage, self.config, self.seed = stage, config, seed
        asked = json.dumps(stage.model_dump(exclude={"name"}), default=str)  # numpy's numbers, too
        text = f"{type(config).__qualname__} {config.to_json_string(use_diff=False)} {asked} {seed}"
        self._key = text, None if stage.method is None else _asked_method(stage, stage.method)[0]

    def __hash__(self) -> int:
        return hash(self._key[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Change) and other._key == self._key


@lru_cache(maxsize=1024)
def _changed(change: _Change) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """The config that a change leaves, which nobody may change, and the kinds of hooks that it brings. A recipe is gone
    over before its data is there and again with it, and many branches may begin with one change."""
    plan = change_plan(change.stage, Bench(edited_skeleton(change.config), seed=change.seed))
    return planned_config(plan.edits, change.config), tuple(hook.kind for hook in asked_by(plan))


def change_plan(stage: ChangeStage, bench: Bench) -> Plan:
    """The plan of the growth that `stage` asks for. Messages begin with the field.

    Args:
        stage: the stage.
        bench: the model to grow, the data that the stage looks at, and the recipe's seed. Where the model is on the
            meta device, the plan of a method that looks at weights is an estimate.

    Raises:
        ConfigError: there is no such method, or a setting is unknown or wrong.
        PlanError: the growth is impossible.
    """
    if stage.method is None:
        config = bench.model.config
        with placed("tokens: " if stage.to is None else "to: "):
            if not isinstance(config, ParameterTokensConfig):
                raise PlanError(f"only a TokenFormer grows by tokens, this is a {config.model_type}.")
            growth = bench.seeded(stage.tokens or token_growth_to(config, str(stage.to)))
            return plan_token_growth(config, growth, base_prefix(bench.model))
    method, settings = _asked_method(stage, stage.method)
    make = estimate_plan if next(bench.model.parameters()).is_meta else make_plan
    with placed("settings: " if stage.settings else "method: "):
        plan = make(method, bench, settings)
        if plan.kept_tokens is not None:
            raise PlanError(
                f"{method.name} gives tokens other ids, and the run's data has those of before, in which it is "
                "measured from the first stage to the last. Do it before the run, with `auxin plan` and `auxin apply`, "
                "and start from the result."
            )
        return plan


def change_data(stage: ChangeStage) -> CalibrationSettings | None:
    """How much of the training split the method of `stage` looks at or learns from; None: nothing, as for most methods.
    Messages begin with the field.

    Raises:
        ConfigError: there is no such method, a setting is wrong, or it looks at no data and the stage says how much.
    """
    if stage.method is None:
        return None
    method, settings = _asked_method(stage, stage.method)
    given = CalibrationSettings.parse(stage.calibration, within="calibration")
    with placed("calibration: "):
        return asked_data(method, settings, given)


def estimated_stages(recipe: Recipe) -> set[tuple[str, str]]:
    """The stages, as (branch, stage), whose model is not known for sure before the run, only by an outline: growths by
    methods that look at weights or at files of a checkpoint, what follows them, and what is built like them."""
    found: set[tuple[str, str]] = set()
    ends: set[str] = set()
    """Branches that end with one."""
    for branch in recipe.branches:
        estimated = branch.fork is not None and tuple(branch.fork.split("/", 1)) in found
        for stage in branch.stages:
            if isinstance(stage, BuildStage):
                estimated = bool({stage.like, stage.parameters_of} & ends)
            elif isinstance(stage, ChangeStage) and stage.method is not None:
                estimated = estimated or find_method(stage.method).is_estimated
            if estimated:
                found.add((branch.name, stage.name))
        if estimated:
            ends.add(branch.name)
    return found


def _asked_method(stage: ChangeStage, name: str) -> tuple[Method, Settings]:
    """The method called `name`, and its settings in `stage`."""
    with placed("method: "):
        method = find_method(name)
    return method, method.settings.parse(stage.settings, within="settings")


def final_config(structures: StageConfigs, branch: str) -> PreTrainedConfig:
    """The config that `branch` ends with."""
    return list(structures[branch].values())[-1]


def built_config(
    stage: BuildStage, structures: StageConfigs, form: SampleForm, objective: ObjectiveSettings
) -> PreTrainedConfig:
    """The config of the model that `stage` builds. Messages begin with the field.

    Args:
        stage: the stage.
        structures: of the branches that `like` and `parameters_of` name.
        form: as for `stage_configs`.
        objective: what the model is built for.

    Raises:
        ConfigError: it can't be built.
    """
    refuse_setting(stage.config, "config: ", ConfigError)
    decided = {**form.config_values, **objective.config_values(form)}
    if form.vocab_size is not None:
        decided["vocab_size"] = _padded(form.vocab_size + objective.extra_tokens(form), stage)
    if stage.like is not None:
        config = final_config(structures, stage.like)
        if structural_edits(config):
            raise ConfigError(
                f"like: {stage.like!r} ends with modules that no config describes, so that "
                "there is nothing to build from scratch. Name another branch, or give model_type and config."
            )
        return _ungrown(config)
    if stage.checkpoint is not None:
        with placed("checkpoint: "):
            return _adopted(load_config(stage.checkpoint), form, objective)
    if stage.preset is not None:
        with placed("preset: "):
            preset = preset_config(stage.preset)
            architecture_of(preset, form, objective)
        with placed("config: "):
            return edited_config(preset, {**decided, **stage.config})
    config = _configured(stage, {**decided, **stage.config})
    if is_encoder_decoder(config):
        _begin_and_end(config, stage)
    with placed("model_type: "):
        config.architectures = [architecture_of(config, form, objective)]
    with placed("config: "):
        _check_sizes(config)
    if stage.parameters_of is not None:
        target = count_parameters(edited_skeleton(final_config(structures, stage.parameters_of))).total
        config = match_parameters(config, target)
    return config


def _padded(tokens: int, stage: BuildStage) -> int:
    return math.ceil(tokens / stage.pad_to_multiple_of) * stage.pad_to_multiple_of


def architecture_of(config: PreTrainedConfig, form: SampleForm, objective: ObjectiveSettings) -> str:
    """The name of the class that a model of `config` has to be to learn `objective` from samples of `form`.

    Raises:
        ConfigError: transformers has none.
    """
    auto = objective.auto_class(form)
    found = task_classes(auto, config)
    if not found:
        raise ConfigError(
            f"{config.model_type} has no class for the objective {objective.kind!r} ({auto.__name__}). Give "
            "another model_type, or another training.objective."
        )
    return found[0].__name__


def _adopted(config: PreTrainedConfig, form: SampleForm, objective: ObjectiveSettings) -> PreTrainedConfig:
    """The config of the model that a checkpoint of `config` becomes: one with a new head where the class that it was
    saved with does not learn `objective`, and another class of its type does."""
    names = [found.__name__ for found in task_classes(objective.auto_class(form), config)]
    if not config.architectures or not names or config.architectures[0] in names:
        return config
    values = objective.config_values(form)
    if getattr(config, "pad_token_id", None) is None and "pad_token_id" in form.config_values:
        values["pad_token_id"] = form.config_values["pad_token_id"]
    changed = edited_config(config, values)
    changed.architectures = names[:1]
    return changed


def _check_sizes(config: PreTrainedConfig) -> None:
    """Refuse sizes of which no model can be made, which many configs take; ConfigError."""
    try:
        edited_skeleton(config)
    except (*REFUSALS, OverflowError) as error:
        raise ConfigError(f"no {config.model_type} can be built with these sizes: {first_line(error)}") from error


def _begin_and_end(config: PreTrainedConfig, stage: BuildStage) -> None:
    """Give the config of an encoder-decoder the tokens that texts begin and end with.

    The decoder starts from the padding token, as T5's does, else from the end token; what the type's own defaults name
    (also as the end that BART is forced to) would be any token of this tokenizer. What the stage's `config` says goes
    first.
    """
    if "decoder_start_token_id" not in stage.config:
        config.decoder_start_token_id = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    if getattr(config, "forced_eos_token_id", None) is not None and "forced_eos_token_id" not in stage.config:
        config.forced_eos_token_id = config.eos_token_id


def _configured(stage: BuildStage, values: dict[str, Any]) -> PreTrainedConfig:
    """The config of `stage`'s model type with `values`.

    Raises:
        ConfigError: an unknown type, a field that it does not have, or values that it refuses.
    """
    model_type = str(stage.model_type)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"model_type: {unknown_name('architecture', model_type, CONFIG_MAPPING)}")
    try:
        refuse_endless(values)
        config = AutoConfig.for_model(model_type, **values)
    # The checks of transformers' configs raise a plain Exception of their own.
    except (*REFUSALS, OverflowError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"config: {model_type} refuses it: {reason}") from error
    own = type(config)
    known = {*own().to_dict(), *own.attribute_map, *_COMMON_FIELDS}
    # A config keeps what it does not know; what it translates (a former name of a field) it does not keep.
    if unknown := [
        key for key in stage.config if key not in known and not key.startswith("_") and key in config.to_dict()
    ]:
        message = unknown_name(f"{model_type} config field", unknown[0], known - _HIDDEN_FIELDS)
        raise ConfigError(f"config: {message}")
    return config


def _ungrown(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same size as it is built from scratch: a TokenFormer's groups are one."""
    if not isinstance(config, ParameterTokensConfig):
        return config
    one_group = {f"{part}_tokens": [sum(getattr(config, f"{part}_tokens"))] for part in ("qkv", "proj", "ffn")}
    usual = {f"{part}_{number}": None for part in ("qkv", "proj", "ffn") for number in ("tau", "eps")}
    return edited_config(config, {**one_group, **usual})


def match_parameters(config: PreTrainedConfig, target: int) -> PreTrainedConfig:
    """Set the hidden and intermediate size of a dense `config` so that its parameter count comes nearest to `target`.

    The hidden size is the largest (in steps that keep head sizes even) that does not exceed `target` with an
    intermediate size of four times as much; the intermediate size then takes up what is left.

    Raises:
        ConfigError: the smallest such model is larger than `target`, or the family has no such sizes.
    """
    step = 2 * config.num_attention_heads

    def sized(hidden_size: int, intermediate_size: int) -> PreTrainedConfig:
        return edited_config(config, {"hidden_size": hidden_size, "intermediate_size": intermediate_size})

    def count(candidate: PreTrainedConfig) -> int:
        return count_parameters(edited_skeleton(candidate)).total

    width = step * _last_below(lambda steps: count(sized(step * steps, 4 * step * steps)) <= target)
    if width == 0:
        raise ConfigError(
            f"parameters_of: no {config.model_type} of {config.num_hidden_layers} layers and "
            f"{config.num_attention_heads} heads is as small as {target} parameters. Use fewer layers or heads."
        )
    intermediate = _last_below(lambda size: count(sized(width, size)) <= target)
    return min(_neighbours(sized, width, intermediate), key=lambda candidate: abs(count(candidate) - target))


def _neighbours(
    sized: Callable[[int, int], PreTrainedConfig], width: int, intermediate: int
) -> Iterator[PreTrainedConfig]:
    yield sized(width, intermediate)
    yield sized(width, intermediate + 1)


def _last_below(holds: Callable[[int], bool]) -> int:
    """The largest n for which `holds(n)`, which holds up to some n and not above it; 0 if it never holds."""
    high = 1
    while holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
