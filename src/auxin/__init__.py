"""Auxin changes the size of a transformer without starting over."""

import sys
from pathlib import Path
from typing import Any

if Path(sys.argv[0] if sys.argv else "").name not in {"auxin", "auxin.exe"}:
    # The command line does this in the commands that load a model: its help need not wait seconds for torch.
    # Register the architectures with transformers' Auto classes, and the loading of edited models.
    from auxin import models  # noqa: F401
    from auxin.edits import replay  # noqa: F401


def __getattr__(name: str) -> Any:
    """Load `grow` when it is first asked for."""
    if name == "grow":
        from auxin.methods.grow.tokenformer import grow

        return grow
    raise AttributeError(f"module 'auxin' has no attribute {name!r}")
