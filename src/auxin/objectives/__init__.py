"""What a model learns to predict, what is made of a batch for it, and the samples that methods look at."""

from auxin.objectives.objective import ObjectiveSettings

__all__ = ["ObjectiveSettings"]
