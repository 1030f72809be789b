"""Choosing how a model becomes smaller: methods and combinations of them are tried, one is chosen, mended and shown."""

from auxin.shrinking.outcome import Outcome
from auxin.shrinking.settings import ShrinkSettings
from auxin.shrinking.shrink import shrink

__all__ = ["Outcome", "ShrinkSettings", "shrink"]
