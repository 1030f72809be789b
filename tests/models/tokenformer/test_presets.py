"""The presets have the published models' parameter counts, to the unit."""

import pytest
import torch

from auxin.errors import ConfigError, PlanError
from auxin.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM
from auxin.models.tokenformer.presets import PRESETS, check_growable, preset_config
from auxin.models.tokenformer.slots import SLOTS

PUBLISHED = {
    "124m": (84_934_656, 123_569_664),
    "354m": (315_555_840, 354_190_848),
    "757m": (715_161_600, 753_796_608),
    "1.4b": (1_271_070_720, 1_309_705_728),
    "owt2-354m": (301_989_888, 353_503_232),
    "owt2-757m": (704_643_072, 756_156_416),
    "pile-150m": (113_246_208, 151_881_216),
    "pile-450m": (402_653_184, 454_166_528),
    "pile-900m": (838_860_800, 903_252_480),
    "pile-1.5b": (1_509_949_440, 1_587_219_456),
}


@pytest.mark.parametrize("name", PRESETS)
def test_counts(name):
    with torch.device("meta"):
        model = TokenFormerForCausalLM(preset_config(name))
    parameters = dict(model.named_parameters())
    tokens = sum(parameter.numel() for key, parameter in parameters.items() if ".layers." in key)
    total = sum(parameter.numel() for parameter in parameters.values())
    assert (tokens, total) == PUBLISHED[name]
    assert model.config.num_parameters() == total


@pytest.mark.parametrize("name", PRESETS)
def test_constants_are_the_papers_and_not_a_new_models(name):
    config = preset_config(name)
    assert [config.slot_score_function(slot) for slot in SLOTS] == ["l2_norm_gelu"] * 3
    assert (config.partial_rotary_factor, config.gelu, config.layer_norm_eps) == (0.25, "erf", 1e-5)
    assert (config.initializer_range, config.key_initializer_range) == (0.02, None)


def test_rotary_dimensions_of_the_released_models():
    names = ("pile-150m", "pile-450m", "pile-900m", "pile-1.5b")
    assert [preset_config(name).rotary_dim for name in names] == [16, 16, 20, 24]


def test_untied_embeddings_count_twice():
    config = TokenFormerConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = TokenFormerForCausalLM(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_names_ignore_case_and_are_suggested():
    assert preset_config("1.4B").to_dict() == preset_config("1.4b").to_dict()
    with pytest.raises(ConfigError, match=r"Did you mean .*'354m'"):
        preset_config("345m")


@pytest.mark.parametrize("pair", [("124m", "354M"), ("354m", "757m"), ("124m", "1.4b"), ("owt2-354m", "owt2-757m")])
def test_growth_stages(pair):
    check_growable(*pair)
    check_growable(preset_config(pair[0]), pair[1])


def test_a_grown_model_grows_on():
    config = preset_config("354m")
    config.qkv_tokens, config.proj_tokens, config.ffn_tokens = [576, 1564], [576, 1564], [2304, 6256]
    check_growable(config, "757m")


def test_pile_models_are_not_stages_of_each_other():
    with pytest.raises(PlanError, match=r"hidden_size 768 against 1024.*not growth stages"):
        check_growable("pile-150m", "pile-450m")


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("757m", "354m"), "fewer parameter tokens.*truncate_groups"),
        (("354m", "354M"), "nothing to grow"),
        (("124m", "owt2-757m"), "num_hidden_layers 12 against 24.*same width"),
    ],
)
def test_refused_with_the_reason(pair, reason):
    with pytest.raises(PlanError, match=reason):
        check_growable(*pair)
