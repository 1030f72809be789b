"""Vocabulary growth beside embedding and head: biases of the logits, also those that are buffers, and second tables."""

import copy
import math

import pytest
import torch
import transformers
from transformers import MarianConfig, MarianMTModel, PreTrainedModel

import auxin
from auxin.errors import PlanError
from auxin.methods.grow.vocabulary import VocabularyGrowth, plan_vocabulary
from auxin.models.loading import skeleton
from auxin.planning.token_tables import refuse_taken_ids
from oracles.vocabulary import new_rows, table_length
from tiny_models import inputs, tiny

LENGTH = 20
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PER_LAYER = {**SIZES, "vocab_size": LENGTH, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0}


def marian(bias: torch.Tensor | float) -> MarianMTModel:
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "max_position_embeddings": 32}
    model = MarianMTModel(MarianConfig(vocab_size=LENGTH, **heads, **ids, **layers)).eval()
    model.final_logits_bias.copy_(torch.as_tensor(bias))
    return model


def with_bias(kind: str, bias: torch.Tensor | float) -> tuple[PreTrainedModel, str]:
    """A model whose logits have `bias`, and where it is."""
    if kind == "buffer":
        return marian(bias), "final_logits_bias"
    model = tiny(kind, dtype=torch.float32, vocab_size=LENGTH)
    name = next(name for name, _ in model.named_parameters() if name.endswith(("predictions.bias", "lm_head.bias")))
    with torch.no_grad():
        model.get_parameter(name).copy_(torch.as_tensor(bias))
    return model, name


def of(model: PreTrainedModel, name: str) -> torch.Tensor:
    return model.state_dict()[name].flatten().double()


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("rule", ["pieces", "mean"])
@pytest.mark.parametrize("kind", ["buffer", "bert", "phi"])
def test_biases_of_new_tokens_come_as_their_rows_do(kind, rule, count):
    """In rows that were padding, with a bias that keeps them from being written, as behind the table."""
    first = LENGTH - 3
    bias = torch.randn(LENGTH, generator=torch.Generator().manual_seed(1)) - 20
    bias[first:] = -1e4
    model, name = with_bias(kind, bias)
    old = of(model, name)
    pieces = [[(3 * new + k) % first for k in range(new % 4)] for new in range(count)]
    auxin.apply(plan_vocabulary(model, first, pieces, VocabularyGrowth(rows=count, rule=rule, multiple=4)), model)
    new, size = of(model, name), table_length(LENGTH, first, count, 4)
    assert new.shape == (size,)
    expected = torch.tensor(new_rows(old[:, None].tolist(), first, pieces, rule), dtype=torch.float64).flatten()
    torch.testing.assert_close(new[first : first + count], expected, rtol=1e-6, atol=0)
    assert torch.equal(new[:first], old[:first])
    assert torch.equal(new[first + count : LENGTH], old[first + count :])
    mean = old[:first].mean().expand(size - max(LENGTH, first + count))
    torch.testing.assert_close(new[max(LENGTH, first + count) :], mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["buffer", "bert", "phi"])
def test_new_tokens_take_no_more_than_their_share_where_a_bias_was_learned(kind):
    """Jensen: the mean row with the mean bias has the mean logit."""
    model, _ = with_bias(kind, -20.0)
    batch = (
        inputs(model) if kind != "buffer" else dict.fromkeys(("input_ids", "decoder_input_ids"), torch.arange(8)[None])
    )
    with torch.no_grad():
        before = model(**batch).logits.log_softmax(-1)
        auxin.apply(auxin.plan(model, "vocabulary", rows=4, rule="mean", multiple=1), model)
        after = model(**batch).logits.log_softmax(-1)
    lost = (before - after[..., :LENGTH]).max().item()
    assert 0 < lost <= math.log(1 + 4 / LENGTH) + 1e-5


@pytest.mark.parametrize("within", [True, False])
def test_with_capped_logits_the_share_is_bounded_while_they_are_small(within):
    """exp(c tanh(z / c)) is convex up to z = c / 2 asinh(c), and the mean row of an untied head has the mean z."""
    cap, rows = 1.0, 1
    largest = cap / 2 * math.asinh(cap)
    model = tiny("gemma2", vocab_size=LENGTH, tie_word_embeddings=False, final_logit_softcapping=cap)
    batch = inputs(model)
    with torch.no_grad():
        raw = cap * torch.atanh(model(**batch).logits / cap)
        model.get_output_embeddings().weight.mul_(largest / raw.max() * (0.99 if within else 30))
        before = model(**batch).logits.log_softmax(-1)
        auxin.apply(auxin.plan(model, "vocabulary", rows=rows, rule="mean", multiple=1), model)
        lost = (before - model(**batch).logits.log_softmax(-1)[..., :LENGTH]).max().item()
    assert (lost <= math.log(1 + rows / LENGTH)) == within
    assert round(30 / 2 * math.asinh(30)) == 61  # Gemma 2


def per_layer(kind: str, length: int) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gemma3n":
        values = {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]}
        config = transformers.Gemma3nTextConfig(**PER_LAYER, **values, vocab_size_per_layer_input=length)
        model = transformers.Gemma3nForCausalLM(config)
    else:
        config = transformers.Gemma4TextConfig(**PER_LAYER, vocab_size_per_layer_input=length)
        model = transformers.Gemma4ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "length"), [("gemma3n", 20), ("gemma3n", 14), ("gemma3n", 32), ("gemma4", 20), ("gemma4", 22)]
)
@pytest.mark.parametrize("rule", ["pieces", "mean"])
def test_the_table_of_embeddings_per_layer_grows_along(kind, length, rule):
    """A Gemma 3n reads ids that its shorter second table lacks as token 0: old ones must go on so, new ones not."""
    first, count = 18, 5
    model = per_layer(kind, length)
    resized = copy.deepcopy(model)
    old = model.model.embed_tokens_per_layer.weight.detach().double()
    pieces = [[], [0, 17], [3], [5, 6, 7], [16, 1]]
    ids = torch.arange(first)[None]
    before = model(ids).logits
    plan = plan_vocabulary(model, first, pieces, VocabularyGrowth(rows=count, rule=rule, multiple=1))
    receipt = auxin.apply(plan, model)
    assert receipt.max_relative_change < 1e-6
    torch.testing.assert_close(model(ids).logits[..., :first], before[..., :first])
    table = model.model.embed_tokens_per_layer.weight.detach().double()
    assert model.config.vocab_size == 23
    assert model.config.vocab_size_per_layer_input == len(table) == max(23, length)
    known = min(first, length)
    assert torch.equal(table[:known], old[:known])
    assert torch.equal(table[known:first], old[:1].expand(first - known, -1))
    read = [[piece if piece < known else 0 for piece in rows] for rows in pieces]
    expected = torch.tensor(new_rows(old.tolist(), known, read, rule), dtype=torch.float64)
    torch.testing.assert_close(table[first : first + count], expected, rtol=1e-5, atol=1e-6)
    if length <= 23:
        resized.resize_token_embeddings(23, mean_resizing=False)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in resized.state_dict().items()}
        assert model.config.to_diff_dict() == resized.config.to_diff_dict()


def test_no_new_token_shares_the_embeddings_per_layer_of_token_0(tmp_path):
    per_layer("gemma3n", LENGTH).save_pretrained(tmp_path / "old")
    auxin.apply(
        auxin.plan(tmp_path / "old", "vocabulary", rows=3, multiple=1), tmp_path / "old", output=tmp_path / "new"
    )
    model = auxin.load(tmp_path / "new")
    with torch.no_grad():
        read = model.model.get_per_layer_inputs(torch.arange(LENGTH + 3))
    assert not any(torch.equal(read[new], read[0]) for new in range(LENGTH, LENGTH + 3))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            transformers.Gemma3nConfig(vision_config={"vocab_offset": 20}, audio_config={"vocab_offset": 24}),
            r"vision_config\.vocab_offset = 20 the model reads ids from there on as images .* go up to 22",
        ),
        (
            transformers.IdeficsConfig(vocab_size=LENGTH, additional_vocab_size=2),
            "additional_vocab_size = 2 the ids from 20 on are taken by other tokens of the model's",
        ),
        (
            transformers.InklingTextConfig(vocab_size=LENGTH, unpadded_vocab_size=18),
            "unpadded_vocab_size = 18 the model gives no logits behind these, .* go up to 22. Set .* to 23 or more",
        ),
    ],
)
def test_ids_that_a_model_takes_for_something_else_are_refused(config, said):
    with pytest.raises(PlanError, match=said):
        refuse_taken_ids(config, LENGTH + 3)
    refuse_taken_ids(config, 18)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.DeepseekV4Config(**SIZES, vocab_size=LENGTH), r"tid2eid \[20, 6\] holds whole numbers for the"),
        (
            transformers.InklingTextConfig(**SIZES, vocab_size=LENGTH, unpadded_vocab_size=20),
            "unpadded_vocab_size = 20",
        ),
    ],
)
def test_a_plan_for_such_a_model_is_refused(config, said):
    with pytest.raises(PlanError, match=said):
        auxin.plan(skeleton(config), "vocabulary", rows=3, multiple=1)
