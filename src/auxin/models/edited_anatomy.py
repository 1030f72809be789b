"""What bricks add to the anatomy of an architecture: roles of their parameters, blocks of the stream, fixed widths.

The anatomy of an architecture knows its modules by the paths that they have in it. A wrapper puts one part more into
the paths below it; which part that is, the wrapper says, so that the parameters below keep their roles. What else a
brick has, it tells itself.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from auxin.errors import PlanError
from auxin.nn.bricks import Brick, Roles
from auxin.words.anatomy import Anatomy, LayerStack, ResidualBlocks
from auxin.words.paths import dotted, path_pattern
from auxin.words.roles import ParameterRole
from auxin.words.widths import Stream


def with_bricks(found: Anatomy, model: nn.Module) -> Anatomy:
    """The anatomy `found` of a plain model of this architecture, for `model`, which may hold bricks.

    Raises:
        PlanError: a brick gives a role that does not fit its parameter, or none to one of its own.
    """
    bricks = {path: module for path, module in model.named_modules() if isinstance(module, Brick)}
    if not bricks:
        return found
    told = _Told(found, model, bricks)
    roles = _collapsed([*told.wrapped(), *told.own()], found.stacks)
    names = told.names_of_wrapped()
    final_norm = None if found.final_norm is None else told.innermost(found.final_norm)
    whole = replace(
        found,
        roles=(*found.roles, *roles),
        final_norm=final_norm,
        embeddings=tuple(names.get(name, name) for name in found.embeddings),
        residual_blocks=_residual_blocks(bricks.values()),
        fixed_widths=(*found.fixed_widths, *_fixed_widths(bricks.values()).items()),
    )
    told.check_complete(whole)
    return whole


@dataclass(frozen=True)
class _Named:
    """A parameter's role, and where the parameter is."""

    name: str
    role: ParameterRole


class _Told:
    """What the bricks of one model say."""

    def __init__(self, found: Anatomy, model: nn.Module, bricks: dict[str, Brick]) -> None:
        self.found, self.bricks = found, bricks
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.plain = _plain_paths(model)
        self.patterns = [(role.pattern.split("."), role) for role in found.roles]
        # Roles of the bricks' own parameters by the plain path of every module above them, and the rest of the name.
        self.below: dict[str, dict[str, ParameterRole]] = {}

    def wrapped(self) -> Iterator[_Named]:
        """The parameters that have other names than in the architecture, with the roles that they have there."""
        for plain, name in self.names_of_wrapped().items():
            role = next((role for role in self.found.roles if role.matches(plain)), None)
            if role is not None:
                yield _Named(name, role)

    def own(self) -> Iterator[_Named]:
        """The bricks' own parameters, those of inner bricks first, which outer ones are told of."""
        for path, brick in reversed(self.bricks.items()):
            place = self.plain[path]
            known, inside = self._of_architecture(place), self.below.get(place, {})
            own = brick.roles({**known, **inside})
            self._check_names(path, brick, own, known)
            for name, role in own.items():
                pattern = path_pattern(f"{path}.{name}")
                for whole in [name for name in self.shapes if pattern.fullmatch(name)]:
                    self._check_shape(brick, whole, role)
                    self._note(f"{place}.{whole.removeprefix(f'{path}.')}", role)
                    yield _Named(whole, replace(role, added=True))

    def names_of_wrapped(self) -> dict[str, str]:
        """The names of parameters below wrappers by those that they have in the architecture."""
        names: dict[str, str] = {}
        for name in self.shapes:
            path, _, last = name.rpartition(".")
            if self.plain[path] != path:
                names[dotted(self.plain[path], last)] = name
        return names

    def innermost(self, path: str) -> str:
        """The path of the module that the architecture has at `path`, below all that is wrapped around it."""
        return next((actual for actual, plain in reversed(self.plain.items()) if plain == path), path)

    def check_complete(self, whole: Anatomy) -> None:
        """PlanError when a parameter inside a brick has no role."""
        for name in self.shapes:
            inside = [path for path in self.bricks if name.startswith(f"{path}.")]
            if inside and not any(role.matches(name) for role in whole.roles):
                brick = self.bricks[inside[-1]]
                mend = (
                    f"First {brick.plain_form}. Or make this change before that one."
                    if brick.plain_form is not None
                    else "Make this change before that one, or choose a method that takes layers as they are."
                )
                raise PlanError(
                    f"{inside[-1]} of the {whole.family} model is {brick.brick_name} since an earlier change, and to "
                    f"which units of the model the entries of {name} belong is not known. {mend}"
                )

    def _of_architecture(self, place: str) -> dict[str, ParameterRole]:
        """The roles that the architecture gives to what is below the plain path `place`, by the rest of the name."""
        parts = place.split(".")
        roles: dict[str, ParameterRole] = {}
        for pattern, role in self.patterns:
            above, rest = pattern[: len(parts)], pattern[len(parts) :]
            if rest and len(above) == len(parts) and all(x in ("*", y) for x, y in zip(above, parts, strict=True)):
                roles.setdefault(".".join(rest), role)
        return roles

    def _check_names(self, path: str, brick: Brick, own: Roles, known: Roles) -> None:
        """PlanError when what is a brick's own is called as what its module has."""
        names = list(own)
        if brick.wrapped is not None:
            # Even one without a role would be taken for that of the wrapped module.
            names += [name for name, _ in brick.named_parameters(recurse=False)]
        if twice := next((name for name in names if name in known), None):
            raise PlanError(
                f"{path}: the brick {brick.brick_name!r} has {twice} as a parameter of its own, and so has the module "
                "that it stands for. If it is the same, leave its role out; if not, give it another name."
            )

    def _note(self, plain: str, role: ParameterRole) -> None:
        parts = plain.split(".")
        for length in range(1, len(parts)):
            above, rest = ".".join(parts[:length]), ".".join(parts[length:])
            self.below.setdefault(above, {})[rest] = role

    def _check_shape(self, brick: Brick, name: str, role: ParameterRole) -> None:
        shape = self.shapes[name]
        fits = len(role.axes) == len(role.access) == len(shape) and all(
            not segments or sum(segment.size for segment in segments) == size
            for segments, size in zip(role.axes, shape, strict=True)
        )
        if not fits:
            along = [sum(segment.size for segment in segments) or "any size" for segments in role.axes]
            raise PlanError(
                f"{name} has shape {list(shape)}, and the role that the brick {brick.brick_name!r} gives to it is one "
                f"of {along}. Make its `roles` say what the parameter's axes are."
            )


def _plain_paths(model: nn.Module) -> dict[str, str]:
    """By the path of every module the one that it would have without the wrappers around and above it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = {"": ""}
    for path, module in modules.items():
        if path:
            above, _, name = path.rpartition(".")
            parent = modules[above]
            wraps = isinstance(parent, Brick) and parent.wrapped is module
            plain[path] = plain[above] if wraps else dotted(plain[above], name)
    return plain


def _collapsed(named: Iterable[_Named], stacks: tuple[LayerStack, ...]) -> list[ParameterRole]:
    """One role for all layers of a stack that have the parameter, where they agree; else one for each name."""
    alike: dict[str, list[_Named]] = {}
    for one in named:
        alike.setdefault(_for_all_layers(one.name, stacks), []).append(one)
    roles: list[ParameterRole] = []
    for pattern, several in alike.items():
        same = {replace(one.role, pattern=pattern) for one in several}
        roles += same if len(same) == 1 else [replace(one.role, pattern=one.name) for one in several]
    return roles


def _for_all_layers(name: str, stacks: tuple[LayerStack, ...]) -> str:
    for stack in stacks:
        if name.startswith(f"{stack.path}."):
            _, _, rest = name.removeprefix(f"{stack.path}.").partition(".")
            return f"{stack.path}.*.{rest}"
    return name


def _residual_blocks(bricks: Iterable[Brick]) -> ResidualBlocks:
    said = {brick.residual_blocks() for brick in bricks}
    return "wide" if "wide" in said else "recycled" if "recycled" in said else "one"


def _fixed_widths(bricks: Iterable[Brick]) -> dict[Stream, str]:
    fixed: dict[Stream, str] = {}
    for brick in bricks:
        for stream, reason in brick.fixed_widths().items():
            fixed.setdefault(stream, reason)
    return fixed
