"""The config says what a TokenFormer is, survives the disk and refuses the impossible."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig

import auxin.models  # noqa: F401 - registers the Auto classes
from auxin.errors import ConfigError
from auxin.models.tokenformer import PUBLISHED, TokenFormerConfig

groups = st.one_of(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=3))


@given(qkv=groups, proj=groups, ffn=groups, tied=st.booleans(), with_tau=st.booleans())
def test_survives_save_and_load(tmp_path_factory, qkv, proj, ffn, tied, with_tau):
    config = TokenFormerConfig(qkv_tokens=qkv, proj_tokens=proj, ffn_tokens=ffn, tie_word_embeddings=tied)
    if with_tau:
        config.ffn_tau = [1 / 3 + index for index in range(len(config.ffn_tokens))]
    directory = tmp_path_factory.mktemp("config")
    config.save_pretrained(directory)
    loaded = AutoConfig.from_pretrained(directory)
    assert isinstance(loaded, TokenFormerConfig)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.group_tau("ffn") == config.group_tau("ffn")


def test_a_new_model_has_no_norm_of_scores_and_rotates_whole_heads():
    config = TokenFormerConfig()
    assert [config.slot_score_function(slot) for slot in ("qkv", "proj", "ffn")] == ["gelu"] * 3
    assert (config.partial_rotary_factor, config.rotary_dim) == (1.0, 64)


@pytest.mark.parametrize("constants", [PUBLISHED, {}])
def test_a_saved_config_says_its_constants_whatever_later_defaults_are(constants, tmp_path):
    config = TokenFormerConfig(**constants)
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert {field: said[field] for field in PUBLISHED} == {field: getattr(config, field) for field in PUBLISHED}


def test_a_saved_config_has_these_fields_and_no_others():
    """What is there beside what every config has: checkpoints of all versions say these."""
    config = TokenFormerConfig(vocab_size=20, num_hidden_layers=1, qkv_tokens=[2, 3], ffn_tau=[2.0])
    every = PreTrainedConfig().to_dict()
    tokens = {"qkv_tokens": [2, 3], "proj_tokens": [768], "ffn_tokens": [3072]}
    unset = {f"{slot}_{what}": None for slot in ("qkv", "proj", "ffn") for what in ("tau", "eps", "score_function")}
    assert {field: value for field, value in config.to_dict().items() if field not in every} == {
        **unset,
        **tokens,
        "ffn_tau": [2.0],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "gelu": "erf",
        "hidden_size": 768,
        "initializer_range": 0.02,
        "key_initializer_range": None,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 1,
        "pad_token_id": None,
        "partial_rotary_factor": 1.0,
        "pattention_eps": 1e-06,
        "rope_theta": 10000.0,
        "score_function": "gelu",
        "tie_word_embeddings": True,
        "use_cache": True,
        "value_initializer_range": None,
        "vocab_size": 20,
    }


def test_an_int_is_one_group():
    config = TokenFormerConfig(qkv_tokens=7)
    assert config.qkv_tokens == [7]
    assert config.group_tau("qkv") == [math.sqrt(7)]


def test_a_saved_config_may_hold_ints(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tokenformer", "ffn_tokens": 12}))
    assert AutoConfig.from_pretrained(tmp_path).ffn_tokens == [12]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_attention_heads": 5}, "must divide hidden_size.*5 heads.*768"),
        ({"hidden_size": 0}, "hidden_size must be a positive whole number, received 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"qkv_tokens": -1}, "qkv_tokens.*-1"),
        ({"proj_tokens": []}, "proj_tokens.*empty list"),
        ({"ffn_tokens": [8, 0]}, "ffn_tokens.*0"),
        ({"ffn_tokens": [8, 8], "ffn_tau": [1.0]}, r"ffn_tau.*\(2\)"),
        ({"qkv_tau": [math.nan]}, "qkv_tau.*positive finite"),
        ({"qkv_tau": 3.0}, "qkv_tau must be a list of one number per group"),
        ({"proj_eps": [0.0]}, "proj_eps.*positive finite"),
        ({"ffn_tokens": [8, 8], "ffn_eps": [1e-6]}, r"ffn_eps.*\(2\)"),
        ({"score_function": "softmx"}, "Did you mean 'softmax'"),
        ({"proj_score_function": "softmx"}, "proj_score_function.*Did you mean 'softmax'"),
        *[({"initializer_range": value}, "initializer_range is a standard") for value in (None, "x", -1, True)],
        *[({"key_initializer_range": value}, "key_initializer_range is .*null") for value in (math.nan, [1], -0.1)],
        *[({"value_initializer_range": value}, "value_initializer_range is") for value in (math.inf, 10**400, "0.1")],
        ({"gelu": "exact"}, "gelu"),
        ({"hidden_size": 12, "num_attention_heads": 1, "partial_rotary_factor": 0.25}, "rotates 3, which must be even"),
        ({"hidden_size": 4, "num_attention_heads": 2, "partial_rotary_factor": 0.25}, "not zero"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
    ],
)
def test_says_what_is_wrong(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TokenFormerConfig(**wrong)
