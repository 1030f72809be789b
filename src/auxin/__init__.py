"""Auxin changes the size of a transformer without starting over."""

from typing import Any

from auxin import models  # noqa: F401 - registers the architectures with transformers' Auto classes


def __getattr__(name: str) -> Any:
    """Load `grow` when it is first asked for."""
    if name == "grow":
        from auxin.methods.grow.tokenformer import grow

        return grow
    raise AttributeError(f"module 'auxin' has no attribute {name!r}")
