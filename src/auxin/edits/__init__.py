"""The edit language: edits and plans as data, and the executor that applies them to models and checkpoints."""

from typing import TYPE_CHECKING

from auxin.edits import replay  # noqa: F401 - edited models load wherever edits are known
from auxin.words.first_use import on_first_use

if TYPE_CHECKING:
    from auxin.edits.continuation import continue_exactly
    from auxin.edits.executor import Receipt, apply
    from auxin.edits.folder_executor import apply_to_checkpoint
    from auxin.edits.inverse import inverse_plan
    from auxin.edits.kinds.architecture_edits import ChangeArchitecture, SetConfig
    from auxin.edits.kinds.edit import Edit
    from auxin.edits.kinds.file_edits import MultiplyParameter, ProjectParameter, SetParameter, ShiftParameter
    from auxin.edits.kinds.fills import ConstantFill, Fill, MeanFill, NormalFill, RepeatFill, ZeroFill
    from auxin.edits.kinds.layer_edits import ArrangeLayers, JoinAbove
    from auxin.edits.kinds.module_edits import (
        ConfigureModule,
        MakeParameters,
        MergeModule,
        RemoveModule,
        ReplaceModule,
        ResizeModule,
        TieParameters,
        WrapModule,
    )
    from auxin.edits.kinds.parameter_edits import (
        AverageRows,
        CentreParameter,
        PadParameter,
        ScaleParameter,
        SliceParameter,
    )
    from auxin.edits.kinds.rate import Rate
    from auxin.edits.plan import Plan, Promise
    from auxin.edits.resolution import planned_config
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "auxin.edits.continuation": ("continue_exactly",),
            "auxin.edits.executor": ("Receipt", "apply"),
            "auxin.edits.folder_executor": ("apply_to_checkpoint",),
            "auxin.edits.inverse": ("inverse_plan",),
            "auxin.edits.kinds.architecture_edits": ("ChangeArchitecture", "SetConfig"),
            "auxin.edits.kinds.edit": ("Edit",),
            "auxin.edits.kinds.file_edits": (
                "MultiplyParameter",
                "ProjectParameter",
                "SetParameter",
                "ShiftParameter",
            ),
            "auxin.edits.kinds.fills": ("ConstantFill", "Fill", "MeanFill", "NormalFill", "RepeatFill", "ZeroFill"),
            "auxin.edits.kinds.layer_edits": ("ArrangeLayers", "JoinAbove"),
            "auxin.edits.kinds.module_edits": (
                "ConfigureModule",
                "MakeParameters",
                "MergeModule",
                "RemoveModule",
                "ReplaceModule",
                "ResizeModule",
                "TieParameters",
                "WrapModule",
            ),
            "auxin.edits.kinds.parameter_edits": (
                "AverageRows",
                "CentreParameter",
                "PadParameter",
                "ScaleParameter",
                "SliceParameter",
            ),
            "auxin.edits.kinds.rate": ("Rate",),
            "auxin.edits.plan": ("Plan", "Promise"),
            "auxin.edits.resolution": ("planned_config",),
        },
    )

__all__ = [
    "ArrangeLayers",
    "AverageRows",
    "CentreParameter",
    "ChangeArchitecture",
    "ConfigureModule",
    "ConstantFill",
    "Edit",
    "Fill",
    "JoinAbove",
    "MakeParameters",
    "MeanFill",
    "MergeModule",
    "MultiplyParameter",
    "NormalFill",
    "PadParameter",
    "Plan",
    "ProjectParameter",
    "Promise",
    "Rate",
    "Receipt",
    "RemoveModule",
    "RepeatFill",
    "ReplaceModule",
    "ResizeModule",
    "ScaleParameter",
    "SetConfig",
    "SetParameter",
    "ShiftParameter",
    "SliceParameter",
    "TieParameters",
    "WrapModule",
    "ZeroFill",
    "apply",
    "apply_to_checkpoint",
    "continue_exactly",
    "inverse_plan",
    "planned_config",
]
