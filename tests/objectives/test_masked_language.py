"""Masked language modelling: what is hidden can be told from what is seen, in the shares of BERT's paper, and a tiny
BERT learns to name it."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BartConfig, BertConfig, RobertaConfig

from auxin.data import SampleForm
from auxin.errors import ConfigError
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.measures import Accuracy, Loss
from auxin.objectives.objective import IGNORED, held_out_noise
from auxin.training import train
from objectives.tiny_encoders import MASK, tiny_bert
from oracles.masked_language import hidden_count, mean_loss, restored, shown_shares, treatments
from training.tiny import CONTEXT, VOCABULARY, TinyData, checkpoint_bits, tiny_llama, tiny_settings, tiny_t5

FORM = TinyData().form
seeds = st.integers(0, 2**32)


def tiny_roberta(positions: int) -> RobertaConfig:
    """Its positions begin behind the padding's."""
    return RobertaConfig(vocab_size=400, hidden_size=12, num_hidden_layers=1, max_position_embeddings=positions)


def bound(form: SampleForm = FORM, **settings: object):
    config = BertConfig(vocab_size=400, max_position_embeddings=400)
    return MaskedLanguage(**settings).bind(config, form)


def texts(rows: int, length: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, vocabulary, (rows, length)).astype(np.uint16))


def test_samples_may_be_as_long_as_a_model_has_positions_for():
    assert MaskedLanguage().bind(tiny_roberta(CONTEXT + 2), FORM) is not None
    assert MaskedLanguage().bind(BertConfig(vocab_size=400, max_position_embeddings=CONTEXT), FORM) is not None


@given(
    rows=st.integers(1, 6),
    length=st.integers(2, 60),
    probability=st.floats(0.001, 0.999),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    seed=seeds,
)
def test_the_text_can_be_put_together_again_and_every_context_hides_as_many(rows, length, probability, shares, seed):
    form = replace(FORM, units=length, length=length)
    objective = bound(form, mask_probability=probability, mask_share=shares[0], random_share=shares[1])
    batch = texts(rows, length)
    before = batch.clone()
    inputs = objective.inputs({"input_ids": batch}, np.random.default_rng(seed))
    assert torch.equal(batch, before)
    for text, seen, labels in zip(batch.tolist(), inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
        assert restored(seen, labels, IGNORED) == text
        assert sum(label != IGNORED for label in labels) == min(hidden_count(length, probability), length)
        assert all(0 <= token < VOCABULARY or token == MASK for token in seen)
    assert objective.targets(inputs) == rows * min(hidden_count(length, probability), length)
    shapes = {name: value.shape for name, value in objective.example(rows).items()}
    assert {name: value.shape for name, value in inputs.items()} == shapes


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=seeds)
def test_batches_one_after_the_other_get_the_noise_that_they_get_together(sizes, seed):
    objective, batch, noise = bound(), texts(sum(sizes), CONTEXT), np.random.default_rng(seed)
    whole = objective.inputs({"input_ids": batch}, np.random.default_rng(seed))
    parts = [objective.inputs({"input_ids": part}, noise) for part in batch.split(sizes)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)


@pytest.mark.parametrize(("mask_share", "random_share"), [(0.8, 0.1), (0.3, 0.5), (1.0, 0.0), (0.0, 0.0)])
def test_what_is_done_to_hidden_tokens_has_the_shares_asked_for(mask_share, random_share):
    objective = bound(mask_probability=0.25, mask_share=mask_share, random_share=random_share)
    batch = texts(3000, CONTEXT)
    inputs = objective.inputs({"input_ids": batch}, np.random.default_rng(1))
    pairs = zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True)
    found = Counter(treatment for seen, labels in pairs for treatment in treatments(seen, labels, IGNORED, MASK))
    total = sum(found.values())
    assert total == 3000 * 4
    for treatment, share in shown_shares(mask_share, random_share, VOCABULARY).items():
        assert abs(found[treatment] / total - share) <= 5 * math.sqrt(share * (1 - share) / total)
    # Every place is hidden as often as any other.
    often = (inputs["labels"] != IGNORED).double().mean(0)
    assert (often - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 3000)


def test_random_tokens_are_any_of_the_tokenizers():
    objective = bound(mask_probability=0.9, mask_share=0.0, random_share=1.0)
    inputs = objective.inputs({"input_ids": texts(400, CONTEXT)}, np.random.default_rng(1))
    seen = inputs["input_ids"][inputs["labels"] != IGNORED]
    assert set(seen.tolist()) == set(range(VOCABULARY))


def test_a_tokenizer_that_has_a_mask_token_needs_no_other():
    form = replace(FORM, mask_token_id=7)
    settings = MaskedLanguage(mask_share=1.0, random_share=0.0)
    assert settings.extra_tokens(form) == 0
    assert settings.extra_tokens(FORM) == 1
    inputs = bound(form, mask_share=1.0, random_share=0.0).inputs({"input_ids": texts(9, CONTEXT)}, held_out_noise())
    assert set(inputs["input_ids"][inputs["labels"] != IGNORED].tolist()) == {7}


def test_the_loss_is_that_of_the_hidden_tokens_alone():
    model, objective = tiny_bert(seed=3).eval(), bound()
    inputs = objective.inputs({"input_ids": texts(5, CONTEXT)}, np.random.default_rng(2))
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits
        expected = mean_loss(logits.tolist(), inputs["labels"].tolist(), IGNORED)
        assert objective.loss(model, inputs).item() == pytest.approx(expected, rel=1e-6)
        assert objective.losses(model, inputs).mean().item() == pytest.approx(expected, rel=1e-6)


class Pairs(TinyData):
    """Contexts that repeat two tokens: whoever looks at the others knows each hidden one, 1 of 63 by chance."""

    def __init__(self) -> None:
        super().__init__(contexts=256)
        generator = np.random.default_rng(0)
        for rows in (self.train, self.validation):
            rows[:] = np.tile(generator.integers(0, VOCABULARY - 1, (len(rows), 2)), (1, CONTEXT // 2))


def test_a_bert_learns_to_name_what_is_hidden(tmp_path):
    data, model = Pairs(), tiny_bert()
    settings = tiny_settings(steps=300, batch_size=16, objective="masked_language")
    result = train(model, data, settings, tmp_path, measures=(Loss(), Accuracy()), progress=False)
    assert result.ledger.stages[-1].value_before > 0.9 * math.log(VOCABULARY)
    assert result.value < 0.2 * math.log(VOCABULARY)
    assert result.measures["accuracy"] > 0.9
    assert result.units == 300 * 16 * CONTEXT


def test_pieces_end_in_the_bits_of_the_whole(tmp_path):
    settings = tiny_settings(steps=6, objective="masked_language")
    alone = train(tiny_bert(dropout=0.1), TinyData(), settings, tmp_path / "alone", progress=False)
    train(tiny_bert(dropout=0.1), TinyData(), settings, tmp_path / "pieces", stop_after=4, progress=False)
    pieces = train(tiny_bert(dropout=0.1), TinyData(), settings, tmp_path / "pieces", progress=False)
    assert checkpoint_bits(alone.checkpoint) == checkpoint_bits(pieces.checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: tiny_llama().config, "'masked_language' is for encoders, and llama is a decoder.*objective: causal"),
        (lambda: tiny_bert(is_decoder=True).config, "bert is a decoder by its config.*is_decoder: false"),
        (lambda: tiny_t5().config, "t5 is an encoder-decoder.*objective: span_corruption"),
        (BartConfig, "bart is an encoder-decoder"),
        (lambda: tiny_bert(vocab_size=VOCABULARY).config, "no room for the 1 tokens that masked_language needs.*65"),
        (lambda: tiny_bert(max_position_embeddings=8).config, "context_length is 16, but .*_embeddings is 8"),
        (lambda: tiny_roberta(CONTEXT + 1), "context_length is 16, but .*is 17, which has room for 15 tokens"),
    ],
)
def test_models_that_can_not_learn_it_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        MaskedLanguage().bind(config(), FORM)


def test_data_and_settings_that_do_not_fit_are_refused():
    images = SampleForm("image", 1, ("pixel_values", "labels"))
    with pytest.raises(ConfigError, match="'masked_language' learns from packed text"):
        MaskedLanguage().bind(tiny_bert().config, images)
    with pytest.raises(ConfigError, match=r"mask_share \(0.8\) and random_share \(0.3\) are more than 1"):
        MaskedLanguage.parse({"random_share": 0.3})
    with pytest.raises(ConfigError, match="mask_probability"):
        MaskedLanguage.parse({"mask_probability": 0.0})
