"""Edits of the module tree: what a config can't say, kept in the checkpoint and done again when it is loaded."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from auxin.edits.kinds.fills import Fill, Tagged
from auxin.errors import PlanError
from auxin.nn.bricks import find_brick
from auxin.nn.stand_ins import Identity, Zeros
from auxin.words.paths import path_pattern

Leaves = Literal["identity", "zeros", "inner"]


class ModuleEdit(Tagged):
    """What all edits of modules share."""

    module: str
    """The module's dotted path; `*` stands for any one part."""

    def matches(self, path: str) -> bool:
        """Whether the edit means the module at `path`."""
        return path_pattern(self.module).fullmatch(path) is not None

    def paths(self, modules: Iterable[str]) -> list[str]:
        """Those of `modules` that the edit means."""
        return [path for path in modules if self.matches(path)]

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


class TieParameters(Tagged):
    """Make a parameter the same tensor as another one, whose values both have from then on."""

    kind: Literal["tie_parameters"] = "tie_parameters"
    parameter: str
    """The parameter that is given up."""
    to: str
    """The parameter that stands for both."""

    def rebuild(self, model: PreTrainedModel) -> None:
        """Tie them in `model`; transformers, too, then knows that the first is not in checkpoints."""
        owner, _, name = self.parameter.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(self.to))
        for mapping in ("_tied_weights_keys", "all_tied_weights_keys"):
            setattr(model, mapping, {**(getattr(model, mapping) or {}), self.parameter: self.to})

    def __str__(self) -> str:
        return f"tie {self.parameter} to {self.to}"


StructuralEdit = Annotated[
    ReplaceModule | WrapModule | RemoveModule | TieParameters,
    Field(discriminator="kind"),
]


def merged(edits: list[Any]) -> list[Any]:
    """The shortest list of structural edits that builds the same: settings changed later win, a wrapper taken off is
    forgotten."""
    result: list[Any] = []
    for edit in edits:
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


def without(edit: Any, path: str, modules: Iterable[str]) -> list[Any]:
    """The structural edit `edit` for all of the `modules` that it means but the one at `path`."""
    return [edit.model_copy(update={"module": other}) for other in edit.paths(modules) if other != path]


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
