"""Bricks, modules that know no model, and how their tensors are made of those that they replace."""

from typing import TYPE_CHECKING

from auxin.words.first_use import on_first_use

if TYPE_CHECKING:
    from auxin.nn.pattention import Pattention
else:
    __getattr__, __dir__ = on_first_use(__name__, {"auxin.nn.pattention": ("Pattention",)})

__all__ = ["Pattention"]
