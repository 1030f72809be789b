"""A part's config is the model's, also after later changes, but for its own values."""

import copy
import pickle

import pytest
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from auxin.models.scoped_config import ScopedConfig, config_at, own_values, scoped_config, unscoped
from tiny_models import tiny


def test_it_reads_and_writes_the_config_around_it_but_for_its_own_values():
    whole = LlamaConfig(hidden_size=16, intermediate_size=12, num_attention_heads=4)
    part = scoped_config(whole, {"intermediate_size": 6})
    assert isinstance(part, LlamaConfig)
    assert isinstance(part, ScopedConfig)
    assert (part.intermediate_size, whole.intermediate_size) == (6, 12)
    whole.hidden_size, whole._attn_implementation = 32, "eager"
    assert (part.hidden_size, part._attn_implementation) == (32, "eager")
    part.intermediate_size, part.rms_norm_eps, part._attn_implementation = 5, 0.5, "sdpa"
    assert (part.intermediate_size, whole.intermediate_size) == (5, 12)
    assert (whole.rms_norm_eps, whole._attn_implementation) == (0.5, "sdpa")
    assert part.to_dict() == {**whole.to_dict(), "intermediate_size": 5}
    assert [part.model_type, part.num_labels, part.get_text_config()] == ["llama", 2, part]
    with pytest.raises(AttributeError):
        part.nonsense  # noqa: B018


def test_other_names_of_values_are_known_and_values_add_up():
    whole = GPT2Config(n_embd=16, n_head=4)
    part = scoped_config(scoped_config(whole, {"hidden_size": 8}), {"n_head": 2})
    assert (part.n_embd, part.hidden_size, part.num_attention_heads) == (8, 8, 2)
    assert own_values(part) == {"n_embd": 8, "n_head": 2}
    assert unscoped(part) is whole
    assert unscoped(whole) is whole
    assert (whole.n_embd, whole.n_head) == (16, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_share_what_was_shared(copied):
    whole = LlamaConfig(intermediate_size=12)
    part = scoped_config(whole, {"intermediate_size": 6})
    other_part, other = copied((part, whole))
    assert unscoped(other_part) is other
    assert other is not whole
    other.use_cache = False
    assert (other_part.use_cache, part.use_cache, other_part.intermediate_size) == (False, True, 6)
    assert type(other_part) is type(part)


def test_the_config_at_a_module_is_that_of_the_innermost_one_around_it_that_has_one():
    model = tiny("t5")
    assert config_at(model, "decoder.block.0.layer.2.DenseReluDense") is model.decoder.config
    assert config_at(model, "decoder") is model.decoder.config is not model.config
    assert config_at(model, "lm_head") is model.config
    assert config_at(model, "") is model.config
    assert config_at(model, "decoder.block.0.inner.layer") is model.decoder.config
    assert isinstance(model.config, PreTrainedConfig)
