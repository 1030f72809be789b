"""Batches of one's own are read by the model, or refused by place, field and value before anything runs."""

import pytest
import torch

import auxin
from auxin.errors import DataError
from auxin.objectives.calibration import Calibration
from tiny_models import inputs, labels, tiny

IDS = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([IDS, IDS + 100], r"Batch 1 \(from 0\): input_ids holds \d+, and the model's tokens are 0 to 18\. Give"),
        ([IDS - 19], r"Batch 0 \(from 0\): input_ids holds -\d+, and the model's tokens are 0 to 18"),
        ([IDS.float()], r"input_ids is of type torch\.float32, and ids are whole numbers"),
        ([IDS[0]], r"input_ids has shape \[7\]\. Give \(samples, tokens\)"),
        ([IDS[:, :0]], r"input_ids has shape \[2, 0\]"),
        ([IDS[:0]], r"first axis of its tensors \{'input_ids': 0\}.*at least one"),
        ([{"input_ids": IDS, "attention_mask": torch.ones(3, 7)}], r"\{'input_ids': 2, 'attention_mask': 3\}"),
        ([{"input_ids": IDS, "labels": None}], r"labels is None, and no tensor\. Give a tensor, or leave it out"),
        ([{"input_ids": IDS.tolist()}], r"input_ids is \[\[.*and no tensor"),
        (
            [{"input_ids": IDS, "labels": IDS + 19}],
            r"labels holds \d+, and the classes of this LlamaForCausalLM are 0 to",
        ),
        ([{"input_ids": IDS, "labels": IDS.float()}], r"labels is of type torch\.float32"),
        ([{"input_ids": IDS, "labels": IDS[:, :5]}], r"labels has shape \[2, 5\].*the shape \[2, 7\] of input_ids"),
        (["abc"], r"Batch 0 \(from 0\) is 'abc'\. Give token ids"),
        ([[1, 2, 3]], r"Batch 0 \(from 0\) is \[1, 2, 3\]\. Give token ids"),
        ("abc", r"The calibration data is 'abc'\. Give a list of batches"),
        (IDS, r"one tensor of shape \[2, 7\]\. Give a list of batches"),
        ([], r"has no batch\. Give at least one"),
    ],
)
def test_what_no_model_reads_is_refused_before_anything_runs(batches, words, monkeypatch):
    model = tiny("llama", dtype=torch.float32)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(DataError, match=words):
        auxin.plan(model, "taylor", ffn=0.5, data=batches)


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        (
            "llama_for_texts",
            torch.tensor([0, 5]),
            r"labels holds 5, and the classes of this LlamaForSequenceClass.* 0 to 2",
        ),
        ("llama_for_texts", torch.zeros(2, 7, dtype=torch.long), r"labels has shape \[2, 7\].*one for each sample"),
        ("wav2vec2", torch.full((2, 3), 19), r"labels holds 19, and the classes of this Wav2Vec2ForCTC are 0 to 18"),
    ],
)
def test_labels_that_the_loss_does_not_take_are_refused(family, given, words):
    model = tiny(family, **({"num_labels": 3} if family == "llama_for_texts" else {}))
    with pytest.raises(DataError, match=words):
        Calibration.of_batches(model, [{**inputs(model), "labels": given}])


def test_labels_of_other_tokens_than_the_decoder_reads_are_refused():
    model = tiny("bart")
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(DataError, match=r"labels has shape \[2, 7\], and decoder_input_ids \[2, 5\]. Give a label"):
        Calibration.of_batches(model, [{"input_ids": ids, "decoder_input_ids": ids, "labels": ids.new_zeros(2, 7)}])
    assert Calibration.of_batches(model, [{"input_ids": ids, "decoder_input_ids": ids, "labels": ids}]).samples == 2


def test_more_tokens_than_learnt_positions_are_refused_and_others_are_not():
    long = torch.zeros(1, 40, dtype=torch.long)
    with pytest.raises(DataError, match="input_ids has 40 tokens a sample, and the model has 32 positions"):
        Calibration.of_batches(tiny("gpt2"), [long])
    assert Calibration.of_batches(tiny("llama"), [long]).samples == 1


def test_images_are_numbers():
    model = tiny("vit")
    pixels = inputs(model)["pixel_values"].to(torch.uint8)
    with pytest.raises(DataError, match=r"pixel_values is of type torch\.uint8"):
        Calibration.of_batches(model, [{"pixel_values": pixels, "labels": labels(model)}])


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama_for_texts", torch.tensor([[0], [2]])),
        ("llama_for_texts", torch.rand(2, 3)),
        ("llama_for_texts", torch.tensor([-100, 1])),
        ("wav2vec2", torch.tensor([[1, 2, -100], [3, -100, -100]])),
    ],
)
def test_labels_of_every_kind_that_a_loss_takes_are_kept(family, given):
    model = tiny(family, **({"num_labels": 3} if family == "llama_for_texts" else {}))
    (batch,) = Calibration.of_batches(model, [{**inputs(model), "labels": given}]).batches()
    assert torch.equal(batch["labels"], given)
