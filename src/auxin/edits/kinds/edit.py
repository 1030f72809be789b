"""The edits: each one structural change of a model, as pure data.

An edit knows how the structure changes (a config value, a shape, a module), how new parameters come from the old ones,
how the moments of an optimizer follow, and how to get the old state back out of the new one.
"""

from typing import Annotated

from pydantic import Field

from auxin.edits.kinds.architecture_edits import ChangeArchitecture, SetConfig
from auxin.edits.kinds.entry_edits import RouteParameter, ScaleEntries
from auxin.edits.kinds.layer_edits import ArrangeLayers, JoinAbove
from auxin.edits.kinds.module_edits import (
    ConfigureModule,
    MakeParameters,
    MergeModule,
    RemoveModule,
    ReplaceModule,
    TieParameters,
    WrapModule,
)
from auxin.edits.kinds.parameter_edits import (
    AverageRows,
    CentreParameter,
    PadParameter,
    ParameterEdit,
    ProjectParameter,
    ScaleParameter,
    SliceParameter,
)
from auxin.errors import PlanError

MOMENT_ORDERS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "prev": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "acc_delta": 2,
    "sum": 2,
}
"""How the state tensors of torch's optimizers depend on the gradient: linearly (1) or by its square (2)."""


def moment_order(name: str, parameter: str) -> int:
    """The order of the optimizer state `name`; PlanError when it is not known how it depends on the gradient."""
    if name not in MOMENT_ORDERS:
        raise PlanError(
            f"The optimizer keeps a state {name!r} for {parameter} and it is not known how it follows a change of "
            f"shape. Known states: {', '.join(MOMENT_ORDERS)}. Use such an optimizer, or apply without one."
        )
    return MOMENT_ORDERS[name]


Edit = Annotated[
    SetConfig
    | ChangeArchitecture
    | PadParameter
    | AverageRows
    | SliceParameter
    | ScaleParameter
    | CentreParameter
    | ProjectParameter
    | ScaleEntries
    | RouteParameter
    | ArrangeLayers
    | JoinAbove
    | ReplaceModule
    | WrapModule
    | RemoveModule
    | MergeModule
    | MakeParameters
    | ConfigureModule
    | TieParameters,
    Field(discriminator="kind"),
]


def describe_edit(edit: Edit) -> str:
    """One line for one edit."""
    if isinstance(edit, ParameterEdit):
        return f"{edit.parameter}: {edit}"
    if isinstance(edit, ArrangeLayers | JoinAbove):
        return f"{edit.layers}: {edit}"
    return str(edit) if isinstance(edit, SetConfig | ChangeArchitecture | TieParameters) else f"{edit.module}: {edit}"
