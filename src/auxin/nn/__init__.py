"""Bricks, modules that know no model, and how their tensors are made of those that they replace."""

from auxin.nn.pattention import Pattention, pattention

__all__ = ["Pattention", "pattention"]
