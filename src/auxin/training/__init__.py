"""Training: the loop, its schedules, guard, metrics and checkpoints."""

from auxin.interruption import TrainingInterrupted
from auxin.models.loading import load_model
from auxin.planning.hooks import ExactRates, Hook, OldRates, TrainOnly
from auxin.training.checkpoint import load_optimizer, write_checkpoint_folder
from auxin.training.growth import apply_in_pieces
from auxin.training.loop import train
from auxin.training.ranks import Ranks, joined
from auxin.training.result import TrainingResult
from auxin.training.run_folder import latest_checkpoint
from auxin.training.schedule import learning_rate
from auxin.training.settings import GuardSettings, TrainingSettings

__all__ = [
    "ExactRates",
    "GuardSettings",
    "Hook",
    "OldRates",
    "Ranks",
    "TrainOnly",
    "TrainingInterrupted",
    "TrainingResult",
    "TrainingSettings",
    "apply_in_pieces",
    "joined",
    "latest_checkpoint",
    "learning_rate",
    "load_model",
    "load_optimizer",
    "train",
    "write_checkpoint_folder",
]
