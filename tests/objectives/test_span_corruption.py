"""Span corruption: nothing is lost, the counts are T5's, every way of cutting is as likely, and the seed decides."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from auxin.errors import ConfigError, DataError
from auxin.objectives.objective import held_out_noise, training_noise
from auxin.objectives.spans import SpanCutter, noise_mask, span_lengths
from oracles.span_corruption import all_masks, corrupted, noise_counts, number_of_masks, restored

FIRST, END = 1000, 0

lengths = st.builds(
    lambda context, density, mean: (context, density, mean),
    st.integers(4, 300),
    st.floats(0.05, 0.7),
    st.floats(1.0, 12.0),
)
seeds = st.integers(0, 2**63 - 1)


def corruption_of(context: int, density: float = 0.15, mean: float = 3.0) -> SpanCutter:
    try:
        return SpanCutter(span_lengths(context, density, mean), FIRST, END)
    except ConfigError:
        assume(False)
        raise


def contexts_of(corruption: SpanCutter, rows: int, seed: int = 0) -> np.ndarray:
    shape = (rows, corruption.lengths.context)
    return np.random.default_rng(seed).integers(0, FIRST, shape).astype(np.uint16)


@given(lengths, st.integers(1, 5), seeds, st.integers(0, 10**6))
def test_inputs_and_targets_are_those_made_by_hand_and_rebuild_the_context(sizes, rows, seed, position):
    corruption = corruption_of(*sizes)
    contexts = contexts_of(corruption, rows, seed % 97)
    inputs, targets = corruption.corrupt(contexts, training_noise(seed, position))
    assert inputs.shape == (rows, corruption.lengths.inputs)
    assert targets.shape == (rows, corruption.lengths.targets)
    assert inputs.dtype == targets.dtype == np.int64
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(position,)))
    masks = noise_mask(corruption.lengths, rows, generator)
    for row in range(rows):
        tokens = contexts[row].tolist()
        made = corrupted(tokens, masks[row].tolist(), FIRST, END)
        assert (inputs[row].tolist(), targets[row].tolist()) == made
        assert restored(*made, FIRST, END) == tokens


@given(lengths, seeds)
def test_every_context_has_the_share_of_noise_and_the_spans_of_t5(sizes, seed):
    corruption = corruption_of(*sizes)
    noise, spans = noise_counts(*sizes)
    masks = noise_mask(corruption.lengths, 7, np.random.default_rng(seed))
    starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert (masks.sum(axis=1) == noise).all()
    assert (starts.sum(axis=1) == spans).all()
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    inputs, targets = corruption.corrupt(contexts_of(corruption, 7), np.random.default_rng(seed))
    sentinels = np.arange(FIRST, FIRST + spans)
    for row in (*inputs, *targets):
        assert (row[row >= FIRST] == sentinels).all()
    assert (targets[:, 0] == FIRST).all()
    assert (targets[:, -1] == END).all()


def test_the_lengths_that_t5_is_known_for():
    """T5's inputs of 512 and targets of 114 tokens come from 568 tokens of text; it ends inputs with a token, too."""
    found = span_lengths(568)
    assert (found.inputs + 1, found.targets) == (512, 114)
    assert (found.noise, found.spans, found.kept) == (85, 28, 483)


def test_every_way_of_cutting_is_as_likely_as_the_others():
    found = span_lengths(10, 0.4, 2.0)
    assert (found.kept, found.noise, found.spans) == (6, 4, 2)
    masks = noise_mask(found, 15_000, np.random.default_rng(3))
    counts = Counter(map(tuple, masks.tolist()))
    ways = number_of_masks(6, 4, 2)
    assert counts.keys() == all_masks(6, 4, 2)
    assert len(counts) == ways == 15
    # Chi-square with 14 degrees of freedom: above 36 once in a thousand; the seed is fixed.
    expected = 15_000 / ways
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 36


@given(seeds, st.integers(0, 2**40))
def test_seed_and_position_decide_alone(seed, position):
    corruption = corruption_of(60)
    contexts = contexts_of(corruption, 4)
    first = corruption.corrupt(contexts, training_noise(seed, position))
    np.random.default_rng(0).random(3)
    again = corruption.corrupt(contexts, training_noise(seed, position))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for other in (
        corruption.corrupt(contexts, training_noise(seed, position + 1)),
        corruption.corrupt(contexts, training_noise(seed ^ 1, position)),
    ):
        assert (first[0] != other[0]).any()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_held_out_noise_does_not_depend_on_the_size_of_batches(sizes):
    corruption = corruption_of(50)
    contexts = contexts_of(corruption, sum(sizes))
    whole = corruption.corrupt(contexts, held_out_noise())
    generator = held_out_noise()
    parts = [corruption.corrupt(part, generator) for part in np.split(contexts, np.cumsum(sizes)[:-1].tolist())]
    for index in (0, 1):
        assert (np.concatenate([part[index] for part in parts]) == whole[index]).all()


@given(st.floats(0.01, 0.5))
def test_the_shortest_context_that_the_error_names_is_the_shortest(density):
    too_short = next(length for length in range(1, 1000) if round(length * density) >= 1) - 1
    with pytest.raises(
        ConfigError, match=rf"context_length: {too_short} is.*Give a context_length of {too_short + 1} "
    ):
        span_lengths(too_short, density)
    assert span_lengths(too_short + 1, density).noise == 1


def test_too_many_spans_are_refused():
    with pytest.raises(ConfigError, match=r"noise_density: 0\.8 with mean_span_length 1\.0 makes 80 spans.*keeps 20"):
        span_lengths(100, 0.8, 1.0)


def test_contexts_of_another_length_are_refused():
    corruption = corruption_of(50)
    with pytest.raises(DataError, match=r"expected \(batch, 50\)"):
        corruption.corrupt(np.zeros((2, 49), np.uint16), held_out_noise())
