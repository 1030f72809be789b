"""The edits: each one structural change of a model, as pure data.

An edit knows how the structure changes (a config value, a shape, a module), how new parameters come from the old ones,
how the moments of an optimizer follow, and how to get the old state back out of the new one.
"""

from typing import Annotated, Any

from pydantic import Field

from auxin.edits.kinds.architecture_edits import ChangeArchitecture, SetConfig
from auxin.edits.kinds.entry_edits import RouteParameter, ScaleEntries
from auxin.edits.kinds.file_edits import MultiplyParameter, ProjectParameter, SetParameter, ShiftParameter
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
    ParameterEdit,
    ScaleParameter,
    SliceParameter,
)

Edit = Annotated[
    SetConfig
    | ChangeArchitecture
    | PadParameter
    | AverageRows
    | SliceParameter
    | ScaleParameter
    | CentreParameter
    | ProjectParameter
    | MultiplyParameter
    | SetParameter
    | ShiftParameter
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
    | ResizeModule
    | TieParameters,
    Field(discriminator="kind"),
]


LONGEST = 400
"""Characters of an edit in words: a list of thousands of layers would bury the message that it stands in."""


def describe_edit(edit: Edit) -> str:
    """One line for one edit."""
    whole = isinstance(edit, SetConfig | ChangeArchitecture | TieParameters)
    words = str(edit) if whole else f"{_place(edit)}: {edit}"
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def _place(edit: Any) -> str:
    """What an edit changes."""
    if isinstance(edit, ParameterEdit):
        return edit.parameter
    place: str = edit.layers if isinstance(edit, ArrangeLayers | JoinAbove) else edit.module
    return place
