"""The edit language: edits and plans as data, and the executor that applies them to models and checkpoints."""

from auxin.edits.checkpoint import apply_to_checkpoint
from auxin.edits.edit import Edit, PadParameter, SetConfig
from auxin.edits.executor import Receipt, apply
from auxin.edits.fills import NormalFill, RepeatFill, ZeroFill
from auxin.edits.plan import Plan, Promise, planned_config

__all__ = [
    "Edit",
    "NormalFill",
    "PadParameter",
    "Plan",
    "Promise",
    "Receipt",
    "RepeatFill",
    "SetConfig",
    "ZeroFill",
    "apply",
    "apply_to_checkpoint",
    "planned_config",
]
