"""What a model learns to predict, and what is made of a batch for it."""

from auxin.objectives.objective import ObjectiveSettings

__all__ = ["ObjectiveSettings"]
