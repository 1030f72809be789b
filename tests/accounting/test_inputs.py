"""Made-up inputs fit the models that take them, whatever they take, and costs are counted on them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PerceiverConfig, PerceiverModel, ResNetConfig

from auxin.accounting import flops_per_token, training_memory
from auxin.accounting.flops import countable_kernels
from auxin.accounting.inputs import example_inputs, image_shape, text_length, text_positions
from auxin.errors import ConfigError, PlanError
from tiny_kinds import DECODER_VOCABULARY, END, IMAGE_TOKEN, KINDS, VOCABULARY, tiny_kind
from tiny_models import tiny


@pytest.mark.parametrize("name", KINDS)
def test_models_run_on_their_inputs(name):
    model = tiny_kind(name)
    inputs = example_inputs(model, 2, 9, seed=1)
    model(**inputs)
    assert all(len(value) == 2 for value in inputs.values())
    assert all(torch.equal(value, inputs[key]) for key, value in example_inputs(model, 2, 9, seed=1).items())
    zeros = example_inputs(model, 2, 9)
    assert {key: value.shape for key, value in zeros.items()} == {key: value.shape for key, value in inputs.items()}


@pytest.mark.parametrize("frames", [1, 7, 64])
def test_a_waveform_has_as_many_samples_as_its_frames_need(frames):
    model = tiny_kind("Wav2Vec2ForCTC")
    samples = example_inputs(model, 1, frames)["input_values"].shape[1]
    assert model._get_feat_extract_output_lengths(samples) == frames
    assert model._get_feat_extract_output_lengths(samples - 1) == frames - 1


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection"])
def test_texts_that_are_pooled_at_their_end_have_one(name):
    ids = example_inputs(tiny_kind(name), 50, 24, seed=0)["input_ids"]
    assert torch.equal((ids == END).nonzero(), torch.tensor([[row, 23] for row in range(50)]))


def test_early_clips_pool_at_the_largest_id():
    model = tiny_kind("CLIPTextModel", eos_token_id=2)
    ids = example_inputs(model, 50, 24, seed=0)["input_ids"]
    assert torch.equal(ids.argmax(-1), torch.full((50,), 23))
    # Through the attention of the last position every token is seen.
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % (VOCABULARY - 1)
    assert not torch.allclose(model(ids).pooler_output, model(other).pooler_output)


def test_token_ids_are_those_that_stand_for_themselves_and_stay_in_their_vocabulary():
    ids = example_inputs(tiny_kind("LlavaForConditionalGeneration"), 50, 64, seed=0)["input_ids"]
    assert set(ids.flatten().tolist()) == set(range(VOCABULARY)) - {IMAGE_TOKEN}
    both = example_inputs(tiny_kind("EncoderDecoderModel"), 50, 64, seed=0)
    assert (both["input_ids"].max(), both["decoder_input_ids"].max()) == (VOCABULARY - 1, DECODER_VOCABULARY - 1)
    for name, values in (("BertModel", {}), ("CLIPTextModel", {"eos_token_id": 2}), ("WhisperModel", {})):
        few = example_inputs(tiny_kind(name, **values), 50, 20, seed=0, vocabulary=10)
        assert max(value.max() for key, value in few.items() if key.endswith("ids")) == 9


def test_ids_of_language_models_are_plain_draws():
    drawn = torch.randint(19, (3, 7), generator=torch.Generator().manual_seed(4))
    for family in ("llama", "bert", "t5"):
        assert torch.equal(example_inputs(tiny(family), 3, 7, seed=4)["input_ids"], drawn)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("RobertaForMaskedLM", (38, 38)),
        ("BertModel", (40, 40)),
        ("XLNetLMHeadModel", (64, 64)),
        ("WhisperModel", (64, 20)),
        ("EncoderDecoderModel", (40, 20)),
        ("LlavaModel", (64, 64)),
        ("CLIPModel", (24, 24)),
    ],
)
def test_positions_that_a_model_has(name, lengths):
    model = tiny_kind(name)
    assert (text_length(model, 64), text_length(model, 64, decoder=True)) == lengths
    assert text_length(model, 3) == 3
    assert lengths[0] == 64 or text_positions(model) == lengths[0]


def test_positions_without_a_bound_are_none():
    assert text_positions(tiny_kind("XLNetLMHeadModel")) is None


def test_numbers_have_the_type_of_the_model():
    for name in ("ViTModel", "WhisperModel", "ASTModel", "Wav2Vec2Model"):
        model = tiny_kind(name, torch.float16)
        assert example_inputs(model, 1, 5, seed=0)[model.main_input_name].dtype == torch.float16


def test_what_can_not_be_made_is_named():
    sizes = {"num_latents": 4, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 1}
    model = PerceiverModel(PerceiverConfig(**sizes, num_self_attention_heads=4, num_cross_attention_heads=4))
    with pytest.raises(PlanError, match=r"No inputs of a PerceiverModel .* main input is 'inputs'.*apply a probe"):
        example_inputs(model, 1, 5)
    with pytest.raises(ConfigError, match="image_size: the config of resnet does not say"):
        image_shape(ResNetConfig())
    assert image_shape(ResNetConfig(), 32) == (3, 32, 32)


COUNTED = {
    "ASTForAudioClassification": 1,
    "ASTModel": 1,
    "WhisperForConditionalGeneration": 1,
    "WhisperModel": 1,
    "CLIPModel": 1,
    "SiglipModel": 1,
    "VisionEncoderDecoderModel": 1,
    "VideoMAEModel": 1,
    "Wav2Vec2ForCTC": 9,
    "Wav2Vec2Model": 9,
    "HubertModel": 9,
    "BertModel": 9,
    "XLNetLMHeadModel": 9,
    "LlavaForConditionalGeneration": 9,
}
"""Models, and the units of one sample of 9 tokens or frames."""


@pytest.mark.parametrize("name", COUNTED)
def test_flops_agree_with_a_counted_real_pass(name):
    model = tiny_kind(name)
    with FlopCounterMode(display=False) as counter, countable_kernels(model):
        model(**example_inputs(model, 1, 9, seed=0))
    counted = flops_per_token(model, 9)
    assert counted.forward == counter.get_total_flops() / COUNTED[name] > 0


MEASURED = [
    "ASTForAudioClassification",
    "WhisperForConditionalGeneration",
    "VisionEncoderDecoderModel",
    "CLIPModel",
    "BertModel",
    "BertForQuestionAnswering",
    "LlamaModel",
]


@pytest.mark.parametrize("name", MEASURED)
def test_training_memory_is_what_a_real_step_saves(name):
    model = tiny_kind(name)
    inputs = example_inputs(model, 3, 9, seed=0)
    if name in ("ASTForAudioClassification", "WhisperForConditionalGeneration", "VisionEncoderDecoderModel"):
        inputs["labels"] = torch.zeros(model(**inputs).logits.shape[:-1], dtype=torch.long)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    held = []

    def keep(tensor):
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(**inputs)
    length = None if name.startswith("AST") else 9
    assert training_memory(model, 3, length).activations == pytest.approx(sum(storages.values()), rel=0.1)


def test_memory_needs_a_length_where_the_size_of_an_input_follows_it():
    for name in ("WhisperModel", "CLIPModel", "Wav2Vec2Model", "BertModel"):
        with pytest.raises(ConfigError, match="sequence_length: needed"):
            training_memory(tiny_kind(name), 2)


def test_what_looks_at_values_can_not_be_counted_on_shapes():
    with pytest.raises(ConfigError, match=r"BartForSequenceClassification can't be counted on shapes alone"):
        flops_per_token(tiny_kind("BartForSequenceClassification"), 9)
    with pytest.raises(ConfigError, match=r"Wav2Vec2ForCTC can't be counted on shapes alone"):
        training_memory(tiny_kind("Wav2Vec2ForCTC"), 2, 64)
