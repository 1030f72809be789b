"""Training: the loop, its schedules, guard, metrics and checkpoints."""

from auxin.training.settings import GuardSettings, TrainingSettings

__all__ = ["GuardSettings", "TrainingSettings"]
