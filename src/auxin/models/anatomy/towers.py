"""Models of several towers: submodules with configs of their own, each with a residual stream of its own widths.

An anatomy has one residual stream. That of a model of several towers is therefore the anatomy of one of them, whose
paths and names of config values lead there from the whole model; the parameters of the others run along no stream.
Where no tower is chosen all parameters do, and the stacks are those of all towers: layers can be added and moved, and
nothing can be widened.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from auxin.models.scoped_config import unscoped
from auxin.words.anatomy import Anatomy, LayerStack
from auxin.words.paths import dotted
from auxin.words.roles import ParameterRole

_CONFIG = "_config"


@dataclass(frozen=True)
class Tower:
    """A submodule whose config is a part of the model's."""

    name: str
    """What the model's config calls its config, without the ending: "text"."""
    path: str
    """Where it is."""
    anatomy: Anatomy
    """Its own, by itself."""


@dataclass(frozen=True)
class Towers:
    """How the models of one architecture are made of towers."""

    joined: Callable[[PreTrainedModel, Anatomy, str], Anatomy]
    """(model, anatomy of one tower by its paths in the model, the tower's name) -> that anatomy, with the roles of what
    lies beside the towers, and with what else the others have to do with this one. Where no tower is chosen the name is
    that of the first, and the roles are then taken off their streams."""

    def anatomy(
        self, model: PreTrainedModel, part: str | None, describe: Callable[[PreTrainedModel], Anatomy]
    ) -> Anatomy:
        """The anatomy of one tower in `model`, or of all without widths.

        Args:
            model: the model.
            part: the tower's name, or a part of its path. None, or what names none, chooses the only one of a model
                that has no more, else none.
            describe: what describes a tower by itself.
        """
        towers = [Tower(name, path, describe(tower)) for name, path, tower in towers_of(model)]
        chosen = [tower for tower in towers if part is None or part in (tower.name, *tower.path.split("."))]
        tower = chosen[0] if len(chosen) == 1 else towers[0]
        others = [other for other in towers if other is not tower]
        found = self.joined(model, _in_model(tower), tower.name)
        own = {role.pattern for role in found.roles}
        rest = [_off_streams(role) for other in others for role in _in_model(other).roles if role.pattern not in own]
        if len(chosen) == 1 or len(towers) == 1:
            return replace(found, family=model.config.model_type, roles=(*found.roles, *rest))
        return replace(
            found,
            family=model.config.model_type,
            roles=tuple(map(_off_streams, (*found.roles, *rest))),
            stacks=tuple(stack for each in towers for stack in self.joined(model, _in_model(each), each.name).stacks),
            towers=tuple(each.name for each in towers),
        )


def towers_of(model: PreTrainedModel) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """Name, path and module of every tower that `model` has, in the order of its config's parts."""
    config: Any = unscoped(model.config)
    for field in config.sub_configs:
        part = getattr(config, field, None)
        for path, module in model.named_modules():
            own = unscoped(getattr(module, "config", None))
            if path and part is not None and own is part and isinstance(module, PreTrainedModel):
                yield field.removesuffix(_CONFIG), path, module
                break


def _in_model(tower: Tower) -> Anatomy:
    """The tower's anatomy with the paths and the names of config values that lead there from the model."""
    found, path = tower.anatomy, f"{tower.path}."
    return replace(
        found,
        fields=found.fields.renamed(lambda name: f"{tower.name}{_CONFIG}.{name}"),
        stacks=tuple(_stack(stack, tower) for stack in found.stacks),
        roles=tuple(replace(role, pattern=path + role.pattern) for role in found.roles),
        final_norm=None if found.final_norm is None else path + found.final_norm,
        head=None if found.head is None else path + found.head,
        embeddings=tuple(path + name for name in found.embeddings),
        embedding_norm=None if found.embedding_norm is None else path + found.embedding_norm,
        before_norms=tuple(path + name for name in found.before_norms),
        unnormed_readers=tuple(path + name for name in found.unnormed_readers),
    )


def _stack(stack: LayerStack, tower: Tower) -> LayerStack:
    def within(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{tower.path}.{path}" for path in paths)

    return replace(
        stack,
        path=f"{tower.path}.{stack.path}",
        length_field=f"{tower.name}{_CONFIG}.{stack.length_field}",
        entries=within(stack.entries),
        end=dotted(tower.path, stack.end),
        readers=within(stack.readers),
        reader_of_entry=dotted(tower.path, stack.reader_of_entry) if stack.reader_of_entry else "",
        tower=tower.name,
    )


def _off_streams(role: ParameterRole) -> ParameterRole:
    return replace(role, axes=((),) * len(role.axes), access=(None,) * len(role.axes))
