"""Which class a config is loaded as."""

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    CanineConfig,
    CLIPTextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from auxin.models.loading import initialisers, load_model, model_class_of, skeleton
from auxin.models.tokenformer import TokenFormerConfig
from tiny_kinds import KINDS, tiny_kind
from tiny_models import tiny


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), AutoModelForCausalLM),
        (TokenFormerConfig(), AutoModelForCausalLM),
        (T5Config(), AutoModelForSeq2SeqLM),
        (BertConfig(), AutoModelForMaskedLM),
        (AlbertConfig(), AutoModelForMaskedLM),
        (ViTConfig(), AutoModelForImageClassification),
        (CLIPTextConfig(), AutoModel),
        # What it was saved with goes first; what transformers does not have is left to the Auto classes.
        (BertConfig(architectures=["BertLMHeadModel"]), BertLMHeadModel),
        (BertConfig(architectures=["BertForSequenceClassification"]), BertForSequenceClassification),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), LlamaForSequenceClassification),
        (CanineConfig(), AutoModelForSequenceClassification),
        (ViTConfig(architectures=["ViTModel"]), ViTModel),
        (TokenFormerConfig(architectures=["TokenFormerForCausalLM"]), AutoModelForCausalLM),
        (LlamaConfig(architectures=["LlamaConfig"]), AutoModelForCausalLM),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_class_of_a_config(config, expected):
    assert model_class_of(config) is expected


def test_a_type_without_a_causal_head_is_built_and_loaded_as_what_it_is(tmp_path):
    model = tiny("vit")
    assert type(skeleton(model.config)) is ViTForImageClassification
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is ViTForImageClassification
    plain = model.config.__class__(**{**model.config.to_dict(), "architectures": None})
    assert type(skeleton(plain)) is ViTForImageClassification


@pytest.mark.parametrize("name", KINDS)
def test_a_skeleton_has_the_buffers_of_a_model_whatever_models_it_is_made_of(name):
    model = tiny_kind(name)
    made = dict(skeleton(model.config, type(model)).named_buffers())
    wanted = {path: buffer for path, buffer in model.named_buffers() if path not in model.state_dict()}
    assert all(torch.equal(made[path], buffer) for path, buffer in wanted.items())


def test_modules_are_initialised_by_the_innermost_model_that_holds_them():
    model = tiny_kind("LlavaModel")
    layers = model.vision_tower.encoder.layers
    for path, part in (("", model), ("vision_tower", model.vision_tower), ("vision_tower.encoder.layers", layers)):
        holders = {id(module): holder for module, holder in initialisers(model, path, part)}
        assert set(holders) == {id(module) for module in part.modules()}
        assert holders[id(layers[0].mlp)] is model.vision_tower
        assert holders[id(part)] is (model if path == "" else model.vision_tower)
