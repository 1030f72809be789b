"""Carrying the tensors and the optimizer's moments of a model over to what a plan makes of it.

There is one way for all places where tensors lie: a `TensorStore` gives old tensors and takes new ones, the `Carrier`
makes them, one at a time, each by the expression that resolving the plan found for it. A model in memory is one store
(`module_store`), a folder of safetensors files another (`folder_store`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from auxin.edits.fresh import FreshValues
from auxin.edits.kinds.parameter_edits import generator
from auxin.edits.origin import Blend, Fresh, Group, Joined, Kept, Made, Origin
from auxin.edits.resolution import ResolvedPlan
from auxin.errors import PlanError
from auxin.nn.autocast import without_autocast

MOMENT_ORDERS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "prev": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "acc_delta": 2,
    "sum": 2,
}
"""How the state tensors of torch's optimizers depend on the gradient: linearly (1) or by its square (2)."""


def moment_order(name: str, parameter: str) -> int:
    """The order of the optimizer state `name`; PlanError when it is not known how it depends on the gradient."""
    if name not in MOMENT_ORDERS:
        raise PlanError(
            f"The optimizer keeps a state {name!r} for {parameter} and it is not known how it follows a change of "
            f"shape. Known states: {', '.join(MOMENT_ORDERS)}. Use such an optimizer, or apply without one."
        )
    return MOMENT_ORDERS[name]


class TensorStore(Protocol):
    """Where a model's tensors lie. Old ones are called by the first of their names."""

    def read(self, name: str) -> Tensor:
        """The old tensor called `name`."""

    def states(self, name: str) -> Mapping[str, Any]:
        """The optimizer's state of the old tensor called `name`, by the states' names; empty without one."""

    def order(self) -> Iterable[str]:
        """The new tensors in the order in which they must be made: one that overwrites an old one after all others
        that need it."""

    def write(self, name: str, carrier: "Carrier") -> None:
        """Take what `carrier` makes: the value and the states of the new tensor called `name`."""


def carry(resolved: ResolvedPlan, seed: int, store: TensorStore) -> list[str]:
    """Make every tensor of the edited model, and the optimizer's state for it, out of those in `store`.

    One tensor, or the tensors of one brick, are in memory at a time, beside what the store keeps.

    Args:
        resolved: the plan.
        seed: of what is random.
        store: where old tensors come from and new ones go.

    Returns:
        The parameters that are made of others which had an optimizer's state, and start without any.
    """
    carrier = Carrier(resolved, seed, store)
    with without_autocast():
        for name in store.order():
            store.write(name, carrier)
    parameters = {name for name, _ in resolved.after.named_parameters()}
    return [name for name in carrier.lost if name in parameters]


def check_tensors(resolved: ResolvedPlan, store: TensorStore, names: Iterable[str]) -> None:
    """Read everything once: what can't be carried is refused before anything changes.

    Args:
        resolved: the plan.
        store: where the old tensors lie.
        names: those that it holds.

    Raises:
        PlanError: a tensor holds an infinity or a NaN, or a state of the optimizer can't follow.
    """
    for name in names:
        check_finite(name, store.read(name))
    checked: set[Group] = set()
    for origin in resolved.origins.values():
        check_states(origin, store, checked)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise PlanError, naming the tensor, when it holds an infinity or a NaN."""
    if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise PlanError(
            f"{name} holds {bad} value(s) that are not finite; the model is broken and was not changed. Go back to an "
            "earlier checkpoint."
        )


def check_states(origin: Origin, store: TensorStore, checked: set[Group], is_part: bool = False) -> None:
    """Raise PlanError when the optimizer's states of what `origin` is made of can't follow.

    Args:
        origin: of the new tensor, or of one that others are made of (`is_part`).
        store: where the states lie.
        checked: the groups that were looked at: all tensors of one are made of the same. Gets those that are met.
        is_part: whether something happens to it although it has no steps of its own.
    """
    if isinstance(origin.source, Made) and origin.source.group not in checked:
        checked.add(origin.source.group)
        for part in origin.source.group.inputs.values():
            check_states(part, store, checked, is_part=True)
    if origin.kept is None or not (origin.steps or is_part):
        return
    for state, tensor in store.states(origin.kept).items():
        if not isinstance(tensor, Tensor):
            continue
        if tuple(tensor.shape) == origin.source_shape:
            moment_order(state, origin.kept)
        elif tensor.numel() != 1:
            raise PlanError(
                f"The optimizer's state {state!r} of {origin.kept} has shape {list(tensor.shape)}, the parameter "
                f"{list(origin.source_shape)}; it can't follow. Give the optimizer that trains this model, or none."
            )


class OnDemand(Mapping[str, Any]):
    """Values that are made, or read, when they are asked for.

    Args:
        keys: their names.
        get: gives the value of a name.
    """

    def __init__(self, keys: Iterable[str], get: Callable[[str], Any]) -> None:
        self._keys, self._get = tuple(keys), get

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Carrier:
    """Makes new tensors and their states.

    Args:
        resolved: the plan.
        seed: of what is random.
        store: where the old tensors lie.
    """

    def __init__(self, resolved: ResolvedPlan, seed: int, store: TensorStore) -> None:
        self.resolved, self.seed, self._store = resolved, seed, store
        self.fresh = FreshValues(resolved, seed)
        self._made: dict[tuple[Group, str | None], dict[str, Any]] = {}
        self._live_on = {origin.kept for origin in resolved.origins.values()} - {None}
        self.lost: dict[str, None] = {}
        """The tensors asked for that are made of others, of which an optimizer's state was there and could not follow,
        in order."""

    def origin(self, name: str) -> Origin:
        """Where the new tensor called `name` comes from."""
        return self.resolved.origins[name]

    def value(self, name: str, origin: Origin | None = None) -> Tensor:
        """The new tensor called `name`. One that nothing happens to is the old tensor itself."""
        origin = self.origin(name) if origin is None else origin
        return self._stepped(origin, self._begun(name, origin))

    def states(self, name: str) -> Mapping[str, Any]:
        """The optimizer's state of the new tensor called `name`, each made when asked for; empty where it starts anew.

        Moments that have the old tensor's shape are mapped, other states (a count of steps) stay. What nothing happens
        to is the old state itself.
        """
        origin = self.origin(name)
        found = {} if origin.fresh_moments else self._states(origin)
        if not found and isinstance(origin.source, Made) and self._had_states(origin.source.group):
            self.lost[name] = None
        return found

    def _had_states(self, group: Group) -> bool:
        """Whether there is a state of what a group is made of, and not only of what lives on beside it."""
        parts = (part for part in group.inputs.values() if part.kept not in self._live_on)
        return any(self._states(part) for part in parts)

    def _begun(self, name: str, origin: Origin) -> Tensor:
        read = self._store.read
        match origin.source:
            case Kept(old):
                return read(old)
            case Blend(terms):
                total: Tensor | None = None
                for weight, old in terms:
                    term = read(old) * weight
                    total = term if total is None else total.add_(term)
                assert total is not None
                return total
            case Joined(names, axis):
                return torch.cat([read(old) for old in names], dim=axis)
            case Made(group, key):
                return self._of_group(group, None)[key]
            case Fresh():
                return self.fresh.value(name, origin)

    def _stepped(self, origin: Origin, value: Tensor) -> Tensor:
        for step in origin.steps:
            value = step.edit.map_parameter(value, self.seed, step.name)
        return value

    def _states(self, origin: Origin) -> Mapping[str, Any]:
        match origin.source:
            case Kept(old):
                states = self._store.states(old)
                return OnDemand(states, lambda key: self._moment(origin, key, old, states[key]))
            case Made(group, key):
                return self._states_of_group(group, key, origin)
        return {}

    def _moment(self, origin: Origin, state: str, name: str, old: Any) -> Any:
        """One state after the steps; those that are no tensor of the parameter's shape stay."""
        if not isinstance(old, Tensor) or tuple(old.shape) != origin.source_shape:
            return old
        if not origin.steps or old.dim() == 0:
            return old
        order = moment_order(state, name)
        for step in origin.steps:
            old = step.edit.map_moment(old, order)
        return old

    def _of_group(self, group: Group, state: str | None) -> dict[str, Tensor]:
        """The tensors of a group, or their moments called `state`; kept until another group is asked for."""
        if (group, state) not in self._made:
            self._made = {key: made for key, made in self._made.items() if key[0] is group}
            self._made[group, state] = self._new_values(group) if state is None else self._new_moments(group, state)
        return self._made[group, state]

    def _inputs(self, group: Group) -> dict[str, Tensor]:
        """The values that a group is made of."""
        return {key: self.value(f"{group.path}.{key}", origin).detach() for key, origin in group.inputs.items()}

    def _new_values(self, group: Group) -> dict[str, Tensor]:
        old = self._inputs(group)
        if not group.back:
            draw = generator(self.seed, group.path, ())
            made: dict[str, Tensor] | None = group.making.values(old, draw, **group.settings)
        else:
            made = group.making.back(old, **group.settings)
        assert made is not None, "resolving found that there is a way back"
        return made

    def _new_moments(self, group: Group, state: str) -> dict[str, Tensor]:
        inputs = {key: self._states(origin).get(state) for key, origin in group.inputs.items()}
        moments = {
            key: moment
            for key, moment in inputs.items()
            if isinstance(moment, Tensor) and tuple(moment.shape) == group.inputs[key].shape
        }
        if not moments:
            return {}
        old = self._inputs(group)
        order = moment_order(state, f"{group.path}.{next(iter(moments))}")
        mapped = group.making.moments_back if group.back else group.making.moments
        return mapped(old, moments, order, **group.settings) or {}

    def _states_of_group(self, group: Group, key: str, origin: Origin) -> dict[str, Any]:
        """All states or none: an optimizer can't go on with half of them."""
        found: dict[str, Any] = {}
        for part in group.inputs.values():
            for state, tensor in self._states(part).items():
                if state in found:
                    continue
                if isinstance(tensor, Tensor) and tuple(tensor.shape) == part.shape and tensor.dim() > 0:
                    made = self._of_group(group, state)
                    if key not in made:
                        return {}
                    found[state] = self._moment(origin, state, key, made[key])
                else:
                    found[state] = tensor
        return found
