"""What a model learns, what is made of a batch for it, what it is measured by, and the samples that methods look at."""

from auxin.objectives.objective import Objective, ObjectiveSettings, Reference, References

__all__ = ["Objective", "ObjectiveSettings", "Reference", "References"]
