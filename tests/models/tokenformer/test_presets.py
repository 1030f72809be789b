"""The presets have the published models' parameter counts, to the unit."""

import pytest
import torch

from auxin.errors import ConfigError, PlanError
from auxin.models.tokenformer import (
    TokenFormerConfig,
    TokenFormerForCausalLM,
    VisionTokenFormerForImageClassification,
)
from auxin.models.tokenformer.presets import PRESETS, VISION_PRESETS, check_growable, preset_config
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


VISION = {"vit-b16-86m": 86_447_848, "vit-b16-115m": 114_759_400, "vit-l16-405m": 404_670_440}


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_counts_of_models_of_images(name):
    """With 1000 classes and images of 224 pixels: from shapes, from the config, and from the numbers themselves."""
    preset = VISION_PRESETS[name]
    with torch.device("meta"):
        model = VisionTokenFormerForImageClassification(preset_config(name))
    d, layers, n = preset.hidden_size, preset.num_hidden_layers, preset.tokens
    tokens = layers * 2 * d * (4 * n + 4 * n)
    rest = (3 * 16 * 16 * d + d) + d + (14 * 14 + 1) * d + 2 * d + (1000 * d + 1000)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == VISION[name] == tokens + rest == model.config.num_parameters()
    assert (model.config.layer_norm_eps, model.config.norm_parameters) == (1e-6, False)
    assert [model.config.slot_score_function(slot) for slot in SLOTS] == ["l2_norm_gelu"] * 3


def test_what_the_paper_s_counts_would_take():
    """109M and 407M are met to half a million by no token counts that are a ViT's widths."""
    for name, claimed, tokens in (("vit-b16-115m", 109e6, 5832), ("vit-l16-405m", 407e6, 8240)):
        preset = VISION_PRESETS[name]
        each = 2 * preset.num_hidden_layers * preset.hidden_size
        rest = VISION[name] - each * 8 * preset.tokens
        assert round((claimed - rest) / each) == pytest.approx(tokens, abs=2)


def test_growth_stages_of_models_of_images():
    check_growable("vit-b16-86m", "VIT-B16-115M")
    config = preset_config("vit-b16-86m")
    config.image_size, config.num_labels = 32, 10
    check_growable(config, "vit-b16-115m")
    config.patch_size = 8
    for pair, reason in (
        ((config, "vit-b16-115m"), r"patch_size 8 against 16"),
        (("vit-b16-115m", "vit-b16-86m"), "fewer parameter tokens"),
        (("vit-b16-115m", "vit-l16-405m"), "num_hidden_layers 12 against 24"),
        (("vit-b16-86m", "354m"), r"a vision_tokenformer, and the preset is a tokenformer. .*vit-b16-115m"),
        (("124m", "vit-b16-115m"), r"a tokenformer, and the preset is a vision_tokenformer. .*354m"),
    ):
        with pytest.raises(PlanError, match=reason):
            check_growable(*pair)


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
