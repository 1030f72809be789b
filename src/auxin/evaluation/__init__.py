"""Measure a model: loss, perplexity, bits per byte, and what it writes."""

from auxin.evaluation.generation import generate_text
from auxin.evaluation.perplexity import Perplexity, evaluate_loss, perplexity

__all__ = ["Perplexity", "evaluate_loss", "generate_text", "perplexity"]
