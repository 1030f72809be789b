"""Span corruption in the loop: what is learnt, measured, counted, resumed and refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from auxin.accounting.flops import flops_per_token
from auxin.data import make_loader
from auxin.errors import ConfigError, DataError
from auxin.evaluation import generate_text, perplexity
from auxin.objectives.objective import training_noise
from auxin.objectives.span_corruption import SpanCorruption, SpanCorruptionObjective
from auxin.objectives.spans import noise_mask, span_lengths
from auxin.training import GuardSettings, TrainingSettings, train
from auxin.training.fit import check_fit
from oracles.span_corruption import corrupted
from training.tiny import (
    CONTEXT,
    SPANS,
    VOCABULARY,
    TinyData,
    checkpoint_bits,
    held_out_loss,
    poisoned_t5,
    read_metrics,
    tiny_llama,
    tiny_settings,
    tiny_t5,
)

LENGTHS = span_lengths(CONTEXT, 0.3, 2.0)
CORRUPTION = SpanCorruption.parse(SPANS["objective"])


def run(model, folder: Path, data: TinyData | None = None, stop_after: int | None = None, **changes: object):
    settings = tiny_settings(**{**SPANS, **changes})
    return train(model, data or TinyData(), settings, folder, stop_after=stop_after, progress=False)


def by_hand(model, contexts: np.ndarray, generator: np.random.Generator) -> float:
    """The mean loss of all targets, corrupted and shifted token by token."""
    masks = noise_mask(LENGTHS, len(contexts), generator)
    losses = []
    with torch.no_grad():
        for tokens, mask in zip(contexts.tolist(), masks.tolist(), strict=True):
            inputs, targets = corrupted(tokens, mask, VOCABULARY, 0)
            logits = model(
                input_ids=torch.tensor([inputs]), decoder_input_ids=torch.tensor([[0, *targets[:-1]]])
            ).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0].double(), torch.tensor(targets)).item())
    return float(np.mean(losses))


def test_a_t5_learns_to_write_what_was_cut_out(tmp_path):
    model, data = tiny_t5(), TinyData()
    result = run(model, tmp_path, data, steps=250, learning_rate=1e-2)
    # Who knows the sentinels and the end, and nothing of the text, guesses 5 of 8 tokens among 63.
    shape_alone = 5 / 8 * math.log(VOCABULARY - 1)
    assert result.ledger.stages[-1].value_before > shape_alone
    assert result.value < 0.7 * shape_alone
    scored = held_out_loss(model, data.validation, 3, objective=CORRUPTION)
    assert result.value == pytest.approx(scored, abs=1e-6)


def test_the_books_count_the_text_and_the_work_that_is_done(tmp_path):
    result = run(tiny_t5(), tmp_path, steps=5)
    assert result.units == 5 * 4 * CONTEXT
    inputs, targets = torch.zeros(1, LENGTHS.inputs).long(), torch.zeros(1, LENGTHS.targets).long()
    assert (inputs.shape[1], targets.shape[1]) == (16 - 5 + 2, 5 + 2 + 1)
    counted = flops_per_token(tiny_t5(), 1, encoder_length=13, decoder_length=8).training
    assert result.flops == pytest.approx(5 * 4 * counted)


def test_the_held_out_loss_is_that_of_targets_made_by_hand():
    model, rows = tiny_t5(seed=3), TinyData().validation
    expected = by_hand(model.eval(), rows, np.random.default_rng(0))
    for batch_size in (1, 3, 8, 100):
        assert held_out_loss(model, rows, batch_size, objective=CORRUPTION) == pytest.approx(expected, rel=1e-6)
    # Of some batches the first rows count, with the noise that they have among all.
    masks = noise_mask(LENGTHS, len(rows), np.random.default_rng(0))
    assert (noise_mask(LENGTHS, 2, np.random.default_rng(0)) == masks[:2]).all()
    some = held_out_loss(model, rows, 2, max_batches=1, objective=CORRUPTION)
    assert some == pytest.approx(by_hand(model, rows[:2], np.random.default_rng(0)), rel=1e-6)


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_each_step_learns_its_batch_with_the_noise_of_its_position(tmp_path, micro):
    """At a rate so small that the model stays as it is, the losses are those of a fresh one."""
    data = TinyData()
    run(tiny_t5(), tmp_path, data, steps=3, learning_rate=1e-12, seed=7, log_interval=1, micro_batch_size=micro)
    losses = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    batches = iter(make_loader(data.split("train"), 4, 7))
    for position, loss in enumerate(losses):
        noise = np.random.default_rng(np.random.SeedSequence(7, spawn_key=(position,)))
        assert loss == pytest.approx(by_hand(tiny_t5().eval(), next(batches)["input_ids"].numpy(), noise), rel=1e-5)
    assert len(losses) == 3


def test_pieces_end_in_the_bits_of_the_whole(tmp_path):
    alone = run(tiny_t5(dropout=0.1), tmp_path / "alone", steps=7)
    run(tiny_t5(dropout=0.1), tmp_path / "pieces", steps=7, stop_after=3)
    pieces = run(tiny_t5(dropout=0.1), tmp_path / "pieces", steps=7)
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)
    assert read_metrics(tmp_path / "alone") == read_metrics(tmp_path / "pieces")
    other = run(tiny_t5(dropout=0.1), tmp_path / "other", steps=7, seed=1)
    assert checkpoint_bits(alone.checkpoint) != checkpoint_bits(other.checkpoint)


def test_noise_follows_the_data_and_not_the_steps(tmp_path, monkeypatch):
    """Rewinds repeat steps and no batch: a batch's noise is that of its place in the data, each of which comes once."""
    drawn: list[int] = []
    seen: list[np.ndarray] = []
    inputs = SpanCorruptionObjective.inputs

    def noise(seed, position):
        drawn.append(position)
        return training_noise(seed, position)

    def recorded(self, batch, noise):
        if noise.bit_generator.seed_seq.spawn_key:  # that of held-out samples has no place
            seen.append(batch["input_ids"].numpy())
            assert noise.bit_generator.seed_seq.spawn_key == (drawn[-1],)
        return inputs(self, batch, noise)

    monkeypatch.setattr("auxin.training.loop.training_noise", noise)
    monkeypatch.setattr(SpanCorruptionObjective, "inputs", recorded)
    data, guard = TinyData(poisoned_rows=(5, 40)), GuardSettings(action="rewind", maximum_events=9)
    settings = tiny_settings(steps=17, checkpoint_interval=5, guard=guard, **SPANS)
    train(poisoned_t5(), data, settings, tmp_path, progress=False)
    assert drawn == list(range(len(seen)))
    assert len(seen) > 17
    batches = iter(make_loader(data.split("train"), 4, 0))
    assert all((contexts == next(batches)["input_ids"].numpy()).all() for contexts in seen)


def tiny_bart(positions: int) -> BartForConditionalGeneration:
    sizes = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY + 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tokens |= {"decoder_start_token_id": 0, "forced_eos_token_id": 0}
    return BartForConditionalGeneration(
        BartConfig(d_model=32, max_position_embeddings=positions, **sizes, **heads, **tokens)
    )


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        (tiny_t5, "causal", "objective: 'causal' is for decoders, and t5.*objective: span_corruption"),
        (tiny_llama, {}, "objective: 'span_corruption' is for encoder-decoders, and llama is none.*objective: causal"),
        (lambda: tiny_t5(vocab_size=65), {}, "vocab_size: 65 has no room for the 2 tokens.*vocab_size of 66"),
        (tiny_t5, {"noise_density": 0.03}, "context_length: 16 is too short for span corruption: noise_density 0.03"),
        (lambda: tiny_t5(decoder_start_token_id=None), {}, "decoder_start_token_id: the model's config has none"),
        (lambda: tiny_t5(eos_token_id=None), {}, "eos_token_id: the model's config has none"),
        (lambda: tiny_bart(12), {}, r"context_length is 16 \(13 after what span_corruption makes of it\), but.*is 12"),
    ],
)
def test_models_and_objectives_that_do_not_fit(tmp_path, model, objective, message):
    wanted = objective if isinstance(objective, str) else {**SPANS["objective"], **objective}
    with pytest.raises(ConfigError, match=message):
        train(model(), TinyData(), tiny_settings(steps=2, objective=wanted), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_positions_are_needed_for_what_is_left_of_a_context():
    model = tiny_bart(13)
    check_fit(model, CORRUPTION.bind(model.config, TinyData().form))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": "causal", "noise_density": 0.2}, "objective.noise_density: unknown field"),
        ({"noise_density": 0.2}, "objective.kind: required, but not given"),
        ({"kind": "span_corruption", "noise_density": 1.0}, "objective.noise_density: .*less than 1.*received 1.0"),
        ({"kind": "span_corruption", "mean_span_length": 0.5}, "objective.mean_span_length: .*received 0.5"),
        ("prefix", "objective.kind: .*'prefix'"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(objective, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings.parse({"steps": 1, "objective": objective})


def test_what_has_no_meaning_for_an_encoder_decoder_is_refused():
    with pytest.raises(DataError, match=r"encoder-decoder \(t5\), which continues no text"):
        generate_text(tiny_t5(), None, "a")
    with pytest.raises(DataError, match=r"encoder-decoder \(t5\).*probability of a whole one"):
        perplexity(tiny_t5(), None, "a", 8)
