"""Following names, shapes and modules of a model through the edits of a plan, one after the other."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.effects import Configurations, LayerSizes
from auxin.edits.kinds.architecture_edits import ChangeArchitecture, SetConfig
from auxin.edits.kinds.fills import CopyFill, Fill
from auxin.edits.kinds.layer_edits import ArrangeLayers, JoinAbove, layer_stack
from auxin.edits.kinds.module_edits import (
    BRICK_EDITS,
    ConfigureModule,
    MakeParameters,
    MergeModule,
    ModuleEdit,
    RemoveModule,
    ReplaceModule,
    ResizeModule,
    TieParameters,
    WrapModule,
    shortest,
    without_bricks,
)
from auxin.edits.kinds.parameter_edits import ParameterEdit
from auxin.edits.origin import Blend, Group, Joined, Kept, Made, Origin, Step
from auxin.edits.structure import (
    edited_config,
    other_architecture,
    structural_edits,
)
from auxin.edits.tensor_names import nearest_name, shapes_of, tensor_names
from auxin.errors import PlanError
from auxin.models.configs import MOST_LAYERS, config_value
from auxin.models.layout import LENGTH_FIELDS
from auxin.models.places import what_is_returned
from auxin.nn.bricks import MAKINGS, Making, find_brick


class Tracker:
    """Follows names, shapes and modules through the edits, one after the other."""

    def __init__(self, before: PreTrainedModel) -> None:
        self.before = before
        names, shapes = tensor_names(before), shapes_of(before)
        # Tied names hold one object, so that an edit of one of them is an edit of all.
        self.aliases = {alias: name for name, aliases in names.items() for alias in aliases}
        self.origins = {name: Origin(shapes[name], Kept(name)) for name in names}
        self.modules: dict[str, str | None] = {
            path: path for path, _ in before.named_modules(remove_duplicate=False) if path
        }
        self.fresh: dict[str, Fill] = {}
        self.structure = structural_edits(before.config)
        self.configurations = Configurations(before)
        self.sizes = LayerSizes(before)
        self.values: dict[str, Any] = {}
        self.architecture: tuple[PreTrainedConfig, type[PreTrainedModel]] = (before.config, type(before))
        self.said: set[str] = set()
        self.arranged: set[str] = set()
        self.fresh_layers: list[str] = []
        self.replaced: list[str] = []
        self.copies: list[str] = []
        self.used_up: dict[str, int] = {}
        self.shared_by_merged: dict[str, str] = {}
        """Modules that shared tensors with a brick that was merged: that one's path by theirs."""

    def follow(self, index: int, edit: Any) -> None:
        """Take one edit into account; PlanError when it does not fit what there is by now."""
        if isinstance(edit, SetConfig):
            if twice := [key for key in edit.values if key in self.said]:
                raise PlanError(f"{twice[0]} was set by an earlier edit; merge the two")
            self.said |= set(edit.values)
            self._set_values(edit.values)
        elif isinstance(edit, ChangeArchitecture):
            self._change_architecture(edit)
        elif isinstance(edit, ParameterEdit):
            self._change_parameters(index, edit)
        elif isinstance(edit, ArrangeLayers):
            self._arrange(index, edit)
        elif isinstance(edit, JoinAbove):
            self._join(edit)
        elif isinstance(edit, TieParameters):
            self._tie(edit)
            self.structure = shortest([*self.structure, edit])
        else:
            if isinstance(edit, RemoveModule) and edit.leaves != "inner" and edit.returns is None:
                edit = edit.model_copy(update={"returns": self._returned(edit.paths(self.modules))})
            self._change_modules(index, edit)
            if isinstance(edit, ConfigureModule | ResizeModule):
                meant = {path: self.modules[path] for path in edit.paths(self.modules)}
                if isinstance(edit, ConfigureModule):
                    self.configurations.follow(index, edit, meant, self.structure)
                else:
                    self.sizes.follow(index, edit, meant)
            # Fills tell where values come from, and checkpoints hold values.
            if isinstance(edit, WrapModule | ReplaceModule):
                edit = edit.model_copy(update={"fills": {}})
            if not isinstance(edit, MergeModule | MakeParameters):
                self.structure = shortest([*self.structure, edit])

    def _set_values(self, values: dict[str, Any]) -> None:
        if twice := [key for key in values if key in self.values and self.values[key] != values[key]]:
            raise PlanError(f"{twice[0]} = {self.values[twice[0]]} was asked for by an earlier edit; make them agree")
        _refuse_too_deep(self.architecture[0], values)
        edited_config(self.architecture[0], values)
        self.values |= values

    def _change_architecture(self, edit: ChangeArchitecture) -> None:
        if self.changes_architecture():
            raise PlanError(f"an earlier edit makes a {self.architecture[0].model_type} of it; keep one of them")
        self.architecture = other_architecture(self.before, edit.model_type, edit.values)
        edited_config(self.architecture[0], self.values)

    def changes_architecture(self) -> bool:
        return self.architecture[1] is not type(self.before)

    def _change_parameters(self, index: int, edit: ParameterEdit) -> None:
        matching = dict.fromkeys(name for alias, name in self.aliases.items() if edit.matches(alias))
        if not matching:
            raise PlanError(nearest_name("parameter", edit.parameter, self.aliases))
        for name in matching:
            origin = self.origins[name]
            for step in origin.steps:
                if edit.collides_with(step.edit):
                    raise PlanError(f"collides with edit {step.index + 1}: both change {name}. Keep one of them")
            if origin.is_fresh:
                raise PlanError(f"{name} is made by an earlier edit of the plan; give its values there")
            try:
                shape = edit.new_shape(origin.shape)
            except PlanError as error:
                raise PlanError(f"does not fit {name}: {error}") from error
            step = Step(index, edit, name, origin.shape)
            self.origins[name] = replace(origin, shape=shape, steps=(*origin.steps, step))

    def _arrange(self, index: int, edit: ArrangeLayers) -> None:
        if edit.layers in self.arranged:
            raise PlanError(f"{edit.layers} was arranged by an earlier edit; merge the two")
        stack = layer_stack(self.before, edit.layers)
        edit.check(len(stack))
        self.arranged.add(edit.layers)
        self._set_values(edit.config_values(self.before))
        for moved_entries in edit.slices(self.before):
            self._change_parameters(index, moved_entries)
        self.structure = [moved for stored in self.structure for moved in _moved(stored, edit)]
        blended = self._blended(edit, len(stack))
        self.origins, self.aliases = self._renamed_tensors(edit)
        for name, origin in blended.items():
            self.origins[name] = origin
        self.modules = {new: old for path, old in self.modules.items() for new in edit.renamed(path)}
        self.fresh = {new: fill for name, fill in self.fresh.items() for new in edit.renamed(name)}
        self.replaced = [new for path in self.replaced for new in edit.renamed(path)]
        self.used_up = {new: index for name, index in self.used_up.items() for new in edit.renamed(name)}
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
            raise PlanError(nearest_name("parameter", f"{edit.layers}.0.{edit.parameter}", self.aliases))
        old = [self.origins[name] for name in names]
        for name, own, above in zip(names, old, [*old[1:], old[-1]], strict=True):
            kept = (own.kept, above.kept)
            if own.steps or None in kept or edit.axis >= len(own.shape) or own.shape != above.shape:
                raise PlanError(f"{name} was changed by an earlier edit, or its shape {list(own.shape)} does not fit")
            shape = list(own.shape)
            shape[edit.axis] *= 2
            self.origins[name] = Origin(tuple(shape), Joined((str(own.kept), str(above.kept)), edit.axis))

    def _renamed_tensors(self, edit: ArrangeLayers) -> tuple[dict[str, Origin], dict[str, str]]:
        origins: dict[str, Origin] = {}
        aliases: dict[str, str] = {}
        anew = {f"{edit.layers}.{place}" for place in edit.fresh_moments}
        for name, origin in self.origins.items():
            for new in edit.renamed(name):
                origins[new] = replace(origin, fresh_moments=True) if edit.layer_of(new) in anew else origin
        for alias, name in self.aliases.items():
            targets = edit.renamed(name)
            by_layer = {edit.layer_of(target): target for target in targets}
            for new in edit.renamed(alias):
                if not targets:
                    raise PlanError(f"{alias} is tied to {name}, which lies in a layer that goes; keep that layer")
                # In a copied layer the names of one tensor stay the names of one tensor.
                aliases[new] = by_layer.get(edit.layer_of(new), targets[0])
        return origins, aliases

    def _blended(self, edit: ArrangeLayers, length: int) -> dict[str, Origin]:
        result: dict[str, Origin] = {}
        for suffix, rows in (edit.blend or {}).items():
            names = [self.aliases.get(f"{edit.layers}.{layer}.{suffix}") for layer in range(length)]
            if None in names:
                raise PlanError(f"blend: {nearest_name('parameter', f'{edit.layers}.0.{suffix}', self.aliases)}")
            old = [self.origins[str(name)] for name in names]
            if changed := [n for n, origin in zip(names, old, strict=True) if origin.steps or origin.kept is None]:
                raise PlanError(f"blend: {changed[0]} was changed or made by an earlier edit; arrange the layers first")
            for place, row in enumerate(rows):
                terms = tuple((weight, str(o.kept)) for weight, o in zip(row, old, strict=True) if weight)
                one = len(terms) == 1 and terms[0][0] == 1.0
                source = Kept(terms[0][1]) if one else Blend(terms)
                result[f"{edit.layers}.{place}.{suffix}"] = Origin(old[0].shape, source)
        return result

    def _change_modules(self, index: int, edit: ModuleEdit) -> None:
        paths = edit.paths(self.modules)
        if not paths:
            raise PlanError(nearest_name("module", edit.module, self.modules))
        for path in paths:
            if isinstance(edit, WrapModule):
                self._rename_below(path, lambda rest, path=path: f"{path}.inner{rest}")
                self.modules[path] = None
            elif isinstance(edit, RemoveModule) and edit.leaves == "inner":
                self._unwrap(path)
            elif isinstance(edit, RemoveModule):
                self._rename_below(path, lambda rest: None)
                self.modules[path] = None
            elif isinstance(edit, MergeModule):
                self._merge(index, path)
            elif isinstance(edit, MakeParameters):
                self._make(index, MAKINGS.find(edit.making), path, edit.settings)
                self.replaced.append(path)
            elif isinstance(edit, ReplaceModule):
                self.replaced.append(path)
                self._make_brick(index, edit, path)
            fills = edit.fills if isinstance(edit, WrapModule | ReplaceModule) else {}
            for name, fill in fills.items():
                if isinstance(fill, CopyFill):
                    fill = fill.model_copy(update={"of": f"{path}.{fill.of}"})
                self.fresh[f"{path}.{name}"] = fill

    def _returned(self, paths: list[str]) -> list[str]:
        """What a stand-in must return at all of `paths`."""
        old = {path: self.modules[path] for path in paths}
        if new := [path for path, name in old.items() if name is None]:
            raise PlanError(f"{new[0]} was put there by an earlier edit of the plan; leave that one out instead")
        if not old:
            return []  # that nothing is meant is said where modules are changed
        found = what_is_returned(self.before, [str(name) for name in old.values()])
        kinds = {tuple(returns) for returns in found.values()}
        if len(kinds) > 1:
            raise PlanError(f"{', '.join(paths[:2])}, ... return different things; remove them by edits of their own")
        return list(kinds.pop())

    def _make_brick(self, index: int, edit: ReplaceModule, path: str) -> None:
        """Let the brick's tensors come from those of the module that it replaces, where the brick says how."""
        making = find_brick(edit.brick).making
        if making is None:
            return
        made = self._make(index, making, path, edit.settings)
        if filled := sorted(made & edit.fills.keys()):
            raise PlanError(f"{filled[0]} is made by the brick {edit.brick}; leave its fill out")

    def _make(self, index: int, making: Making, path: str, settings: dict[str, Any]) -> set[str]:
        """Let tensors of the module at `path`, whose names are returned, be made of those that are there."""
        inputs = self._below(path)
        old = {key: origin.shape for key, origin in inputs.items()}
        try:
            shapes = making.shapes(old, **settings)
            kept = set(making.keeps(old, **settings)) if shapes else old.keys()
        except (TypeError, KeyError) as error:
            raise PlanError(f"{path} can't be made with the settings {settings}: {error}") from error
        self._put_made(Group(path, making, False, settings, inputs), shapes)
        self.used_up |= {f"{path}.{key}": index for key in inputs.keys() - shapes.keys() - kept}
        return set(shapes)

    def _merge(self, index: int, path: str) -> None:
        """Let the tensors of the module that a brick replaced come from the brick's."""
        stored = next((e for e in reversed(self.structure) if e.kind in BRICK_EDITS and e.matches(path)), None)
        if stored is None:
            raise PlanError(f"{path} is no brick that was put there by an edit; there is nothing to merge")
        making = find_brick(stored.brick).making
        inputs = self._below(path)
        meta = {key: torch.empty(origin.shape, device="meta") for key, origin in inputs.items()}
        made = None if making is None else making.back(meta, **stored.settings)
        if making is None or made is None:
            raise PlanError(f"the brick {stored.brick} at {path} can't be merged: it computes what its place could not")
        if stored.kind == "wrap_module":
            self._unwrap(path)
        shapes = {key: tuple(tensor.shape) for key, tensor in made.items()}
        self._put_made(Group(path, making, True, stored.settings, inputs), shapes)
        self.replaced.append(path)
        kept = set(making.keeps(shapes, **stored.settings))
        gone = {f"{path}.{key}" for key in inputs.keys() - made.keys() - kept}
        self.used_up |= dict.fromkeys(gone, index)
        have = shapes | {key: origin.shape for key, origin in inputs.items() if key in kept}
        self.structure = without_bricks(self.structure, stored, path, self.modules, have)
        ended = [e for e in self.structure if isinstance(e, TieParameters) and gone & {e.parameter, e.to}]
        self.structure = [e for e in self.structure if e not in ended]
        for tie in ended:
            self.shared_by_merged |= {tie.parameter.rpartition(".")[0]: path, tie.to.rpartition(".")[0]: path}

    def _below(self, path: str) -> dict[str, Origin]:
        """The tensors of the module at `path` and below, by their names in it; those that are used up are gone."""
        names = {
            alias: name
            for alias, name in self.aliases.items()
            if alias.startswith(f"{path}.") and alias not in self.used_up
        }
        return {alias[len(path) + 1 :]: self.origins[name] for alias, name in names.items()}

    def _put_made(self, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for key, shape in shapes.items():
            name = f"{group.path}.{key}"
            self._forget(name)
            self.used_up.pop(name, None)
            self.origins[name], self.aliases[name] = Origin(tuple(shape), Made(group, key)), name

    def _forget(self, name: str) -> None:
        """Let `name` stand for no old tensor any more; one that has other names lives on under them."""
        canonical = self.aliases.pop(name, None)
        if canonical != name:
            return
        origin = self.origins.pop(name)
        if heirs := [alias for alias, target in self.aliases.items() if target == name]:
            self.origins[heirs[0]] = origin
            self.aliases |= dict.fromkeys(heirs, heirs[0])

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
                raise PlanError(nearest_name("parameter", name, self.aliases))
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


def _refuse_too_deep(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """PlanError when a stack of layers is to be longer than can be built in a moment."""
    for name in [name for name in values if name.rpartition(".")[2] in LENGTH_FIELDS]:
        if isinstance(values[name], int) and values[name] > max(MOST_LAYERS, config_value(config, name) or 0):
            raise PlanError(
                f"{name} = {values[name]}: so many layers take long to build, even without weights, and nothing is "
                f"known of models of more than {MOST_LAYERS}. Ask for that many at most"
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
