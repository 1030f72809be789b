"""Measure a model of text: perplexity, bits per byte, and what it writes."""

from auxin.evaluation.generation import generate_text
from auxin.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "generate_text", "perplexity"]
