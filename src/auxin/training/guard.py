"""The guard on the loss: finds bad steps, remembers them, and says when they are too many.

It decides from the losses and batches it was shown and from nothing else, so a run that is replayed from a checkpoint
comes to the same decisions.
"""

import math
import statistics
from collections import deque
from typing import Any

from auxin.settings import Settings
from auxin.training.settings import GuardSettings

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class GuardEvent(Settings):
    """One bad step."""

    step: int
    """Optimizer step of the stage (0-based) that was not taken."""
    data_position: int
    """Batch, counted from the beginning of the data order, on which it happened."""
    reason: str
    """What was wrong, with the numbers."""
    action: str
    """What was done about it: skip or rewind."""
    rewound_to: int | None = None
    """Step of the checkpoint that a rewind went back to."""

    def __str__(self) -> str:
        done = "skipped" if self.rewound_to is None else f"rewound to step {self.rewound_to}"
        return f"step {self.step}, batch {self.data_position}: {self.reason}; {done}"


class Guard:
    """Judges each step by its loss and gradient norm."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.events: list[GuardEvent] = []

    def problem(self, loss: float, gradient_norm: float) -> str | None:
        """Say what is wrong with a step of this loss (nats per token) and gradient norm; None: nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient norm is {gradient_norm}"
        limit = self.limit()
        if limit is not None and loss > limit:
            return f"the loss {loss:.4f} is a spike above {limit:.4f}"
        return None

    def limit(self) -> float | None:
        """The loss above which a step is a spike: median + multiple * 1.4826 * MAD; None while it can't be told."""
        multiple = self.settings.spike_multiple
        if multiple is None or len(self.losses) < self.settings.minimum_history:
            return None
        median = statistics.median(self.losses)
        deviation = MAD_TO_DEVIATION * statistics.median([abs(loss - median) for loss in self.losses])
        return median + multiple * max(deviation, self.settings.minimum_spread)

    def accept(self, loss: float) -> None:
        """Remember the loss of a good step."""
        self.losses.append(loss)

    def record(self, event: GuardEvent) -> bool:
        """Remember a bad step; return whether there were too many of late."""
        self.events.append(event)
        recent = [e for e in self.events if e.data_position > event.data_position - self.settings.window]
        return len(recent) > self.settings.maximum_events

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as JSON."""
        return {"losses": list(self.losses), "events": [event.model_dump() for event in self.events]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.losses = deque(state["losses"], maxlen=self.settings.window)
        self.events = [GuardEvent.model_validate(event) for event in state["events"]]
