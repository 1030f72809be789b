"""Following a plan on shapes: where every parameter of the new model comes from. All checks happen here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedConfig, PreTrainedModel

from auxin.edits.effects import refuse_idle_values
from auxin.edits.kinds.edit import describe_edit
from auxin.edits.kinds.fills import CopyFill, Fill
from auxin.edits.kinds.module_edits import (
    ConfigureModule,
    ModuleEdit,
    ResizeModule,
)
from auxin.edits.origin import Fresh, Origin
from auxin.edits.structure import (
    edited_config,
    edited_skeleton,
    refuse_quantized,
    saved_and_read,
    skeleton_of,
    with_structural_edits,
)
from auxin.edits.tensor_names import lies_below, nearest_name, shapes_of, tensor_names
from auxin.edits.tracker import Tracker
from auxin.errors import PlanError
from auxin.models.building import first_difference
from auxin.models.layout import check_said
from auxin.models.loading import REFUSALS
from auxin.models.stored_form import StoredForm


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
    configured: Mapping[int, Sequence[ConfigureModule | ResizeModule]] = field(default_factory=dict)
    """The edits that lead back from those that configure or resize modules, by their places in the plan."""


def resolve(edits: Sequence[Any], model: PreTrainedModel) -> ResolvedPlan:
    """Check that the `edits` of a plan, in order, fit `model` and find what they change.

    Weights are not looked at; the meta device serves.

    Raises:
        PlanError: a path that does not exist, a shape that does not fit, edits that collide, or a config that asks for
            other shapes than the edits give; the message names the edit.
    """
    refuse_quantized(model)
    before = skeleton_of(model)
    _check_unchanged(model, before)
    tracker = Tracker(before)
    for index, edit in enumerate(edits):
        try:
            tracker.follow(index, edit)
        except PlanError as error:
            raise PlanError(f"Edit {index + 1} ({describe_edit(edit)}): {str(error).rstrip('.')}.") from error
    return _Outcome(edits, tracker).resolved()


def planned_config(edits: Sequence[Any], config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that `edits` make of a model of `config`, which stays as it is.

    Raises:
        PlanError: they don't fit.
    """
    return resolve(edits, edited_skeleton(config)).after.config


class _Outcome:
    """What the edits come to: the new skeleton, and the origin of everything in it."""

    def __init__(self, edits: Sequence[Any], state: Tracker) -> None:
        self.edits, self.state = edits, state

    def resolved(self) -> ResolvedPlan:
        """Build the new skeleton and find the origin of everything in it."""
        after = self._built()
        said = {name: self.state.values[name] for name in self.state.said}
        # First, since what all modules had of their own may have become what the config says for all of them.
        structure = self.state.sizes.settled(self.state.configurations.settled(self.state.structure, said))
        if structure != self.state.structure:
            self.state.structure = structure
            after = self._built()
        refuse_idle_values(
            self.state.architecture[0], said, after, lambda values: self._built({**self.state.values, **values})
        )
        origins = self._origins(after)
        modules: dict[str, str | None] = {"": ""}
        for path, _ in after.named_modules(remove_duplicate=False):
            modules[path] = "" if not path else self.state.modules.get(path)
        back: dict[int, Sequence[ConfigureModule | ResizeModule]] = {
            **self.state.configurations.back,
            **self.state.sizes.back,
        }
        resolved = ResolvedPlan(self.state.before, after, origins, modules, back)
        self._check_modules(resolved)
        check_said(after.config, said)
        self._check_read_again(after)
        self._check_stored_whole(after)
        return resolved

    def _built(self, values: dict[str, Any] | None = None) -> PreTrainedModel:
        """The new skeleton; or one with other config values, which the edits of modules are not judged by."""
        config = edited_config(self.state.architecture[0], self.state.values if values is None else values)
        with_structural_edits(config, self.state.structure)
        try:
            return edited_skeleton(config, self.state.architecture[1], self._note if values is None else None)
        except PlanError:
            raise
        except REFUSALS as error:
            raise PlanError(
                f"No model can be built with the plan's config values ({self._set_in_words()}): {error!r}."
            ) from error

    def _note(self, edit: Any, model: PreTrainedModel) -> None:
        self.state.configurations.note(edit, model)
        self.state.sizes.note(edit, model)

    def _check_read_again(self, after: PreTrainedModel) -> None:
        """PlanError when the model that is built from the config as it is saved is not the edited one."""
        try:
            config = saved_and_read(after.config)
        except PlanError as error:
            raise PlanError(
                f"With the plan's config values ({self._set_in_words()}) the model could be saved, and not be loaded: "
                f"{error}. Leave out the value that does not go with the others."
            ) from error
        if config.to_dict() == after.config.to_dict():
            return
        again = edited_skeleton(config, type(after))
        found = first_difference(after, again)
        # What a config says in another way once it is read is of no account, nor what no saving of it keeps.
        if found is not None and found != first_difference(
            self.state.before, edited_skeleton(saved_and_read(self.state.before.config), type(self.state.before))
        ):
            raise PlanError(
                f"With the plan's config values ({self._set_in_words()}) the model that is loaded from a checkpoint "
                f"would be another one: {found}. Leave out the value that its config does not keep."
            )

    def _check_stored_whole(self, after: PreTrainedModel) -> None:
        """PlanError when files hold in one tensor what the plan leaves in part."""
        incomplete = StoredForm(after).incomplete()
        before = StoredForm(self.state.before).incomplete() if incomplete else {}
        for stored, names in incomplete.items():
            if stored not in before:
                raise PlanError(
                    f"Files of a {after.config.model_type} model hold {names[0]} and others in one tensor ({stored}), "
                    "and the plan takes the others away, or gives them another form, so that what is saved could not "
                    "be loaded. Change all of them in one way, or none."
                )

    def _origins(self, after: PreTrainedModel) -> dict[str, Origin]:
        names, shapes = tensor_names(after), shapes_of(after)
        # What a copied layer had no place for is initialised, too (a norm that ModernBERT's first layer lacks).
        fresh_layers = {*self.state.fresh_layers, *self.state.copies}
        origins: dict[str, Origin] = {}
        for name, aliases in names.items():
            held = list(dict.fromkeys(self.state.aliases[alias] for alias in aliases if alias in self.state.aliases))
            at = self.state.origins
            if other := next((each for each in held[1:] if not at[each].is_that_of(at[held[0]])), None):
                raise PlanError(
                    f"{held[0]} and {other} are one tensor in the edited model (tied), and the plan's edits give them "
                    "different values. Untie them first (tie_word_embeddings = false), or leave both as they are."
                )
            if held:
                origin = at[held[0]]
                self._check_shape(name, origin, shapes[name])
            elif any(alias in self.state.fresh for alias in aliases):
                fill = next(self.state.fresh[a] for a in aliases if a in self.state.fresh)
                origin = Origin(shapes[name], Fresh(fill))
                if isinstance(fill, CopyFill):
                    if fill.of not in self.state.aliases:
                        raise PlanError(f"copy: {nearest_name('parameter', fill.of, self.state.aliases)}.")
                    origin = self.state.origins[self.state.aliases[fill.of]]
                    self._check_shape(name, origin, shapes[name])
                else:
                    _check_fill(name, fill, shapes[name])
            elif lies_below(name, fresh_layers) or self._is_brick_buffer(after, name):
                origin = Origin(shapes[name], Fresh(None))
            else:
                raise PlanError(
                    f"With the plan's edits the model has a parameter {name} that it had not before and for which no "
                    f"edit provides values ({self._set_in_words()}). Leave out the edit that asks for it, or give it a "
                    "fill."
                )
            origins[name] = origin
        left = [name for name in self.state.aliases if not self._kept(name, after)]
        for name in left:
            index = self.state.used_up.get(name, len(self.edits))
            steps = self.state.origins[self.state.aliases[name]].steps
            if late := next((step for step in steps if step.index > index), None):
                raise PlanError(
                    f"Edit {late.index + 1} ({describe_edit(self.edits[late.index])}): {name} was used up by edit "
                    f"{index + 1} ({describe_edit(self.edits[index])}), and the model has it no more. Change it before."
                )
        for path, merged in self.state.shared_by_merged.items():
            if path not in self.state.replaced:
                raise PlanError(
                    f"{merged} shares its tensors with {path}, which stays what it is, so that they could be one no "
                    "more. Merge all that share them in one plan."
                )
        renewed = {*self.state.replaced, *self.state.copies}
        left = [name for name in left if not lies_below(name, renewed)]
        if left:
            raise PlanError(
                f"With the plan's edits the model has no parameter {left[0]} any more, and no edit removes it "
                f"({self._set_in_words()}). Leave out the value that drops it."
            )
        return origins

    def _set_in_words(self) -> str:
        state = self.state
        told = [f"{key} = {value}" for key, value in state.values.items()] + state.configurations.in_words()
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

    def _check_shape(self, name: str, origin: Origin, expected: tuple[int, ...]) -> None:
        if origin.shape == expected:
            return
        blamed = "No edit"
        if origin.steps:
            last = origin.steps[-1]
            blamed = f"Edit {last.index + 1} ({describe_edit(self.edits[last.index])})"
        raise PlanError(
            f"{blamed}: {name} has shape {list(origin.shape)} after the plan's edits, but the plan's config asks for "
            f"{list(expected)}. Make sizes and config values agree."
        )

    def _check_modules(self, resolved: ResolvedPlan) -> None:
        """Modules stay what they are unless an edit says otherwise: a config value can't turn one into another."""
        before = dict(resolved.before.named_modules(remove_duplicate=False))
        others = {*self.state.replaced, *self.state.fresh_layers, *self.state.copies}
        for path, module in resolved.after.named_modules(remove_duplicate=False):
            old_path = resolved.modules.get(path)
            if lies_below(f"{path}.", others):  # those modules themselves, too
                continue
            old = before[old_path] if old_path is not None else None
            if old is None and self._in_brick(path):
                continue
            # Torch's parametrizations, as of weight norms, make a class of its own for each module.
            is_same = old is not None and type_before_parametrizations(old) is type_before_parametrizations(module)
            # What is dropped in training may depend on a layer's number (BEiT); it is no part of the function.
            is_same |= old is not None and _only_drops(path) and not [*old.parameters(), *module.parameters()]
            if not is_same and not self.state.changes_architecture():
                was = type(old).__name__ if old is not None else "nothing"
                raise PlanError(
                    f"With the plan's config values ({self._set_in_words()}) the module {path} would be "
                    f"{type(module).__name__} instead of {was}, which is another function and which no edit provides. "
                    "Leave out the config value that changes it."
                )
        gone = set(filter(None, self.state.modules)) - set(resolved.modules)
        others = {*self.state.replaced, *self.state.copies}
        if not self.state.changes_architecture() and (gone := {path for path in gone if not lies_below(path, others)}):
            path = min(gone)
            raise PlanError(
                f"With the plan's config values ({self._set_in_words()}) the module {path} would be nothing instead of "
                f"{type(before.get(self.state.modules[path] or '')).__name__}, which is another function and which no "
                "edit provides. Leave out the config value that changes it."
            )

    def _in_brick(self, path: str) -> bool:
        """Whether `path` is a brick that a structural edit put there, or lies in one."""
        built = ConfigureModule | ResizeModule
        edits = [e for e in self.state.structure if isinstance(e, ModuleEdit) and not isinstance(e, built)]
        parts = path.split(".")
        above = [".".join(parts[: length + 1]) for length in range(len(parts))]
        return any(edit.matches(place) for edit in edits for place in above)


def _only_drops(path: str) -> bool:
    return "drop" in path.rpartition(".")[2]


def _check_fill(name: str, fill: Fill, shape: tuple[int, ...]) -> None:
    """PlanError when `fill` can't fill the new parameter called `name`."""
    length, *rest = shape or (1,)
    try:
        fill.check((0, *rest), 0, length)
    except PlanError as error:
        raise PlanError(f"The fill of {name}: {error}.") from error


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
