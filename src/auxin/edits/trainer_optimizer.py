"""The optimizer's state that transformers' Trainer leaves in a checkpoint (`optimizer.pt`), carried through a plan.

The file numbers parameters in the order in which the optimizer got them. That order is the Trainer's rule for a model:
first what decays, then what doesn't, each as `named_parameters` has them; or, of an optimizer that was made by hand,
all in one group. The rule for the old model gives the old numbers their names, that for the new model the new names
their numbers, so that a Trainer that resumes with the new model finds every moment where it looks for it.
"""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auxin.edits.carry import MOMENT_ORDERS, Carrier, TensorStore, carry, check_states
from auxin.edits.origin import Group
from auxin.edits.resolution import ResolvedPlan
from auxin.edits.tensor_names import shapes_of
from auxin.errors import CheckpointError, first_line

FILE = "optimizer.pt"
TRAINER_RULE = 0
"""The place of the Trainer's own rule among `_groupings`."""
MADE_AT_ONCE = {"sum"}
"""States that an optimizer (Adagrad) has from the beginning, and not from a parameter's first step."""


def carry_trainer_optimizer(
    path: Path, target: Path, resolved: ResolvedPlan, seed: int, weights: TensorStore
) -> list[str]:
    """Write to `target` the state that `path` holds, as the Trainer would have it for the new model.

    Parameters that are new, and those whose moments start anew, have no state there; the optimizer makes it at their
    first step. The new state is in memory as a whole while it is written.

    Args:
        path: the old file, which is read with `weights_only=True`.
        target: the new file.
        resolved: the plan.
        seed: of what is random.
        weights: where the old weights lie; what bricks are made of is looked at.

    Returns:
        As `carry`.

    Raises:
        CheckpointError: the file can't be read so, or its parameters are not those of the old model in an order that is
            known.
        PlanError: it is not known how a state follows a change of shape.
    """
    store = _TrainerOptimizer(path, resolved, weights)
    checked: set[Group] = set()
    for origin in resolved.origins.values():
        check_states(origin, store, checked)
    fresh = carry(resolved, seed, store)
    # As the Trainer writes it, which reads no other format.
    torch.save(store.new_state(), target)
    return fresh


class _TrainerOptimizer:
    """The file as a store of states; the weights stay with `weights`."""

    def __init__(self, path: Path, resolved: ResolvedPlan, weights: TensorStore) -> None:
        self.resolved, self._weights = resolved, weights
        self._content = _read(path)
        names_in_groups, self._rule = _names(self._content, resolved.before)
        numbers = [number for group in self._content["param_groups"] for number in group["params"]]
        names = [name for group in names_in_groups for name in group]
        states = self._content["state"]
        self._states = {name: states.get(number, {}) for number, name in zip(numbers, names, strict=True)}
        _check_shapes(self._states, shapes_of(resolved.before))
        self._new: dict[str, dict[str, Any]] = {}

    def read(self, name: str) -> Tensor:
        """The old tensor called `name`."""
        return self._weights.read(name)

    def states(self, name: str) -> Mapping[str, Any]:
        """The optimizer's state of the old parameter called `name`; empty without one."""
        return self._states.get(name, {})

    def order(self) -> Iterable[str]:
        """Any: nothing is overwritten."""
        return self.resolved.origins

    def write(self, name: str, carrier: Carrier) -> None:
        """Take the states of the new tensor called `name`."""
        # Copies of a layer must not share memory, which the optimizer would update twice.
        states = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in carrier.states(name).items()
        }
        if states:
            self._new[name] = states

    def new_state(self) -> dict[str, Any]:
        """The content of the new file.

        Raises:
            CheckpointError: the optimizer would miss a state that it makes for all parameters at once.
        """
        groups = _groupings(self.resolved.after)[self._rule]
        names = [name for group in groups for name in group]
        needed = {key for states in self._states.values() for key in states} & MADE_AT_ONCE
        if needed and (bare := [name for name in names if name not in self._new]):
            raise CheckpointError(
                f"Its optimizer has a state {min(needed)!r} of every parameter from the beginning; {bare[0]} is new."
            )
        numbers = {name: number for number, name in enumerate(names)}
        settings = self._content["param_groups"]
        return {
            **self._content,
            "state": {numbers[name]: self._new[name] for name in names if name in self._new},
            "param_groups": [
                {**group, "params": [numbers[name] for name in own]}
                for group, own in zip(settings, groups, strict=True)
            ],
        }


def _read(path: Path) -> dict[str, Any]:
    """The file's content; what could run code on loading is refused by torch."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"It can't be read with weights_only=True ({first_line(error).rstrip('.')}).") from error
    groups = content.get("param_groups") if isinstance(content, dict) else None
    if not isinstance(groups, list) or not isinstance(content.get("state"), dict):
        raise CheckpointError("It is no state_dict of an optimizer of torch.")
    return cast(dict[str, Any], content)


def _names(content: dict[str, Any], model: PreTrainedModel) -> tuple[list[list[str]], int]:
    """The names of the parameters in every group, and the place of the rule by which they are in that order."""
    groups = content["param_groups"]
    found = [len(group["params"]) for group in groups]
    numbers = [number for group in groups for number in group["params"]]
    plain = all(isinstance(number, int) for number in numbers) and len(set(numbers)) == len(numbers)
    if plain and not any("param_names" in group for group in groups) and content["state"].keys() <= set(numbers):
        for rule, names in enumerate(_groupings(model)):
            if [len(group) for group in names] == found and (
                rule != TRAINER_RULE or not groups[1].get("weight_decay", 0.0)
            ):
                return names, rule
    wanted = " and ".join(str(len(group)) for group in _groupings(model)[TRAINER_RULE])
    raise CheckpointError(
        f"Its groups hold {' and '.join(map(str, found)) or 'no'} parameters, and those that a Trainer makes for this "
        f"model {wanted}: which are which is not known (frozen parameters, groups of your own, an earlier version)."
    )


def _groupings(model: PreTrainedModel) -> list[list[list[str]]]:
    """The names of what is trained, in groups: as the Trainer makes them, and all in one."""
    try:
        from transformers.trainer import Trainer
    except ImportError as error:
        raise CheckpointError(f"transformers' Trainer, whose rule it follows, can't be imported: {error}.") from error

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # it asks nothing of the Trainer itself
    return [
        [[name for name in trained if name in decaying], [name for name in trained if name not in decaying]],
        [trained],
    ]


def _check_shapes(states: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse moments that are not of the parameters that they were taken for."""
    for name, state in states.items():
        for key, tensor in state.items():
            if key in MOMENT_ORDERS and isinstance(tensor, Tensor) and tuple(tensor.shape) != shapes[name]:
                raise CheckpointError(
                    f"Its {key!r} at the place of {name} has shape {list(tensor.shape)}, the parameter "
                    f"{list(shapes[name])}: it is the state of another model, or of groups of your own."
                )
