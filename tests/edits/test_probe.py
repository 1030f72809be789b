"""The probe sees what a model computes, whatever it takes and says."""

import copy
import re

import pytest
import torch
from transformers import PerceiverConfig, PerceiverModel

from auxin.edits import Plan, ScaleParameter, apply
from auxin.edits.folder_executor import apply_to_checkpoint
from auxin.edits.probe import compared_outputs, default_probe, probe_outputs
from auxin.errors import PlanError, PromiseError
from tiny_kinds import KINDS, tiny_kind
from tiny_models import tiny


def scaled(module: str, factor: float, promise: str = "exact") -> Plan:
    edits = [ScaleParameter(parameter=f"{module}.weight", factor=factor)]
    return Plan(method="hand", promise=promise, edits=edits)


SEES = re.compile(r"(vision_tower.*layers|visual|projector).*(fc1|linear_1|mlp.0)$")
NOTHING = Plan(method="hand", promise="exact", edits=[])


@pytest.mark.parametrize("name", KINDS)
def test_a_change_anywhere_breaks_a_promise_and_none_keeps_it(name):
    model, kind = tiny_kind(name), KINDS[name]
    weights = copy.deepcopy(model.state_dict())
    for module in kind.parameters:
        assert apply(scaled(module, 1.0), model).max_relative_change == 0
        with pytest.raises(PromiseError, match=r"hand promised to keep the function, but the .* moved by"):
            apply(scaled(module, 2.0), model)
    assert all(torch.equal(tensor, weights[path]) for path, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Gemma3ForConditionalGeneration"]
)
def test_a_language_model_that_can_see_is_probed_with_images(name):
    model = tiny_kind(name)
    for parameter in model.parameters():
        if not parameter.any():  # Gemma's way from the images to the text begins at zero
            torch.nn.init.normal_(parameter, std=0.1)
    weights = copy.deepcopy(model.state_dict())
    seen = [path for path, _ in model.named_modules() if SEES.search(path)]
    for module in (seen[0], seen[-1]):
        assert apply(scaled(module, 1.0), model).unread == []
        with pytest.raises(PromiseError, match=r"hand promised to keep the function, but the logits moved by"):
            apply(scaled(module, 2.0), model)
    assert all(torch.equal(tensor, weights[path]) for path, tensor in model.state_dict().items())


def test_what_took_no_part_in_the_probe_is_said():
    model = tiny_kind("LlavaForConditionalGeneration")
    text = default_probe(NOTHING, model)
    module = "model.vision_tower.encoder.layers.1.mlp.fc1"
    with pytest.warns(UserWarning, match=rf"1 of the parameters .* \({module}.weight, .* the promise was not checked"):
        receipt = apply(scaled(module, 2.0), model, probe=text)
    assert receipt.unread == [f"{module}.weight"]
    assert receipt.max_relative_change == 0


def test_what_is_for_training_alone_is_told_without_a_warning(recwarn):
    model = tiny_kind("Wav2Vec2Model")
    receipt = apply(
        Plan(method="hand", promise="exact", edits=[ScaleParameter(parameter="masked_spec_embed", factor=2)]), model
    )
    assert receipt.unread == ["masked_spec_embed"]
    assert not [warning for warning in recwarn if "took no part" in str(warning.message)]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_drawn_and_what_is_compared(name):
    model, kind = tiny_kind(name), KINDS[name]
    probe = default_probe(NOTHING, model)
    assert {key: tuple(value.shape) for key, value in probe.items()} == kind.inputs
    outputs = probe_outputs(model, probe)
    assert set(outputs) == kind.outputs
    assert all(value.isfinite().all() for value in outputs.values())
    for key, value in outputs.items():
        # Another sample, another output: the probe is no constant. Scores of all pairs are one table.
        assert key == "mask" or len(value.flatten(1).unique(dim=0)) == 3, key


@pytest.mark.parametrize(
    "name", ["CLIPModel", "WhisperForConditionalGeneration", "ASTModel", "Wav2Vec2Model", "BertModel", "LlamaModel"]
)
def test_checkpoints_of_any_kind(name, tmp_path):
    tiny_kind(name).save_pretrained(tmp_path / "old")
    for module in KINDS[name].parameters:
        receipt = apply_to_checkpoint(scaled(module, 1.0), tmp_path / "old", tmp_path / f"kept {module}")
        assert receipt.max_relative_change == 0
        with pytest.raises(PromiseError, match="moved by"):
            apply_to_checkpoint(scaled(module, 2.0), tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["WhisperModel", "CLIPModel", "ViTModel"])
def test_numbers_have_the_type_of_the_model(name):
    model = tiny_kind(name, torch.bfloat16)
    receipt = apply(scaled(KINDS[name].parameters[0], 1.0), model)
    assert receipt.max_relative_change == 0
    assert {value.dtype for value in probe_outputs(model, default_probe(NOTHING, model)).values()} == {torch.bfloat16}


def test_a_model_that_returns_a_tuple_is_asked_for_names():
    model = tiny_kind("BertForQuestionAnswering", return_dict=False)
    assert isinstance(model(**default_probe(NOTHING, model)), tuple)
    assert set(probe_outputs(model, default_probe(NOTHING, model))) == {"start_logits", "end_logits"}


def test_hidden_states_under_a_head_are_no_part_of_the_function():
    one, pair = torch.ones(2, 3), (torch.ones(2), torch.ones(2))
    assert set(compared_outputs({"logits": one, "encoder_last_hidden_state": one, "loss": one.sum()})) == {"logits"}
    assert set(compared_outputs({"last_hidden_state": one, "hidden_states": pair, "ids": one.long()})) == {
        "last_hidden_state"
    }
    assert set(compared_outputs({"maps": pair, "of": {"last_hidden_state": one}})) == {
        "maps.0",
        "maps.1",
        "of.last_hidden_state",
    }
    assert set(compared_outputs(pair)) == {"output.0", "output.1"}
    assert set(compared_outputs(one)) == {"output"}


def test_only_logits_over_the_vocabulary_are_cut_to_one():
    model = tiny_kind("BertForPreTraining")
    probe = default_probe(NOTHING.model_copy(update={"vocabulary": 50}), model)
    assert probe["input_ids"].max() < 50
    outputs = probe_outputs(model, probe, vocabulary=50)
    assert outputs["prediction_logits"].shape == (3, 40, 50)
    assert probe_outputs(model, probe, vocabulary=1)["seq_relationship_logits"].shape == (3, 2)
    images = tiny_kind("ViTModel")
    pixels = default_probe(NOTHING.model_copy(update={"vocabulary": 1}), images)["pixel_values"]
    assert torch.equal(pixels, default_probe(NOTHING, images)["pixel_values"])
    assert probe_outputs(images, pixels, vocabulary=1)["pooler_output"].shape == (3, 32)


def test_a_classifier_without_padding_is_probed_with_one_sequence():
    model = tiny_kind("LlamaForSequenceClassification", pad_token_id=None)
    assert apply(scaled("model.layers.0.mlp.up_proj", 1.0), model).max_relative_change == 0
    with pytest.raises(PromiseError):
        apply(scaled("model.layers.0.mlp.up_proj", 2.0), model)


def test_what_a_model_draws_is_drawn_alike_and_the_caller_s_numbers_go_on():
    model = tiny_kind("ViTMAEModel")
    pixels = default_probe(NOTHING, model)["pixel_values"]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    mask = probe_outputs(model, pixels)["mask"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(probe_outputs(model, pixels)["mask"], mask)


def test_a_tensor_is_the_main_input():
    model = tiny_kind("Wav2Vec2Model")
    sound = torch.randn(2, 200)
    assert torch.equal(
        probe_outputs(model, sound)["last_hidden_state"],
        probe_outputs(model, {"input_values": sound})["last_hidden_state"],
    )


def test_a_probe_that_lacks_an_input_is_refused_and_says_how_to_give_one():
    plan, ids = scaled("text_projection", 1.0), torch.ones(2, 5, dtype=torch.long)
    message = r'CLIPModel does not run on the probe \(input_ids \[2, 5\]\): .*apply a probe .*: probe=\{"name": tensor'
    for probe in (ids, {"input_ids": ids}):
        with pytest.raises(PlanError, match=message):
            apply(plan, tiny_kind("CLIPModel"), probe=probe)
    t5 = tiny("t5")
    with pytest.raises(PlanError, match=r"T5ForConditionalGeneration does not run on the probe \(input_ids \[2, 5\]\)"):
        apply(NOTHING, t5, probe=ids % 19)
    with pytest.raises(PlanError, match=r"BertModel does not run on the probe \(input_ids \[2, 5\]\): IndexError"):
        apply(NOTHING, tiny_kind("BertModel"), probe=ids + 1000)
    with pytest.raises(PlanError, match=r"BertModel does not run on the probe \(input_ids \[\]\): AttributeError"):
        apply(NOTHING, tiny_kind("BertModel"), probe={"input_ids": [[1, 2]]})


def test_a_model_for_which_no_probe_is_known_names_its_input():
    sizes = {"num_latents": 4, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 1}
    model = PerceiverModel(PerceiverConfig(**sizes, num_self_attention_heads=4, num_cross_attention_heads=4))
    plan = scaled("encoder.self_attends.0.mlp.dense1", 1.0)
    with pytest.raises(PlanError, match=r"PerceiverModel.* main input is 'inputs'.*apply a probe: probe=\{\"inputs\""):
        apply(plan, model)
    assert apply(plan, model, probe={"inputs": torch.randn(2, 5, 32)}).max_relative_change == 0
