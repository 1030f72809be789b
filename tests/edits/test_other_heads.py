"""An edited model keeps its edits in classes with another head, with none, and inside auxin where it gets a new one."""

import copy

import pytest
import torch
from transformers import AutoModel, BertForMaskedLM, BertModel, LlamaForCausalLM, LlamaModel

import auxin
from auxin.edits import Plan, ReplaceModule
from auxin.edits.structure import edited_skeleton, structural_edits
from auxin.errors import CheckpointError
from auxin.models.loading import load_config, load_with_new_head
from edits.replaced_linear import REPLACED
from tiny_models import inputs, tiny

EDITS = {
    "graft": {"tokens": 4},
    "masked": {"intermediate_size": 40},
    "altup": {},
    "sequence-altup": {"layers": [1], "stride": 2},
}


def edited(method, **settings):
    """A model of which every weight counts, so that one that is drawn anew is seen."""
    model = tiny("llama", dtype=torch.float32)
    auxin.apply(auxin.plan(model, method, **settings), model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def modules(model):
    return {name.removeprefix("model."): type(module) for name, module in model.named_modules() if name != "lm_head"}


def hidden(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize(("method", "settings"), EDITS.items())
def test_a_model_without_its_head_has_the_edits_and_keeps_them_when_it_is_saved(tmp_path, method, settings):
    model = edited(method, **settings)
    auxin.save(model, tmp_path / "saved")
    ids = inputs(model)["input_ids"]
    expected = hidden(model.model, ids)
    bare, found = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not found["missing_keys"]
    assert torch.equal(hidden(bare, ids), expected)
    auxin.save(bare, tmp_path / "bare")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "bare"), ids), expected)
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(hidden(whole.model, ids), expected)
    assert {type(module) for module in whole.modules()} == {type(module) for module in model.modules()}


def test_edits_are_stored_with_the_paths_of_the_class_that_has_them(tmp_path):
    model = edited("graft", tokens=4)
    auxin.save(model, tmp_path / "saved")
    bare = LlamaModel.from_pretrained(tmp_path / "saved")
    assert all(edit.module.startswith("model.layers") for edit in structural_edits(model.config))
    assert all(edit.module.startswith("layers") for edit in structural_edits(bare.config))
    # So that a further plan finds them.
    auxin.apply(auxin.plan(bare, "graft", tokens=2), bare)
    auxin.save(bare, tmp_path / "again")
    ids = inputs(model)["input_ids"]
    assert torch.equal(hidden(LlamaModel.from_pretrained(tmp_path / "again"), ids), hidden(bare, ids))


def test_edits_of_a_head_go_with_it(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    head = ReplaceModule(module="lm_head", brick="low_rank_linear", settings={"rank": 4})
    auxin.apply(Plan(method="by hand", promise="none", edits=[head]), model)
    auxin.save(model, tmp_path / "saved")
    bare = AutoModel.from_pretrained(tmp_path / "saved")
    assert structural_edits(bare.config) == []
    assert getattr(bare.config, "quantization_config", None) is None
    assert torch.equal(hidden(bare, inputs(model)["input_ids"]), hidden(model.model, inputs(model)["input_ids"]))


def test_an_edit_that_means_nothing_is_no_edit_that_was_done(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    auxin.apply(REPLACED, model)
    edits = model.config.quantization_config["edits"]
    model.config.quantization_config["edits"] = [{**edits[0], "module": "model.layers.7.mlp.down_proj"}]
    model.config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.down_proj .* could mean.*LlamaForCausalLM"):
        edited_skeleton(model.config)


@pytest.mark.parametrize(("method", "settings"), [("graft", {"tokens": 4}), ("masked", {"intermediate_size": 15})])
def test_an_encoder_that_gets_a_head_keeps_its_edits_and_all_its_weights(tmp_path, method, settings):
    model = tiny("bert", head="BertModel", dtype=torch.float32)
    auxin.apply(auxin.plan(model, method, **settings), model)
    auxin.save(model, tmp_path / "saved")
    config = load_config(tmp_path / "saved")
    wanted = copy.deepcopy(config)
    wanted.architectures = ["BertForSequenceClassification"]
    found, drawn = load_with_new_head(tmp_path / "saved", wanted, edited_skeleton(config))
    assert drawn == ["classifier.bias", "classifier.weight"]
    assert modules(found.bert).items() >= modules(model).items()
    masked = BertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert modules(masked.bert).items() >= {k: v for k, v in modules(model).items() if "pooler" not in k}.items()
    assert BertModel is type(model)
