"""Following a plan on shapes: where every parameter of the new model comes from. All checks happen here."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.effects import Configurations, refuse_idle_values
from auxin.edits.kinds.edit import SetConfig, describe_edit
from auxin.edits.kinds.fills import CopyFill, Fill
from auxin.edits.kinds.layer_edits import ArrangeLayers, JoinAbove, layer_stack
from auxin.edits.kinds.module_edits import (
    ConfigureModule,
    ModuleEdit,
    RemoveModule,
    ReplaceModule,
    TieParameters,
    WrapModule,
    merged,
)
from auxin.edits.kinds.parameter_edits import ParameterEdit
from auxin.edits.kinds.rate import Rate
from auxin.edits.structure import (
    edited_config,
    edited_skeleton,
    refuse_quantized,
    structural_edits,
    with_structural_edits,
)
from auxin.errors import PlanError


@dataclass(frozen=True)
class Step:
    """One edit of one parameter."""

    index: int
    """Place of the edit in the plan, from 0."""
    edit: ParameterEdit
    name: str
    """What the parameter was called at that moment."""
    old_shape: tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a parameter (or a buffer) of the new model comes from."""

    shape: tuple[int, ...]
    """Its shape after all edits."""
    sources: tuple[tuple[float, str], ...]
    """Weights and names (the first of each tensor's names) of the old parameters that it is the sum of; a fresh one has
    none."""
    steps: tuple[Step, ...] = ()
    """What is then done to the sum, in order."""
    joined: int | None = None
    """The axis along which the sources are joined instead of added up."""
    fill: Fill | None = None
    """Where a fresh one gets its values; None: as the architecture initialises it."""
    fresh_moments: bool = False
    """Whether its optimizer state starts anew although it has a source."""

    @property
    def source(self) -> str | None:
        """The one old parameter that it is, changed or not; None when it is fresh or a blend of several."""
        return self.sources[0][1] if len(self.sources) == 1 and self.sources[0][0] == 1.0 else None

    @property
    def old_shape(self) -> tuple[int, ...]:
        """The shape before the first step; of joined sources that of one of them."""
        shape = self.steps[0].old_shape if self.steps else self.shape
        if self.joined is None:
            return shape
        return tuple(size // 2 if axis == self.joined else size for axis, size in enumerate(shape))

    @property
    def rate(self) -> Rate:
        """How AdamW must go on with it."""
        if self.source is None or self.fresh_moments:
            return Rate(exact=False)
        rate = Rate()
        for step in self.steps:
            rate = rate.then(step.edit.rate(step.old_shape))
        return rate


@dataclass
class ResolvedPlan:
    """A plan that was found to fit a model."""

    before: PreTrainedModel
    """Skeleton of the model before."""
    after: PreTrainedModel
    """Skeleton of the edited model; has the shapes that all parameters will have."""
    origins: dict[str, Origin]
    """Where every parameter and persistent buffer of `after` comes from, by the first of its names."""
    modules: dict[str, str | None]
    """The old path of every module of `after`; None for those that are new."""
    configured: dict[int, list[ConfigureModule]] = field(default_factory=dict)
    """The edits that lead back from those that configure modules, by their places in the plan."""


def resolve(edits: Sequence[Any], model: PreTrainedModel) -> ResolvedPlan:
    """Check that the `edits` of a plan, in order, fit `model` and find what they change.

    Weights are not looked at; the meta device serves.

    Raises:
        PlanError: a path that does not exist, a shape that does not fit, edits that collide, or a config that asks for
            other shapes than the edits give; the message names the edit.
    """
    refuse_quantized(model.config)
    before = edited_skeleton(model.config, type(model))
    _check_unchanged(model, before)
    tracker = _Tracker(before)
    for index, edit in enumerate(edits):
        try:
            tracker.follow(index, edit)
        except PlanError as error:
            raise PlanError(f"Edit {index + 1} ({describe_edit(edit)}): {str(error).rstrip('.')}.") from error
    return tracker.finish(edits)


def planned_config(edits: Sequence[Any], config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that `edits` make of a model of `config`, which stays as it is.

    Raises:
        PlanError: they don't fit.
    """
    return resolve(edits, edited_skeleton(config)).after.config


def tensor_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter and persistent buffer, by the first one; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                names.setdefault(id(buffer), []).append(f"{path}.{key}" if path else key)
    return {aliases[0]: aliases for aliases in names.values()}


def collapse(name: str) -> str:
    """`name` with its layer numbers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and persistent buffers by the first of their names."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tuple(tensors[name].shape) for name in tensor_names(model)}


class _Tracker:
    """Follows names, shapes and modules through the edits, one after the other."""

    def __init__(self, before: PreTrainedModel) -> None:
        self.before = before
        names, shapes = tensor_names(before), shapes_of(before)
        # Tied names hold one object, so that an edit of one of them is an edit of all.
        self.aliases = {alias: name for name, aliases in names.items() for alias in aliases}
        self.origins = {name: Origin(shapes[name], ((1.0, name),)) for name in names}
        self.modules: dict[str, str | None] = {
            path: path for path, _ in before.named_modules(remove_duplicate=False) if path
        }
        self.fresh: dict[str, Fill] = {}
        self.structure = structural_edits(before.config)
        self.configurations = Configurations(before)
        self.values: dict[str, Any] = {}
        self.said: set[str] = set()
        self.arranged: set[str] = set()
        self.fresh_layers: list[str] = []
        self.replaced: list[str] = []
        self.copies: list[str] = []

    def follow(self, index: int, edit: Any) -> None:
        """Take one edit into account; PlanError when it does not fit what there is by now."""
        if isinstance(edit, SetConfig):
            if twice := [key for key in edit.values if key in self.said]:
                raise PlanError(f"{twice[0]} was set by an earlier edit; merge the two")
            self.said |= set(edit.values)
            self._set_values(edit.values)
        elif isinstance(edit, ParameterEdit):
            self._change_parameters(index, edit)
        elif isinstance(edit, ArrangeLayers):
            self._arrange(edit)
        elif isinstance(edit, JoinAbove):
            self._join(edit)
        elif isinstance(edit, TieParameters):
            self._tie(edit)
            self.structure = merged([*self.structure, edit])
        else:
            self._change_modules(edit)
            if isinstance(edit, ConfigureModule):
                meant = {path: self.modules[path] for path in edit.paths(self.modules)}
                self.configurations.follow(index, edit, meant, self.structure)
            # Fills tell where values come from, and checkpoints hold values.
            kept = edit.model_copy(update={"fills": {}}) if isinstance(edit, WrapModule | ReplaceModule) else edit
            self.structure = merged([*self.structure, kept])

    def _set_values(self, values: dict[str, Any]) -> None:
        if twice := [key for key in values if key in self.values and self.values[key] != values[key]]:
            raise PlanError(f"{twice[0]} = {self.values[twice[0]]} was asked for by an earlier edit; make them agree")
        edited_config(self.before.config, values)
        self.values |= values

    def _change_parameters(self, index: int, edit: ParameterEdit) -> None:
        matching = dict.fromkeys(name for alias, name in self.aliases.items() if edit.matches(alias))
        if not matching:
            raise PlanError(_nearest("parameter", edit.parameter, self.aliases))
        for name in matching:
            origin = self.origins[name]
            for step in origin.steps:
                if edit.collides_with(step.edit):
                    raise PlanError(f"collides with edit {step.index + 1}: both change {name}. Keep one of them")
            if not origin.sources:
                raise PlanError(f"{name} is made by an earlier edit of the plan; give its values there")
            try:
                shape = edit.new_shape(origin.shape)
            except PlanError as error:
                raise PlanError(f"does not fit {name}: {error}") from error
            step = Step(index, edit, name, origin.shape)
            self.origins[name] = replace(origin, shape=shape, steps=(*origin.steps, step))

    def _arrange(self, edit: ArrangeLayers) -> None:
        if edit.layers in self.arranged:
            raise PlanError(f"{edit.layers} was arranged by an earlier edit; merge the two")
        stack = layer_stack(self.before, edit.layers)
        edit.check(len(stack))
        self.arranged.add(edit.layers)
        self._set_values(edit.config_values(self.before))
        self.structure = [moved for stored in self.structure for moved in _moved(stored, edit)]
        blended = self._blended(edit, len(stack))
        self.origins, self.aliases = self._renamed_tensors(edit)
        for name, origin in blended.items():
            self.origins[name] = origin
        self.modules = {new: old for path, old in self.modules.items() for new in edit.renamed(path)}
        self.fresh = {new: fill for name, fill in self.fresh.items() for new in edit.renamed(name)}
        # T5's first layer alone holds the relative positions of all: copies of a layer may have fewer parts.
        self.copies += [f"{edit.layers}.{i}" for i, source in enumerate(edit.order) if source in edit.order[:i]]
        self.fresh_layers += [f"{edit.layers}.{place}" for place, source in enumerate(edit.order) if source is None]
        # New to the tree, so that later edits of modules (a wrapper around a new layer) find them.
        self.modules |= {path: None for path in self.fresh_layers if path not in self.modules}

    def _join(self, edit: JoinAbove) -> None:
        if edit.layers in self.arranged:
            raise PlanError(f"{edit.layers} was arranged by an earlier edit; join its layers before")
        names = [
            f"{edit.layers}.{layer}.{edit.parameter}" for layer in range(len(layer_stack(self.before, edit.layers)))
        ]
        # T5's first layer alone holds the relative positions of all.
        names = [name for name in names if name in self.origins]
        if not names:
            raise PlanError(_nearest("parameter", f"{edit.layers}.0.{edit.parameter}", self.aliases))
        old = [self.origins[name] for name in names]
        for name, own, above in zip(names, old, [*old[1:], old[-1]], strict=True):
            if own.steps or len(own.sources) != 1 or edit.axis >= len(own.shape) or own.shape != above.shape:
                raise PlanError(f"{name} was changed by an earlier edit, or its shape {list(own.shape)} does not fit")
            shape = list(own.shape)
            shape[edit.axis] *= 2
            sources = (own.sources[0], above.sources[0])
            self.origins[name] = Origin(tuple(shape), sources, joined=edit.axis)

    def _renamed_tensors(self, edit: ArrangeLayers) -> tuple[dict[str, Origin], dict[str, str]]:
        origins: dict[str, Origin] = {}
        aliases: dict[str, str] = {}
        anew = {f"{edit.layers}.{place}" for place in edit.fresh_moments}
        for name, origin in self.origins.items():
            for new in edit.renamed(name):
                origins[new] = replace(origin, fresh_moments=True) if edit.layer_of(new) in anew else origin
        for alias, name in self.aliases.items():
            for new in edit.renamed(alias):
                targets = edit.renamed(name)
                if not targets:
                    raise PlanError(f"{alias} is tied to {name}, which lies in a layer that goes; keep that layer")
                # In a copied layer the names of one tensor stay the names of one tensor.
                together = [target for target in targets if edit.layer_of(target) == edit.layer_of(new)]
                aliases[new] = (together or targets)[0]
        return origins, aliases

    def _blended(self, edit: ArrangeLayers, length: int) -> dict[str, Origin]:
        result: dict[str, Origin] = {}
        for suffix, rows in (edit.blend or {}).items():
            names = [self.aliases.get(f"{edit.layers}.{layer}.{suffix}") for layer in range(length)]
            if None in names:
                raise PlanError(f"blend: {_nearest('parameter', f'{edit.layers}.0.{suffix}', self.aliases)}")
            old = [self.origins[str(name)] for name in names]
            if changed := [name for name, origin in zip(names, old, strict=True) if origin.steps]:
                raise PlanError(f"blend: {changed[0]} was changed by an earlier edit; arrange the layers first")
            for place, row in enumerate(rows):
                sources = tuple((weight, str(name)) for weight, name in zip(row, names, strict=True) if weight)
                result[f"{edit.layers}.{place}.{suffix}"] = Origin(old[0].shape, sources)
        return result

    def _change_modules(self, edit: ModuleEdit) -> None:
        paths = edit.paths(self.modules)
        if not paths:
            raise PlanError(_nearest("module", edit.module, self.modules))
        for path in paths:
            if isinstance(edit, WrapModule):
                self._rename_below(path, lambda rest, path=path: f"{path}.inner{rest}")
                self.modules[path] = None
            elif isinstance(edit, RemoveModule) and edit.leaves == "inner":
                self._unwrap(path)
            elif isinstance(edit, RemoveModule):
                self._rename_below(path, lambda rest: None)
                self.modules[path] = None
            elif isinstance(edit, ReplaceModule):
                self.replaced.append(path)
            fills = edit.fills if isinstance(edit, WrapModule | ReplaceModule) else {}
            for name, fill in fills.items():
                if isinstance(fill, CopyFill):
                    fill = fill.model_copy(update={"of": f"{path}.{fill.of}"})
                self.fresh[f"{path}.{name}"] = fill

    def _unwrap(self, path: str) -> None:
        if f"{path}.inner" not in self.modules:
            raise PlanError(f"{path} is no wrapper; nothing can be unwrapped there")
        keep = f"{path}.inner"
        self._rename_below(
            path, lambda rest: f"{path}{rest.removeprefix('.inner')}" if f"{path}{rest}".startswith(keep) else None
        )

    def _rename_below(self, path: str, new_name: Any) -> None:
        """Give everything at and below `path` the name that `new_name` makes of the rest; None drops it."""

        def moved(name: str) -> str | None:
            if name != path and not name.startswith(f"{path}."):
                return name
            result: str | None = new_name(name[len(path) :])
            return result

        self.modules = {new: old for name, old in self.modules.items() if (new := moved(name)) is not None}
        aliases = {new: moved(name) for alias, name in self.aliases.items() if (new := moved(alias)) is not None}
        # A tied tensor whose first name goes lives on under another one.
        lost: dict[str, str] = {}
        for alias, name in aliases.items():
            if name is None:
                old_name = next(self.aliases[a] for a in self.aliases if moved(a) == alias)
                aliases[alias] = lost.setdefault(old_name, alias)
        self.origins = {
            new: origin for name, origin in self.origins.items() if (new := moved(name) or lost.get(name)) is not None
        }
        self.aliases = {alias: name for alias, name in aliases.items() if name is not None}

    def _tie(self, edit: TieParameters) -> None:
        for name in (edit.parameter, edit.to):
            if name not in self.aliases:
                raise PlanError(_nearest("parameter", name, self.aliases))
        gone, kept = self.aliases[edit.parameter], self.aliases[edit.to]
        if gone == kept:
            raise PlanError(f"{edit.parameter} and {edit.to} are tied already")
        if self.origins[gone].shape != self.origins[kept].shape:
            raise PlanError(
                f"shapes {list(self.origins[gone].shape)} and {list(self.origins[kept].shape)} can't be one tensor"
            )
        if gone != edit.parameter:
            raise PlanError(f"{edit.parameter} is tied to {gone}; name that one")
        self.aliases = {alias: kept if name == gone else name for alias, name in self.aliases.items()}
        del self.origins[gone]

    def finish(self, edits: Sequence[Any]) -> ResolvedPlan:
        """Build the new skeleton and find the origin of everything in it."""
        after = self._built()
        said = {name: self.values[name] for name in self.said}
        refuse_idle_values(self.before.config, said, after, lambda values: self._built({**self.values, **values}))
        structure = self.configurations.settled(self.structure, said)
        if structure != self.structure:
            self.structure = structure
            after = self._built()
        origins = self._origins(edits, after)
        modules: dict[str, str | None] = {"": ""}
        for path, _ in after.named_modules(remove_duplicate=False):
            modules[path] = "" if not path else self.modules.get(path)
        resolved = ResolvedPlan(self.before, after, origins, modules, self.configurations.back)
        self._check_modules(resolved)
        return resolved

    def _built(self, values: dict[str, Any] | None = None) -> PreTrainedModel:
        """The new skeleton; or one with other config values, which the edits of modules are not judged by."""
        config = edited_config(self.before.config, self.values if values is None else values)
        with_structural_edits(config, self.structure)
        try:
            return edited_skeleton(config, type(self.before), self.configurations.note if values is None else None)
        except PlanError:
            raise
        except (ValueError, TypeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            raise PlanError(f"No model can be built with the plan's config values ({self.values}): {error}") from error

    def _origins(self, edits: Sequence[Any], after: PreTrainedModel) -> dict[str, Origin]:
        names, shapes = tensor_names(after), shapes_of(after)
        origins: dict[str, Origin] = {}
        for name, aliases in names.items():
            known = next((self.aliases[alias] for alias in aliases if alias in self.aliases), None)
            if known is not None:
                origin = self.origins[known]
                self._check_shape(edits, name, origin, shapes[name])
            elif any(alias in self.fresh for alias in aliases):
                fill = next(self.fresh[a] for a in aliases if a in self.fresh)
                origin = Origin(shapes[name], (), fill=fill)
                if isinstance(fill, CopyFill):
                    if fill.of not in self.aliases:
                        raise PlanError(f"copy: {_nearest('parameter', fill.of, self.aliases)}.")
                    origin = self.origins[self.aliases[fill.of]]
                    self._check_shape(edits, name, origin, shapes[name])
            elif _below(name, self.fresh_layers) or self._is_brick_buffer(after, name):
                origin = Origin(shapes[name], ())
            else:
                raise PlanError(
                    f"With the plan's edits the model has a parameter {name} that it had not before and for which no "
                    f"edit provides values ({self._set_in_words()}). Leave out the edit that asks for it, or give it a "
                    "fill."
                )
            origins[name] = origin
        left = [name for name in self.aliases if not self._kept(name, after)]
        left = [name for name in left if not _below(name, [*self.replaced, *self.copies])]
        if left:
            raise PlanError(
                f"With the plan's edits the model has no parameter {left[0]} any more, and no edit removes it "
                f"({self._set_in_words()}). Leave out the value that drops it."
            )
        return origins

    def _set_in_words(self) -> str:
        told = [f"{key} = {value}" for key, value in self.values.items()] + self.configurations.in_words()
        return ", ".join(told) or "no config value is set"

    @staticmethod
    def _kept(name: str, after: PreTrainedModel) -> bool:
        owner, _, key = name.rpartition(".")
        try:
            module = after.get_submodule(owner)
        except AttributeError:
            return False
        return module._parameters.get(key) is not None or module._buffers.get(key) is not None

    @staticmethod
    def _is_brick_buffer(after: PreTrainedModel, name: str) -> bool:
        module = after.get_submodule(name.rpartition(".")[0])
        return name.rpartition(".")[2] in module._buffers and hasattr(module, "reset_buffers")

    def _check_shape(self, edits: Sequence[Any], name: str, origin: Origin, expected: tuple[int, ...]) -> None:
        if origin.shape == expected:
            return
        blamed = "No edit"
        if origin.steps:
            last = origin.steps[-1]
            blamed = f"Edit {last.index + 1} ({describe_edit(edits[last.index])})"
        raise PlanError(
            f"{blamed}: {name} has shape {list(origin.shape)} after the plan's edits, but the plan's config asks for "
            f"{list(expected)}. Make sizes and config values agree."
        )

    def _check_modules(self, resolved: ResolvedPlan) -> None:
        """Modules stay what they are unless an edit says otherwise: a config value can't turn one into another."""
        before = dict(resolved.before.named_modules(remove_duplicate=False))
        for path, module in resolved.after.named_modules(remove_duplicate=False):
            old_path = resolved.modules.get(path)
            if _below(f"{path}.", [*self.replaced, *self.fresh_layers]):  # those modules themselves, too
                continue
            old = before[old_path] if old_path is not None else None
            if old is None and self._in_brick(path):
                continue
            if type(old) is not type(module):
                was = type(old).__name__ if old is not None else "nothing"
                raise PlanError(
                    f"With the plan's config values ({self._set_in_words()}) the module {path} would be "
                    f"{type(module).__name__} instead of {was}, which is another function and which no edit provides. "
                    "Leave out the config value that changes it."
                )
        gone = set(filter(None, self.modules)) - set(resolved.modules)
        if gone := {path for path in gone if not _below(path, [*self.replaced, *self.copies])}:
            path = min(gone)
            raise PlanError(
                f"With the plan's config values ({self._set_in_words()}) the module {path} would be nothing instead of "
                f"{type(before.get(self.modules[path] or '')).__name__}, which is another function and which no "
                "edit provides. Leave out the config value that changes it."
            )

    def _in_brick(self, path: str) -> bool:
        """Whether `path` is a brick that a structural edit put there, or lies in one."""
        edits = [e for e in self.structure if isinstance(e, ModuleEdit) and not isinstance(e, ConfigureModule)]
        parts = path.split(".")
        above = [".".join(parts[: length + 1]) for length in range(len(parts))]
        return any(edit.matches(place) for edit in edits for place in above)


def _check_unchanged(model: PreTrainedModel, before: PreTrainedModel) -> None:
    """The model must be what its config builds: what was changed behind the config's back would be lost."""
    have = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    told = {name for name, _ in before.named_parameters(remove_duplicate=False)}
    if have != told:
        odd = sorted(have ^ told)[0]
        side = "has" if odd in have else "lacks"
        raise PlanError(
            f"The model {side} a parameter {odd} that its config does not tell of; it was changed by other means (an "
            "adapter?). Merge or unload that first, then edit."
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in before.named_parameters()}
    for name, parameter in model.named_parameters():
        if tuple(parameter.shape) != shapes[name]:
            raise PlanError(
                f"{name} has shape {list(parameter.shape)}, but the model's config says {list(shapes[name])}. Make "
                "the config say what the model is."
            )


def _moved(stored: Any, edit: ArrangeLayers) -> list[Any]:
    """A structural edit from before the arrangement, as it must read after it."""
    if isinstance(stored, TieParameters):
        names = edit.renamed(stored.parameter), edit.renamed(stored.to)
        if any(len(found) != 1 for found in names):
            raise PlanError(f"{stored.parameter} and {stored.to} are tied and can't be copied or dropped alone")
        return [stored.model_copy(update={"parameter": names[0][0], "to": names[1][0]})]
    if isinstance(stored, ConfigureModule) and stored.module.startswith(f"{edit.layers}.*"):
        return [stored]  # which holds for fresh layers, too
    return [stored.model_copy(update={"module": path}) for path in edit.renamed_pattern(stored.module)]


def _below(name: str, paths: Iterable[str]) -> bool:
    """Whether `name` lies below one of `paths`."""
    return any(name.startswith(f"{path}.") for path in paths)


def _nearest(what: str, name: str, known: Iterable[str]) -> str:
    every = set(known)
    candidates = sorted({collapse(path) for path in every} if "*" in name else every)
    near = get_close_matches(name, candidates, n=1, cutoff=0.0)
    return f"no {what} has this path. The nearest is {near[0] if near else '(none)'}"
