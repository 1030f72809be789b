"""A stand-in for a model class is the class to whoever uses it, and imports nothing before that."""

import subprocess
import sys

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from auxin.models.deferred import deferred, undeferred
from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel

MODELING = "auxin.models.tokenformer.modeling"
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def stand_in():
    return deferred(MODELING, "TokenFormerForCausalLM", TokenFormerConfig)


def test_it_builds_loads_and_recognises_models(stand_in, tmp_path):
    config = TokenFormerConfig(**SIZES, qkv_tokens=2, proj_tokens=2, ffn_tokens=2)
    model = stand_in(config)
    assert type(model) is TokenFormerForCausalLM
    assert type(stand_in._from_config(config)) is TokenFormerForCausalLM
    model.save_pretrained(tmp_path)
    assert type(stand_in.from_pretrained(tmp_path)) is TokenFormerForCausalLM
    assert isinstance(model, stand_in)
    assert not isinstance(model.model, stand_in)
    assert issubclass(TokenFormerForCausalLM, stand_in)
    assert not issubclass(TokenFormerModel, stand_in)


def test_it_has_the_names_that_are_looked_at(stand_in):
    assert (stand_in.__name__, stand_in.__module__) == ("TokenFormerForCausalLM", MODELING)
    assert stand_in.config_class is TokenFormerConfig
    assert stand_in.base_model_prefix == "model"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = stand_in.no_such_thing


def test_what_it_stands_for_is_found(stand_in):
    assert undeferred(stand_in) is TokenFormerForCausalLM
    assert issubclass(undeferred(stand_in), PreTrainedModel)
    assert undeferred(TokenFormerModel) is TokenFormerModel


def test_auto_classes_refuse_it_for_another_config(stand_in):
    with pytest.raises(ValueError, match="config_class"):
        AutoModelForCausalLM.register(LlamaConfig, stand_in)


def test_once_the_code_is_there_auto_classes_know_the_classes_themselves():
    assert MODEL_MAPPING[TokenFormerConfig] is TokenFormerModel
    assert MODEL_FOR_CAUSAL_LM_MAPPING[TokenFormerConfig] is TokenFormerForCausalLM


CHANGE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import auxin
from auxin.edits.structure import other_architecture
sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**sizes))
assert "auxin.models.tokenformer.modeling" not in sys.modules
config, model_class = other_architecture(model, "tokenformer", {})
print(model_class.__mro__[1].__name__, config.hidden_size)
"""


def test_a_plan_that_makes_such_a_model_gets_the_class_itself():
    done = subprocess.run([sys.executable, "-c", CHANGE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["TokenFormerPreTrainedModel", "16"]
