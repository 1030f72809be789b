"""Vocabulary growth where a model reads and writes: what is one vocabulary grows on both sides, two are refused."""

import pytest
import torch
import transformers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, MarianConfig, MarianMTModel

import auxin
from auxin.errors import PlanError
from layered_models import pair
from tiny_models import tiny

SIZES = {
    "vocab_size": 20,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 19,
    "eos_token_id": 0,
    "decoder_start_token_id": 19,
    "forced_eos_token_id": 0,
}


def marian(**values):
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(**{**SIZES, **values})).eval()
    model.final_logits_bias.normal_()
    return model


def grown(model):
    return auxin.apply(auxin.plan(model, "vocabulary", rows=3, multiple=1), model)


def test_a_shared_vocabulary_is_told_on_both_sides_and_trains():
    model = marian()
    grown(model)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (23, 23)
    ids = torch.tensor([[20, 21, 22, 0]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert model.get_input_embeddings().weight.grad[20:].any()


@pytest.mark.parametrize("method", ["vocabulary", "stacking"])
def test_positions_that_are_never_saved_are_no_part_of_a_folder(method, tmp_path):
    marian().save_pretrained(tmp_path / "old")
    settings = {"rows": 3, "multiple": 1} if method == "vocabulary" else {"factor": 2}
    plan = auxin.plan(tmp_path / "old", method, **settings)
    auxin.apply(plan, tmp_path / "old", output=tmp_path / "new")
    model = auxin.load(tmp_path / "old")
    auxin.apply(plan, model)
    ids = torch.arange(10).view(2, 5)
    new = auxin.load(tmp_path / "new")
    assert torch.equal(
        new(input_ids=ids, decoder_input_ids=ids).logits, model(input_ids=ids, decoder_input_ids=ids).logits
    )


def test_encoder_and_decoder_of_one_vocabulary_grow_both():
    model = pair(torch.float32)
    length = model.config.encoder.vocab_size
    assert model.config.decoder.vocab_size == length
    grown(model)
    assert model.config.encoder.vocab_size == model.config.decoder.vocab_size == length + 3
    ids = torch.tensor([[length, length + 1, length + 2]])
    assert model(input_ids=ids, decoder_input_ids=ids).logits.shape[-1] == length + 3


def two_sizes():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny("bert").config,
        transformers.GPT2Config(vocab_size=103, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True),
    )
    return transformers.EncoderDecoderModel(config)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (two_sizes, r"encoder\.vocab_size = \d+ and decoder\.vocab_size = 103"),
        (lambda: marian(share_encoder_decoder_embeddings=False), "vocab_size = 20 and decoder_vocab_size = 20"),
    ],
)
def test_two_vocabularies_are_refused_by_name(make, said):
    with pytest.raises(PlanError, match=rf"with {said} reads tokens of one vocabulary and writes those of another"):
        auxin.plan(make(), "vocabulary", rows=3)


def test_what_a_model_takes_new_tokens_for_is_a_note():
    values = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPTextConfig(vocab_size=40, max_position_embeddings=16, eos_token_id=2, **values)
    (note,) = auxin.plan(CLIPTextModelWithProjection(clip), "vocabulary", rows=2).notes
    assert "pools a text at its largest id" in note
    clip.eos_token_id = 39
    assert auxin.plan(CLIPTextModelWithProjection(clip), "vocabulary", rows=2).notes == []
    (note,) = auxin.plan(tiny("whisper"), "vocabulary", rows=2).notes
    assert "return_timestamps = False" in note


def test_a_model_that_can_not_read_its_new_tokens_is_refused_and_stays():
    model = tiny("llama")
    plan = auxin.plan(model, "vocabulary", rows=3, multiple=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def reads_old_ones_alone(module, args, kwargs):
        if int(kwargs["input_ids"].max()) >= before["model.embed_tokens.weight"].shape[0]:
            raise IndexError("index out of range")

    hook = model.register_forward_pre_hook(reads_old_ones_alone, with_kwargs=True)
    with pytest.raises(PlanError, match=r"does not run on its new tokens: .*index out of range"):
        auxin.apply(plan, model)
    hook.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
