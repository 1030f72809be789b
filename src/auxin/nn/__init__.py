"""Bricks: modules that know no model."""

from auxin.nn.pattention import Pattention, pattention

__all__ = ["Pattention", "pattention"]
