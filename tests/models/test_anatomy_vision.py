"""Encoders of images and spectrograms, and models of two towers: variants, heads, and which tower grows."""

from typing import Any

import pytest
import torch
import transformers

import auxin
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from outputs import output
from tiny_models import MODELS, InDouble, change, inputs, tiny

WIDER: list[tuple[str, dict[str, Any]]] = [
    ("hypercloning", {"factor": 2}),
    ("lemon", {"hidden_size": 24, "num_hidden_layers": 3}),
    ("lemon", {"hidden_size": 24, "padding": "zeros"}),
    ("net2net", {"intermediate_size": 20, "num_hidden_layers": 3}),
    ("llama-pro", {"group_size": 1}),
]
COPIES: list[tuple[str, dict[str, Any]]] = [
    ("hypercloning", {"factor": 2}),
    ("lemon", {"hidden_size": 32, "num_hidden_layers": 3}),
    ("llama-pro", {"group_size": 1}),
]
BLOCKS: list[tuple[str, dict[str, Any]]] = [
    ("altup", {"conversion": "copies"}),
    ("altup", {"conversion": "free"}),
]
VARIANTS: list[tuple[str, str | None, dict[str, Any], list[tuple[str, dict[str, Any]]]]] = [
    ("vit base", None, {}, [*WIDER, *BLOCKS, ("altup", {"conversion": "zeros"})]),
    ("vit base", None, {"pooler_output_size": 10, "qkv_bias": False}, WIDER[:2]),
    ("vit masked", None, {}, WIDER),
    ("deit", None, {}, [*WIDER, *BLOCKS]),
    ("deit", "DeiTForImageClassification", {}, WIDER[:2]),
    ("deit", "DeiTForMaskedImageModeling", {"encoder_stride": 4}, WIDER[:2]),
    ("deit", "DeiTModel", {}, WIDER[:2]),
    ("dinov2", None, {}, [*COPIES, *BLOCKS]),
    ("dinov2", "Dinov2Model", {"use_mask_token": False}, COPIES),
    ("dinov2", "Dinov2Backbone", {"out_features": ["stem", "stage1", "stage2"]}, COPIES),
    ("dinov2", "Dinov2Backbone", {}, COPIES),
    ("dinov2 gated", None, {}, [*COPIES, *BLOCKS]),
    ("dinov2_with_registers", "Dinov2WithRegistersModel", {}, COPIES),
    ("beit", None, {}, COPIES),
    ("beit", None, {"use_mean_pooling": False}, [*COPIES, *BLOCKS]),
    ("beit", None, {"layer_scale_init_value": 0.0}, WIDER[:2]),
    ("beit", "BeitModel", {"layer_scale_init_value": 0.0}, WIDER[:2]),
    (
        "beit",
        "BeitModel",
        {"use_shared_relative_position_bias": True, "use_relative_position_bias": False},
        COPIES,
    ),
    (
        "beit",
        "BeitForMaskedImageModeling",
        {"use_mask_token": True, "vocab_size": 19, "layer_scale_init_value": 0.0},
        WIDER[:2],
    ),
    ("audio-spectrogram-transformer", None, {}, COPIES),
    ("audio-spectrogram-transformer", "ASTModel", {}, WIDER),
    ("clip_text_model", None, {}, [*WIDER, *BLOCKS]),
    ("clip_text_model", "CLIPTextModel", {"eos_token_id": 2}, WIDER[:2]),
    ("clip_vision_model", None, {}, [("hypercloning", {"factor": 2}), ("lemon", {"hidden_size": 48})]),
    ("clip_vision_model", "CLIPVisionModel", {}, [("hypercloning", {"factor": 2}), ("llama-pro", {"group_size": 1})]),
    ("siglip_text_model", None, {}, [*WIDER, *BLOCKS]),
    ("siglip_vision_model", None, {}, [("hypercloning", {"factor": 2}), ("lemon", {"hidden_size": 40})]),
    ("siglip_vision_model", None, {"vision_use_head": False}, [("lemon", {"hidden_size": 40, "padding": "zeros"})]),
    ("siglip images", None, {}, [("lemon", {"hidden_size": 40, "num_hidden_layers": 4})]),
    ("clip images", None, {}, [("hypercloning", {"factor": 2, "part": "vision"})]),
]
"""Family, another class of its models, values of the config, and plans that keep its function."""


def made(family: str, model_class: str | None, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    usual, *rest = MODELS[family]
    chosen = getattr(transformers, model_class) if model_class else usual
    monkeypatch.setitem(MODELS, family, (chosen, *rest))
    return tiny(family, seed=5, **config)


def said(model: Any) -> torch.Tensor:
    """All that the model says, the old units of hidden states in front."""
    with torch.no_grad(), InDouble():
        result = model(**inputs(model))
    return result.feature_maps[-1].movedim(1, -1) if "feature_maps" in result else output(result)


@pytest.mark.parametrize(("family", "model_class", "config", "plans"), VARIANTS)
def test_variants_keep_their_function(family, model_class, config, plans, monkeypatch):
    for name, settings in plans:
        model = made(family, model_class, config, monkeypatch)
        before, count = said(model), model.num_parameters()
        plan = auxin.plan(model, name, **settings)
        auxin.apply(plan, model)
        assert plan.promise == "exact"
        assert model.num_parameters() > count
        assert change(before, said(model)[..., : before.shape[-1]]) < 1e-12, (name, settings)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("part", ["text", "vision", "text_model", "vision_model"])
def test_one_tower_grows_and_the_other_stays(family, part):
    model = tiny(family, seed=5)
    before, old = said(model), {name: value.shape for name, value in model.named_parameters()}
    config = getattr(model.config, f"{part.removesuffix('_model')}_config")
    wanted = {"hidden_size": 2 * config.hidden_size, "intermediate_size": 20, "num_hidden_layers": 4, "part": part}
    auxin.apply(auxin.plan(model, "lemon", **wanted), model)
    assert change(before, said(model)) < 1e-12
    tower, other = (f"{name}_model" for name in sorted(("text", "vision"), key=lambda name: name not in part))
    config = model.get_submodule(tower).config
    assert (config.hidden_size, config.intermediate_size) == (wanted["hidden_size"], 20)
    assert len(model.get_submodule(f"{tower}.encoder.layers")) == 4
    stays = {name: shape for name, shape in old.items() if name.startswith(f"{other}.")}
    # SigLIP compares what the head of the text tower gives with a pooled image, so that it grows with that.
    stays = {name: shape for name, shape in stays.items() if not name.startswith("text_model.head.")}
    assert stays == {name: model.get_parameter(name).shape for name in stays}


def test_what_a_projection_reads_is_padded_with_its_tower():
    model = tiny("clip", seed=5)
    before = said(model)
    auxin.apply(auxin.plan(model, "lemon", hidden_size=24, num_attention_heads=6, part="text"), model)
    assert change(before, said(model)) < 1e-12
    assert model.text_projection.weight.shape == (6, 24)
    assert model.visual_projection.weight.shape == (6, 24)
    assert model.config.text_config.hidden_size == 24
    assert model.config.text_config.layer_norm_eps < tiny("clip").config.text_config.layer_norm_eps


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_layers_are_added_to_both_towers_or_to_one(family):
    for part, depths in ((None, (4, 6)), ("vision", (2, 6)), ("text_model", (4, 3))):
        model = tiny(family, seed=5)
        before = said(model)
        auxin.apply(auxin.plan(model, "llama-pro", group_size=1, **({"part": part} if part else {})), model)
        assert change(before, said(model)) == 0
        assert (model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers) == depths


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("hypercloning", {"factor": 2}, "several towers .*Choose it: part = vision or part = text"),
        ("lemon", {"hidden_size": 48}, "several towers"),
        (
            "lemon",
            {"num_hidden_layers": 2, "part": "sound"},
            "part = 'sound' names no layers.*Choose part = vision or part = text",
        ),
        ("net2net", {"num_attention_heads": 8}, "several towers"),
        ("bert2bert", {"intermediate_size": 48, "part": "encoder"}, "several towers"),
        ("masked", {"num_attention_heads": 8}, "several towers"),
        ("ligo", {"intermediate_size": 48, "steps": 0}, "several towers"),
        ("altup", {"conversion": "copies"}, "several towers"),
        ("altup", {"conversion": "copies", "part": "vision"}, "vision_model.post_layernorm.*Ask for the conversion"),
        ("sequence-altup", {"layers": [1]}, "several towers"),
        ("lemon", {"hidden_size": 40, "part": "vision"}, r"pre_layrnorm.*whole copies are 24 and 48"),
    ],
)
def test_what_does_not_go_with_two_towers_is_said(method, settings, message):
    model = tiny("clip")
    with pytest.raises(PlanError, match=message):
        auxin.plan(model, method, **settings)


def test_a_part_that_chooses_nothing_is_refused():
    with pytest.raises(PlanError, match="part = 'encoder' chooses where layers are added, and none are asked for"):
        auxin.plan(tiny("t5"), "hypercloning", factor=2, part="encoder")
    with pytest.raises(PlanError, match="part = 'text' names no layers"):
        auxin.plan(tiny("clip images"), "hypercloning", factor=2, part="text")


def test_the_anatomy_of_all_towers_has_layers_and_no_widths():
    model = tiny("siglip")
    both, text = anatomy(model), anatomy(model, part="text")
    assert both.towers == ("vision", "text")
    assert [stack.length_field for stack in both.stacks] == [
        "vision_config.num_hidden_layers",
        "text_config.num_hidden_layers",
    ]
    assert not any(segments for role in both.roles for segments in role.axes)
    assert text.towers == ()
    assert [stack.path for stack in text.stacks] == ["text_model.encoder.layers"]
    along = {role.pattern for role in text.roles if any(role.axes)}
    assert all(pattern.startswith("text_model.") for pattern in along)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("siglip", "does not pass the angle between an image and a text"),
        ("dinov2", r"factors of its units \(dinov2.encoder.layer.\*.layer_scale1.lambda1\)"),
        ("audio-spectrogram-transformer", "classifier.layernorm, which norms what .*layernorm gives"),
    ],
)
def test_what_takes_whole_copies_alone_says_why(family, message):
    settings = {"hidden_size": 40, "part": "vision"} if family == "siglip" else {"hidden_size": 24}
    with pytest.raises(PlanError, match=message):
        auxin.plan(tiny(family), "lemon", **settings)


def test_images_that_are_pooled_by_one_call_grow_no_heads_behind_masks():
    with pytest.raises(PlanError, match=r"head\.attention, a MultiheadAttention, makes its heads and reads them"):
        auxin.plan(tiny("siglip_vision_model"), "masked", num_attention_heads=4)
    model = tiny("siglip_vision_model", seed=5)
    before = said(model)
    auxin.apply(auxin.plan(model, "masked", intermediate_size=20, layers=4), model)
    assert change(before, said(model)) < 1e-6


def test_gated_units_follow_the_hidden_size_as_the_architecture_rounds_them():
    model = tiny("dinov2 gated")
    auxin.apply(auxin.plan(model, "hypercloning", factor=2), model)
    assert model.dinov2.encoder.layer[0].mlp.gate_proj.out_features == 48  # two thirds of 64, in eights
    with pytest.raises(PlanError, match="works it out from the hidden size: 24"):
        auxin.plan(tiny("dinov2 gated"), "net2net", intermediate_size=48)
