"""Whether values that a plan sets do anything: one without effect is a mistake of who asked for it, and is refused.

A value of `SetConfig` without effect is one of which the built model shows nothing. Since configs hold values, too,
that are read when the model runs (`use_cache`, ids of tokens), two kinds alone are judged:

* a value that the config's class has not of its own, so that no code of the architecture can be expected to read it,
  unless it is a token's id (`unk_token_id`), which other programs read;
* a size (an integer called num_layers, d_ff, head_dim, ...) that neither at its old value nor at twice the new one
  builds another model: the architecture takes that width from elsewhere, or all its modules have values of their own.

A value that is what it was is let through; many plans say so for clarity. So is one that was equal to another value of
the plan and stays equal to it (DeBERTa's pooler_hidden_size beside hidden_size): the config says the same twice, and a
model with another head than this one's may read it. What is judged of `ConfigureModule`, whose
values belong to single modules, is every value; so are the sizes of `ResizeModule`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.kinds.module_edits import ConfigureModule, ResizeModule
from auxin.errors import PlanError
from auxin.models.building import Builder, likeness
from auxin.models.configs import config_holding, config_value
from auxin.models.loading import REFUSALS
from auxin.models.scoped_config import config_at
from auxin.models.token_ids import is_token_id
from auxin.nn.resizing import size_of
from auxin.words.paths import encloses

SIZE = re.compile(r"(num|n|d)_\w+|\w+_(size|dim|rank|heads|layers|experts)")
"""What sizes are called."""
RUN_TIME = re.compile(r"chunk|window|token|beam|logits")
"""In the names of numbers that are read when the model runs."""


def refuse_idle_values(
    config: PreTrainedConfig,
    values: Mapping[str, Any],
    after: PreTrainedModel,
    build: Callable[[Mapping[str, Any]], PreTrainedModel],
) -> None:
    """Raise PlanError when one of `values` has no effect, as far as that can be judged; see the module.

    Args:
        config: before.
        values: the config's values that a plan sets.
        after: the skeleton that is built with them.
        build: builds it with other values in their places.
    """
    seen: dict[str, Any] | None = None
    olds = {name: config_value(config, name) for name in values}
    for name, value in values.items():
        holder, own_name = config_holding(config, name)
        old = olds[name]
        is_size = isinstance(value, int) and not isinstance(value, bool) and _is_size(own_name)
        together = any((olds[other], values[other]) == (old, value) for other in values if other != name)
        is_read = is_token_id(own_name) or _is_own(holder, own_name)  # by programs that go by a checkpoint, too
        if value == old or together or (is_read and not is_size):
            continue
        seen = likeness(after) if seen is None else seen
        others = [old, 2 * value] if is_size else [old]
        if all(_builds(build, {name: other}, seen) for other in others):
            raise PlanError(
                f"{name} = {value} has no effect: the model that is built is the same with {name} = {old}. Its modules "
                f"take no value from there, or each has its own. Leave it out, or set what they take."
            )


def _builds(build: Callable[[Mapping[str, Any]], PreTrainedModel], values: Mapping[str, Any], seen: Any) -> bool:
    """Whether `values` build the model that was `seen`."""
    try:
        return likeness(build(values)) == seen
    except (*REFUSALS, PlanError):
        return False  # a value that makes nonsense was read


def _is_size(name: str) -> bool:
    return SIZE.fullmatch(name) is not None and RUN_TIME.search(name) is None


def _is_own(config: PreTrainedConfig, name: str) -> bool:
    """Whether every config of this class has such a value."""
    try:
        return hasattr(type(config)(), name)
    except REFUSALS:
        return True


@dataclass
class _Told:
    index: int
    """Place in the plan of the edit that says it, from 0."""
    edit: ConfigureModule
    unchanged: bool
    """Whether all modules had this value already."""
    replaces: bool
    """Whether it takes the place of another value that an earlier plan said."""


class Configurations:
    """The `ConfigureModule` edits of one plan: the way back from them, and whether they have an effect."""

    def __init__(self, before: PreTrainedModel) -> None:
        self.before = before
        self.back: dict[int, list[ConfigureModule]] = {}
        """The edits that lead back from each, by its place in the plan."""
        self._told: dict[tuple[str, str], _Told] = {}
        self._idle: dict[str, list[str]] = {}

    def follow(self, index: int, edit: ConfigureModule, modules: Mapping[str, str | None], done: list[Any]) -> None:
        """Take an edit into account.

        Args:
            index: its place in the plan.
            edit: the edit.
            modules: the old path of every module that it means; None for one that is new.
            done: the structural edits before it.

        Raises:
            PlanError: an earlier edit of the plan says the same, or a value is unknown.
        """
        had = {path: self._values(old, edit) for path, old in modules.items() if old is not None}
        earlier = [e for e in done if isinstance(e, ConfigureModule) and encloses(edit.module, e.module)]
        for name, value in edit.values.items():
            if (edit.module, name) in self._told:
                raise PlanError(f"{name} of {edit.module} was set by an earlier edit; merge the two")
            unchanged = bool(had) and all(values[name] == value for values in had.values())
            replaces = any(e.values.get(name, value) != value for e in earlier)
            self._told[edit.module, name] = _Told(index, edit, unchanged, replaces)
        self.back[index] = _way_back(edit, had, [e for e in earlier if e.module != edit.module])

    def note(self, edit: Any, model: PreTrainedModel) -> None:
        """Find out what in a structural `edit` does nothing to `model`, to which it is about to be done."""
        if isinstance(edit, ConfigureModule):
            self._idle[edit.module] = edit.idle_values(model)

    def settled(self, structure: list[Any], said: Mapping[str, Any]) -> list[Any]:
        """The structural edits without values that have become those of the model around.

        Args:
            structure: the structural edits, of which all were noted.
            said: the config's values that the plan sets.

        Raises:
            PlanError: a value of the plan has no effect.
        """
        for (module, name), told in self._told.items():
            stays = told.unchanged and not told.replaces and name not in said
            if stays or (name in self._idle.get(module, ()) and not told.replaces):
                raise PlanError(
                    f"Edit {told.index + 1} ({module}: {told.edit}): {name} = {told.edit.values[name]} has no effect: "
                    "nothing in there is built differently. Leave it out, or set what its modules are built with."
                )
        result: list[Any] = []
        for edit in structure:
            names = self._idle.get(edit.module) if isinstance(edit, ConfigureModule) else None
            result += edit.without(names) if names else [edit]
        return result

    def in_words(self) -> list[str]:
        """What the plan says, a value each."""
        return [f"{name} = {told.edit.values[name]} in {module}" for (module, name), told in self._told.items()]

    def _values(self, path: str, edit: ConfigureModule) -> dict[str, Any]:
        """What the values of `edit` are in the module at `path` of the old model."""
        config = config_at(self.before, path)
        return {
            name: getattr(config, name) if hasattr(config, name) else Builder(self.before, path).value(name)
            for name in edit.values
        }


class LayerSizes:
    """The `ResizeModule` edits of one plan: the way back from them, and whether they have an effect."""

    def __init__(self, before: PreTrainedModel) -> None:
        self.before = before
        self.back: dict[int, list[ResizeModule]] = {}
        """The edits that lead back from each, by its place in the plan."""
        self._told: dict[str, int] = {}
        self._idle: set[str] = set()

    def follow(self, index: int, edit: ResizeModule, modules: Mapping[str, str | None]) -> None:
        """Take an edit into account.

        Args:
            index: its place in the plan.
            edit: the edit.
            modules: the old path of every module that it means; None for one that is new.

        Raises:
            PlanError: a module can't be given the size, has it already, or gets one by an earlier edit of the plan.
        """
        had, changed = dict[str, tuple[int, int | None]](), False
        for path, old_path in modules.items():
            if path in self._told:
                raise PlanError(f"{path} was given a size by edit {self._told[path] + 1}; merge the two")
            if old_path is None:
                raise PlanError(f"{path} was put there by an earlier edit of the plan; give it its size there")
            self._told[path] = index
            old = self.before.get_submodule(old_path)
            try:
                after, had[path] = edit.size(old), size_of(old)
            except PlanError as error:
                raise PlanError(f"{path} {error}") from error
            changed |= after != had[path]
        if not changed:
            raise PlanError("it has that size already, so that there is no effect. Leave it out")
        self.back[index] = [
            ResizeModule(module=path, outputs=outputs, inputs=inputs) for path, (outputs, inputs) in had.items()
        ]

    def note(self, edit: Any, model: PreTrainedModel) -> None:
        """Find out whether a structural `edit` does something to `model`, to which it is about to be done."""
        if isinstance(edit, ResizeModule) and not edit.changes(model):
            self._idle.add(edit.module)

    def settled(self, structure: list[Any]) -> list[Any]:
        """The structural edits, of which all were noted, without sizes that are those of the architecture again."""
        return [edit for edit in structure if not (isinstance(edit, ResizeModule) and edit.module in self._idle)]


def _way_back(
    edit: ConfigureModule, had: Mapping[str, dict[str, Any]], inner: list[ConfigureModule]
) -> list[ConfigureModule]:
    """The edits that lead back from `edit`.

    Args:
        edit: the edit.
        had: what its values were, by the paths of the modules that it means.
        inner: earlier edits of modules among or in those, over which it wins.
    """
    outer = [values for path, values in had.items() if not any(encloses(e.module, path) for e in inner)]
    told = [e.model_copy(update={"values": {n: v for n, v in e.values.items() if n in edit.values}}) for e in inner]
    told = [e for e in told if e.values]
    if outer and all(values == outer[0] for values in outer):
        return [ConfigureModule(module=edit.module, values=outer[0]), *told]
    changed = {path: {n: v for n, v in values.items() if v != edit.values[n]} for path, values in had.items()}
    return [ConfigureModule(module=path, values=values) for path, values in changed.items() if values]
