"""The state of a training stage: what is sharded (tensors) and what every process has alike (values)."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from auxin.errors import CheckpointError
from auxin.models.pieces import StoredTensors
from auxin.planning.hooks import Hook
from auxin.training.guard import Guard
from auxin.training.optimizer import optimizer_tensors, restore_optimizer

RNG_CPU, RNG_CUDA = "rng.cpu", "rng.cuda"


@dataclass
class TrainingState:
    """All that changes while a stage trains."""

    model: PreTrainedModel
    optimizer: Optimizer
    hooks: Sequence[Hook]
    guard: Guard
    start_position: int
    """Data position, in batches, at which the stage started."""
    data_position: int
    """Batches drawn from the data order; only grows, also through a rewind."""
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    rewind_step: int = 0
    """Step of the last periodic checkpoint; where a rewind goes."""
    seconds: float = 0.0
    """Wall time of the stage, summed over its pieces."""
    value_before: float | None = None
    """The first measure at the start."""
    started_at: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    notes: list[str] = field(default_factory=list)
    """What the ledger shall say about this stage."""
    loss_sum: float = 0.0
    """Of the good steps since the last line of metrics."""
    loss_count: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state but for the model's weights: moments by parameter name, random generators."""
        return optimizer_tensors(self.model, self.optimizer) | self.random_tensors()

    def values(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "guard": self.guard.state_dict(),
            "hooks": [hook.state_dict() for hook in self.hooks],
        }

    def random_tensors(self) -> dict[str, Tensor]:
        """The states of the random generators."""
        tensors = {RNG_CPU: torch.get_rng_state()}
        if self.model.device.type == "cuda":
            tensors[RNG_CUDA] = torch.cuda.get_rng_state(self.model.device)
        return tensors

    def load_tensors(self, moments: StoredTensors, training: StoredTensors) -> None:
        """Restore moments and random generators. To be called last: loading a model or its data may draw numbers."""
        if RNG_CPU not in training.shapes:
            raise CheckpointError(
                f"The training state lacks the tensor {RNG_CPU}. Restore it or use another checkpoint."
            )
        restore_optimizer(self.model, self.optimizer, moments)
        torch.set_rng_state(training.read(RNG_CPU)[RNG_CPU])
        if self.model.device.type == "cuda" and RNG_CUDA in training.shapes:
            torch.cuda.set_rng_state(training.read(RNG_CUDA)[RNG_CUDA], self.model.device)

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Restore what `values()` gave.

        Raises:
            CheckpointError: a value is missing, or the number of hooks is another one.
        """
        try:
            for name in _PLAIN:
                setattr(self, name, values[name])
            self.guard.load_state_dict(values["guard"])
            hooks = values["hooks"]
            if len(hooks) != len(self.hooks):
                raise CheckpointError(
                    f"The run was started with {len(hooks)} hooks, but is resumed with {len(self.hooks)}. Give the "
                    "same."
                )
            for hook, state in zip(self.hooks, hooks, strict=True):
                hook.load_state_dict(state)
        except KeyError as error:
            raise CheckpointError(f"The training state lacks {error}: the checkpoint is of another version.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"The training state can't be read: {error}. Use another checkpoint.") from error


_PLAIN = (
    "start_position",
    "data_position",
    "step",
    "rewind_step",
    "seconds",
    "value_before",
    "started_at",
    "notes",
    "loss_sum",
    "loss_count",
)
