"""Span corruption, the objective that T5 is pretrained with: spans are cut out of a text and have to be written back.

After Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (arXiv
1910.10683, section 3.1.4): `noise_density` of a context's tokens are noise, in spans of `mean_span_length` tokens on
average. The encoder reads the tokens that are kept, with one sentinel in place of each span; the decoder writes each
sentinel followed by the span that it stands for, and then the end token. (The paper's figure 2 ends with one more
sentinel, where its code has the end token; so has this.)

    context   a b c d e f g h i j      noise: c d and h i j
    inputs    a b <0> e f g <1>
    targets   <0> c d <1> h i j <end>

As in T5, the noise tokens and the spans of a context are as many as its length says, not as chance says: of all ways to
cut the noise and the kept tokens into that many spans each is as likely as the other, a context begins with kept tokens
and ends with noise. So all batches have one shape and nothing is padded.

Sentinels are the ids that follow the tokenizer's, the first span's first; the tokenizer does not know them. T5's own
tokenizers have sentinels (`<extra_id_0>`, ...), which are not used.
"""

import math
from dataclasses import dataclass

import numpy as np

from auxin.errors import ConfigError, DataError

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0
"""The paper's choice."""


@dataclass(frozen=True)
class SpanLengths:
    """How a context is divided; the same for all contexts of its length."""

    context: int
    """Tokens of text."""
    noise: int
    """Tokens of text that are cut out."""
    spans: int
    """Spans that they form; as many sentinels are needed."""

    @property
    def kept(self) -> int:
        """Tokens of text that stay."""
        return self.context - self.noise

    @property
    def inputs(self) -> int:
        """Tokens that the encoder reads: the kept ones, and a sentinel for each span."""
        return self.kept + self.spans

    @property
    def targets(self) -> int:
        """Tokens that the decoder writes: the noise, a sentinel for each span, and the end token."""
        return self.noise + self.spans + 1


def span_lengths(
    context_length: int, noise_density: float = NOISE_DENSITY, mean_span_length: float = MEAN_SPAN_LENGTH
) -> SpanLengths:
    """How contexts of `context_length` tokens are divided.

    Args:
        context_length: tokens of text.
        noise_density: share of them that is cut out, in (0, 1); rounded to whole tokens.
        mean_span_length: tokens per span, at least 1; rounded so that there are whole spans, at least one.

    Raises:
        ConfigError: the context is too short for one span, or too full of spans for a kept token before each.
    """
    noise = round(context_length * noise_density)
    if noise < 1:
        raise ConfigError(
            f"context_length: {context_length} is too short for span corruption: noise_density {noise_density} of it "
            f"is not one token. Give a context_length of {math.floor(0.5 / noise_density) + 1} or more, or raise "
            "noise_density."
        )
    lengths = SpanLengths(context_length, noise, max(1, round(noise / mean_span_length)))
    if lengths.spans > lengths.kept:
        raise ConfigError(
            f"noise_density: {noise_density} with mean_span_length {mean_span_length} makes {lengths.spans} spans of a "
            f"context of {context_length} tokens and keeps {lengths.kept}, too few for one before each span. Lower "
            "noise_density, or raise mean_span_length."
        )
    return lengths


@dataclass(frozen=True)
class SpanCutter:
    """Makes inputs and targets of contexts."""

    lengths: SpanLengths
    """Of the contexts."""
    first_sentinel: int
    """The id that stands for the first span of a context; those of the other spans follow."""
    end: int
    """The id that ends the targets."""

    def corrupt(self, contexts: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Cut spans out of contexts.

        A row's noise follows from what was drawn from the generator before: batches of any size, one after the other,
        get the noise that they would get together.

        Args:
            contexts: token ids (batch, context_length), all below `first_sentinel`.
            generator: decides where the spans lie.

        Returns:
            Inputs (batch, lengths.inputs) and targets (batch, lengths.targets), 64-bit integers.

        Raises:
            DataError: the contexts have another length.
        """
        if contexts.ndim != 2 or contexts.shape[1] != self.lengths.context:
            raise DataError(f"Token array of shape {contexts.shape}: expected (batch, {self.lengths.context}).")
        noise = noise_mask(self.lengths, len(contexts), generator)
        inputs = self._with_sentinels_for(noise, contexts)
        # A context begins with kept tokens, so the sentinel in place of its first kept span goes before its first span
        # of noise, and so on: the targets are the inputs of the opposite mask.
        targets = self._with_sentinels_for(~noise, contexts)
        return inputs, np.pad(targets, ((0, 0), (0, 1)), constant_values=self.end)

    def _with_sentinels_for(self, cut: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """The tokens where `cut` is false, and one sentinel for each run where it is true."""
        first = cut.copy()
        first[:, 1:] &= ~cut[:, :-1]
        ids = np.where(first, self.first_sentinel + np.cumsum(first, axis=1) - 1, contexts.astype(np.int64))
        return ids[first | ~cut].reshape(len(contexts), -1)


def noise_mask(lengths: SpanLengths, rows: int, generator: np.random.Generator) -> np.ndarray:
    """Which tokens are noise, (rows, lengths.context): `lengths.spans` runs in each row, none at its beginning, one at
    its end."""
    # One draw for both, so that a row takes a whole number of numbers from the generator.
    numbers = generator.random((rows, lengths.context - 2))
    kept = _segments(numbers[:, : lengths.kept - 1], lengths.spans)
    noise = _segments(numbers[:, lengths.kept - 1 :], lengths.spans)
    runs = np.stack([kept, noise], axis=2).reshape(rows, 2 * lengths.spans)
    starts = np.zeros((rows, lengths.context), dtype=np.int64)
    np.put_along_axis(starts, np.cumsum(runs, axis=1)[:, :-1], 1, axis=1)
    return np.cumsum(starts, axis=1) % 2 == 1


def _segments(numbers: np.ndarray, segments: int) -> np.ndarray:
    """Cut n items into `segments` parts of at least one, uniformly among all ways; their sizes, (rows, segments).

    Args:
        numbers: one random number for each place between two items, (rows, n - 1); the smallest say where to cut.
        segments: at most n.
    """
    rows, places = numbers.shape
    cuts = np.sort(np.argsort(numbers, axis=1, kind="stable")[:, : segments - 1] + 1, axis=1)
    edges = np.concatenate([np.zeros((rows, 1), np.int64), cuts, np.full((rows, 1), places + 1)], axis=1)
    return np.diff(edges, axis=1)
