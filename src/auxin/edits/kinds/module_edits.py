"""Edits of the module tree: what a config can't say, kept in the checkpoint and done again when it is loaded."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from auxin.edits.kinds.fills import Fill, Tagged
from auxin.errors import PlanError
from auxin.models.building import Builder, likeness
from auxin.nn.bricks import BRICKS, find_brick
from auxin.nn.resizing import resized, size_of
from auxin.nn.stand_ins import Identity, Zeros
from auxin.words.paths import dotted, encloses, path_pattern

Leaves = Literal["identity", "zeros", "inner"]


class ModuleEdit(Tagged):
    """What all edits of modules share."""

    module: str
    """The module's dotted path; `*` stands for any one part."""

    @property
    def place(self) -> str:
        """Where in the model the edit works."""
        return self.module

    def matches(self, path: str) -> bool:
        """Whether the edit means the module at `path`."""
        return path_pattern(self.module).fullmatch(path) is not None

    def paths(self, modules: Iterable[str]) -> list[str]:
        """Those of `modules` that the edit means."""
        return [path for path in modules if self.matches(path)]

    def means_something_in(self, model: nn.Module) -> bool:
        """Whether `model` has a module that the edit means."""
        return any(self.matches(name) for name, _ in model.named_modules(remove_duplicate=False))

    def moved(self, move: Callable[[str], str]) -> Self:
        """The edit of what `move` makes of its path."""
        return self.model_copy(update={"module": move(self.module)})

    def rebuild(self, model: PreTrainedModel) -> None:
        """Do the edit to the structure of `model`, whose parameters have no data."""
        for path in self.paths([name for name, _ in model.named_modules(remove_duplicate=False)]):
            old = model.get_submodule(path)
            with torch.device("meta"):
                new = self._new_module(old)
            model.set_submodule(path, new.train(old.training))

    def _new_module(self, old: nn.Module) -> nn.Module:
        raise NotImplementedError


class ReplaceModule(ModuleEdit):
    """Put a brick in the place of a module. Parameters of the same names are kept.

    A second one of the same brick at the same place changes its settings.
    """

    kind: Literal["replace_module"] = "replace_module"
    brick: str
    """The brick's name."""
    settings: dict[str, Any] = {}
    """What the brick is built with, beside the module that it replaces."""
    fills: dict[str, Fill] = {}
    """Where new parameters of the brick come from, by their names in it."""

    def _new_module(self, old: nn.Module) -> nn.Module:
        return _built(self.brick, "replacing", old, self.settings)

    def __str__(self) -> str:
        return f"becomes {self.brick}{_in_words(self.settings)}"


class WrapModule(ModuleEdit):
    """Put a brick around a module, whose parameters move from `path.name` to `path.inner.name`."""

    kind: Literal["wrap_module"] = "wrap_module"
    brick: str
    """The brick's name."""
    settings: dict[str, Any] = {}
    """What the brick is built with, beside the module that it wraps."""
    fills: dict[str, Fill] = {}
    """Where new parameters of the brick come from, by their names in it."""

    def _new_module(self, old: nn.Module) -> nn.Module:
        return _built(self.brick, "wrapping", old, self.settings)

    def __str__(self) -> str:
        return f"is wrapped in {self.brick}{_in_words(self.settings)}"


class RemoveModule(ModuleEdit):
    """Take a module away, or the brick that wraps one."""

    kind: Literal["remove_module"] = "remove_module"
    leaves: Leaves = "identity"
    """What stays: "identity" (the input goes through), "zeros" (a branch that adds nothing) or "inner" (the module that
    was wrapped)."""
    returns: list[str] | None = None
    """What must be returned in that place, in the words of `auxin.nn.stand_ins`; None: found by a run on shapes."""

    def _new_module(self, old: nn.Module) -> nn.Module:
        if self.leaves == "inner":
            inner = getattr(old, "inner", None)
            if not isinstance(inner, nn.Module):
                raise PlanError(f"{self.module} is no wrapper ({type(old).__name__}): it has no inner module to leave")
            return inner
        stand_in = Identity if self.leaves == "identity" else Zeros
        return stand_in.replacing(old, self.returns or ())

    def __str__(self) -> str:
        return "is unwrapped" if self.leaves == "inner" else f"is removed, leaving {self.leaves}"


class MergeModule(ModuleEdit):
    """Put the module back that a brick replaced, with the brick's work in its parameters."""

    kind: Literal["merge_module"] = "merge_module"

    def __str__(self) -> str:
        return "is merged back"


class MakeParameters(ModuleEdit):
    """Make the parameters of a module, whose class follows from the config, out of those that it had.

    For what a change of the config or of the architecture asks for and no edit of single parameters gives: experts out
    of a feed-forward part, a fused matrix out of three.
    """

    kind: Literal["make_parameters"] = "make_parameters"
    making: str
    """The making's name."""
    settings: dict[str, Any] = {}
    """What it is told beside the old tensors."""

    def __str__(self) -> str:
        return f"is made by {self.making}{_in_words(self.settings)}"


BRICK_EDITS = ("replace_module", "wrap_module")
"""Kinds of the edits that put a brick somewhere."""


class ConfigureModule(ModuleEdit):
    """Build a module anew, and whatever is in it, with other values of the config: a width that one layer or one stack
    has alone. Its parameters keep their names; edits of parameters give them the shapes that the new build asks for.

    The config of the model stays as it is. The part's config is that one with the values changed, also after later
    changes of it (`set_attn_implementation`). A second edit of the same module, or of one around it, wins for the
    values that it names. Bricks below are built again on top, as after a `SetConfig`.

    Only what is built differently is an effect: a value that is read from the config when the model runs is refused.
    """

    kind: Literal["configure_module"] = "configure_module"
    module: str = Field(min_length=1)
    """The module's dotted path, `*` for any one part: "model.layers.3.mlp", a whole layer, or a stack that is a model
    of its own ("decoder"). Its class takes the config."""
    values: dict[str, Any] = Field(min_length=1)
    """The values by their names in the config, or by those of other arguments of the module's class."""

    def rebuild(self, model: PreTrainedModel) -> None:
        """Do the edit to the structure of `model`, whose parameters have no data."""
        for path in self._found(model):
            builder = self.builder(model, path)
            model.set_submodule(path, builder.build(self.values).train(builder.old.training))

    def idle_values(self, model: PreTrainedModel) -> list[str]:
        """Those of the values without which `model` would be built the same."""
        builders = [self.builder(model, path) for path in self._found(model)]
        idle = []
        for name in self.values:
            others = {key: value for key, value in self.values.items() if key != name}
            if all(likeness(b.build(self.values)) == likeness(b.build(others)) for b in builders):
                idle.append(name)
        return idle

    def builder(self, model: PreTrainedModel, path: str) -> Builder:
        """What builds the module at `path` anew; PlanError when it is a brick, or when nothing can."""
        try:
            return Builder(model, path)
        except PlanError as error:
            bricks = tuple(BRICKS.all().values())
            for name, module in model.get_submodule(path).named_modules():
                if isinstance(module, bricks):
                    place = dotted(path, name)
                    raise PlanError(
                        f"{place} is {type(module).__name__}, a brick of an earlier edit, which is not built from the "
                        "config. Name modules beside it or in it, or take it off first"
                    ) from error
            raise

    def without(self, names: Iterable[str]) -> "list[ConfigureModule]":
        """The edit without some of its values: none where no value is left."""
        left = {name: value for name, value in self.values.items() if name not in set(names)}
        return [self.model_copy(update={"values": left})] if left else []

    def _found(self, model: PreTrainedModel) -> list[str]:
        return self.paths([name for name, _ in model.named_modules(remove_duplicate=False)])

    def __str__(self) -> str:
        return f"is built with {', '.join(f'{key} = {value}' for key, value in self.values.items())}"


class ResizeModule(ModuleEdit):
    """Give a linear layer, a convolution or a norm another number of features or channels than its architecture does.

    For widths that no value of the config says: those of a block of a ResNet, of the attentions and feed-forward parts
    of a SegFormer's stages. The layer's parameters and running means keep their names; edits of these give them the
    shapes. Whatever reads the shapes when it runs follows; layers before and behind have to be given the same.
    """

    kind: Literal["resize_module"] = "resize_module"
    module: str = Field(min_length=1)
    """The layer's dotted path, `*` for any one part."""
    outputs: int | None = Field(default=None, gt=0)
    """Features or channels that it gives; None: as many as before. A norm or a convolution of each channel by itself
    gives as many as it reads."""
    inputs: int | None = Field(default=None, gt=0)
    """Those that it reads, of one that may give others; None: as many as before."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.outputs is None and self.inputs is None:
            raise ValueError("neither outputs nor inputs is given. Give one of them.")
        return self

    def changes(self, model: nn.Module) -> bool:
        """Whether a layer of `model` that it means would be another one."""
        modules = dict(model.named_modules(remove_duplicate=False))
        return any(self.size(modules[path]) != size_of(modules[path]) for path in self.paths(modules))

    def size(self, old: nn.Module) -> tuple[int, int | None]:
        """What `size_of` says of the layer that `old` becomes; PlanError, which follows its path, where it can't."""
        outputs, inputs = size_of(old)
        if inputs is None and self.inputs is not None:
            raise PlanError(f"is {type(old).__name__}, which gives what it reads. Give outputs alone.")
        return self.outputs or outputs, self.inputs or inputs

    def _new_module(self, old: nn.Module) -> nn.Module:
        return resized(old, *self.size(old))

    def __str__(self) -> str:
        told = {"gives": self.outputs, "reads": self.inputs}
        return " and ".join(f"{does} {size}" for does, size in told.items() if size is not None)


class TieParameters(Tagged):
    """Make a parameter the same tensor as another one, whose values both have from then on."""

    kind: Literal["tie_parameters"] = "tie_parameters"
    parameter: str
    """The parameter that is given up."""
    to: str
    """The parameter that stands for both."""

    @property
    def place(self) -> str:
        """Where in the model the edit works."""
        return self.parameter

    def means_something_in(self, model: nn.Module) -> bool:
        """Whether `model` has both parameters."""
        return {self.parameter, self.to} <= {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def moved(self, move: Callable[[str], str]) -> Self:
        """The edit of what `move` makes of its paths."""
        return self.model_copy(update={"parameter": move(self.parameter), "to": move(self.to)})

    def rebuild(self, model: PreTrainedModel) -> None:
        """Tie them in `model`; transformers, too, then knows that the first is not in checkpoints."""
        owner, _, name = self.parameter.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(self.to))
        for mapping in ("_tied_weights_keys", "all_tied_weights_keys"):
            setattr(model, mapping, {**(getattr(model, mapping) or {}), self.parameter: self.to})

    def __str__(self) -> str:
        return f"tie {self.parameter} to {self.to}"


StructuralEdit = Annotated[
    ReplaceModule | WrapModule | RemoveModule | ConfigureModule | ResizeModule | TieParameters,
    Field(discriminator="kind"),
]


def shortest(edits: list[Any]) -> list[Any]:
    """The shortest list of structural edits that builds the same: settings and values changed later win, a wrapper
    taken off is forgotten. Modules are configured before the bricks in them are put there."""
    result: list[Any] = []
    for edit in edits:
        if isinstance(edit, ConfigureModule):
            result = _with_configuration(result, edit)
            continue
        if isinstance(edit, ResizeModule):
            same_size = [e for e in result if isinstance(e, ResizeModule) and e.module == edit.module]
            for earlier in same_size:
                result.remove(earlier)
                edit = edit.model_copy(
                    update={"outputs": edit.outputs or earlier.outputs, "inputs": edit.inputs or earlier.inputs}
                )
        if isinstance(edit, ReplaceModule):
            same = [
                e for e in result if isinstance(e, ReplaceModule) and (e.module, e.brick) == (edit.module, edit.brick)
            ]
            if same:
                result[result.index(same[-1])] = edit
                continue
        if isinstance(edit, RemoveModule) and edit.leaves == "inner":
            wraps = [e for e in result if isinstance(e, WrapModule) and e.module == edit.module]
            if wraps:
                del result[len(result) - 1 - result[::-1].index(wraps[-1])]
                continue
        result.append(edit)
    return result


def elsewhere(edit: Any, path: str, modules: Iterable[str]) -> list[Any]:
    """The structural edit `edit` for all of the `modules` that it means but the one at `path`."""
    return [edit.model_copy(update={"module": other}) for other in edit.paths(modules) if other != path]


def without_bricks(
    structure: list[Any], merged: Any, path: str, modules: Iterable[str], have: Mapping[str, tuple[int, ...]]
) -> list[Any]:
    """`structure` without the brick at `path` that the edit `merged` of it put there, nor those before it that this one
    had replaced and that are not had back: their tensors are not among those that merging gives, which are of the
    module that they replaced themselves.

    Args:
        structure: structural edits.
        merged: one of them.
        path: of the module.
        modules: all paths there are.
        have: shapes of the tensors that the module has when it is merged.
    """
    place = next(i for i, edit in enumerate(structure) if edit is merged)
    gone = [place]
    for i in reversed(range(place)):
        if structure[i].kind not in BRICK_EDITS or not structure[i].matches(path):
            continue
        making = find_brick(structure[i].brick).making if structure[i].kind == "replace_module" else None
        if making is None or making.shapes(have, **structure[i].settings).keys() <= have.keys():
            break
        gone.append(i)
    left = [elsewhere(edit, path, modules) if i in gone else [edit] for i, edit in enumerate(structure)]
    return [edit for edits in left for edit in edits]


def _with_configuration(edits: list[Any], new: ConfigureModule) -> list[Any]:
    """`edits` and `new`, whose values win over earlier ones there and below."""
    names = list(new.values)
    result: list[Any] = []
    place: int | None = None
    for edit in edits:
        if not isinstance(edit, ConfigureModule) or not encloses(new.module, edit.module):
            result.append(edit)
        elif edit.module == new.module:
            place, new = len(result), new.model_copy(update={"values": edit.values | new.values})
        else:
            result += edit.without(names)
    if place is None:
        below = (i for i, edit in enumerate(result) if isinstance(edit, ModuleEdit) and _lies_below(edit, new))
        place = next(below, len(result))
    return [*result[:place], new, *result[place:]]


def _lies_below(edit: ModuleEdit, other: ModuleEdit) -> bool:
    """Whether `edit` may mean a module in one that `other` means."""
    inner, outer = edit.module.split("."), other.module.split(".")
    alike = (one == two or "*" in (one, two) for one, two in zip(inner, outer, strict=False))
    return len(inner) > len(outer) and all(alike)


def _built(name: str, way: Literal["replacing", "wrapping"], old: nn.Module, settings: dict[str, Any]) -> nn.Module:
    cls = find_brick(name)
    build = getattr(cls, "replacing", None) if way == "replacing" else cls
    if build is None:
        raise PlanError(f"the brick {name} can't replace a module; wrap it")
    try:
        return build(old, **settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"the brick {name} refuses a {type(old).__name__} with {settings}: {error}") from error


def _in_words(settings: dict[str, Any]) -> str:
    return f" ({', '.join(f'{key} = {value}' for key, value in settings.items())})" if settings else ""
