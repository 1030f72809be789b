"""Auxin changes the size of a transformer without starting over.

`methods()` lists what can be done to a model, `plan` says what it would be, as a `Plan`, which is data; `apply` does it
to a model or a checkpoint and returns a `Receipt`; `load` loads what was saved; `grow` appends parameter tokens to a
TokenFormer.

Importing the package tells transformers about its architectures and about edited models, so that `from_pretrained`
loads them; everything else is imported when it is used.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from auxin.words.first_use import on_first_use

if TYPE_CHECKING:
    from auxin.edits.executor import Receipt
    from auxin.edits.plan import Plan
    from auxin.face import apply, load, plan, save
    from auxin.methods import methods
    from auxin.methods.grow.tokenformer import grow
else:
    __getattr__ = on_first_use(
        __name__,
        {
            "auxin.edits.executor": ("Receipt",),
            "auxin.edits.plan": ("Plan",),
            "auxin.face": ("apply", "load", "plan", "save"),
            "auxin.methods": ("methods",),
            "auxin.methods.grow.tokenformer": ("grow",),
        },
    )[0]

__all__ = ["Plan", "Receipt", "apply", "grow", "load", "methods", "plan", "save"]

# On some processors MKL's products depend on where in memory a matrix lies: a model that was loaded, whose weights lie
# where the file has them, computes other bits than the one that was saved. This makes them one. MKL reads it at
# its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")

# While `python -m` looks for a module, that is told by the interpreter's own arguments alone.
_program = sys.argv[0] if sys.argv else ""
_program = sys.orig_argv[-len(sys.argv)].removeprefix("-m") if _program == "-m" else Path(_program).name
if _program not in {"auxin", "auxin.exe"}:
    # The command line does this in the commands that load a model: its help need not wait seconds for torch.
    # Register the architectures with transformers' Auto classes, and the loading of edited models.
    from auxin import models  # noqa: F401
    from auxin.edits import replay  # noqa: F401


def __dir__() -> list[str]:
    """The few words; rooms of the house are imported by their own names."""
    return list(__all__)
