"""Growth in depth of architectures that no anatomy describes: stacks and outputs are found."""

import pytest
import torch

from auxin.edits import apply
from auxin.errors import PlanError
from auxin.methods.grow.llama_pro import BlockExpansion, plan_block_expansion
from auxin.methods.grow.solar import DepthUpscaling, plan_depth_upscaling
from auxin.methods.grow.stacking import LayerStacking, plan_stacking
from auxin.models.loading import skeleton
from layered_models import ids, layered, llava, logits, moved, pair

EXPANDED = [
    "qwen3_moe",
    "dots1",
    "deepseek_v3",
    "ernie4_5_moe",
    "llama4_text",
    "bamba",
    "qwen3_next",
    "recurrent_gemma",
]
EXPANDED += ["gpt_neo", "minicpm3", "lfm2", "gemma3_text", "bloom", "classifier"]


def expanded(model, **settings):
    return plan_block_expansion(model, BlockExpansion.parse(settings))


def stacked(model, **settings):
    return plan_stacking(model, LayerStacking.parse(settings))


@pytest.mark.parametrize("name", EXPANDED)
def test_identity_blocks_keep_the_function_to_the_last_bit(name):
    model = layered(name)
    before = logits(model)
    plan = expanded(skeleton(model.config, type(model)), group_size=2)
    assert apply(plan, model, probe=ids(model)).max_relative_change == 0.0
    assert torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == 6
    named = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
    result = model(**ids(model), use_cache=False).logits.square().sum()
    result.backward()
    path = plan.edits[0].layers
    woken = [name for name, parameter in named.items() if name.startswith(f"{path}.2.") and parameter.grad is not None]
    zeroed = {edit.parameter for edit in plan.edits[1:]}
    assert {name for name in woken if bool(named[name].grad.any())} <= zeroed
    assert any(bool(named[name].grad.any()) for name in woken), "what is zeroed learns"


@pytest.mark.parametrize(
    "name", ["llama4_text", "bamba", "qwen3_next", "gpt_neo", "minicpm3", "lfm2", "roberta", "bloom"]
)
def test_stacked_layers_are_the_old_ones(name):
    model = layered(name)
    plan = stacked(skeleton(model.config, type(model)), factor=2)
    types = getattr(model.config, "layer_types", None)
    said = {"num_hidden_layers": 8, "layer_types": 2 * types if isinstance(types, list) else []}
    expected = logits(moved(model, plan.edits[0].layers, [0, 1, 2, 3, 0, 1, 2, 3], said))
    apply(plan, model, probe=ids(model))
    assert torch.equal(logits(model), expected)


def test_slices_of_found_stacks_may_be_scaled():
    model = layered("bloom")
    before = logits(model)
    slices = [[0, 2], {"layers": [0, 2], "scale": 0}, [2, 4]]
    plan = plan_depth_upscaling(model, DepthUpscaling.parse({"slices": slices}))
    assert plan == plan_depth_upscaling(skeleton(model.config, type(model)), DepthUpscaling.parse({"slices": slices}))
    assert plan.promise == "exact"
    apply(plan, model, probe=ids(model))
    assert torch.equal(logits(model), before)


def test_one_part_of_a_model_is_grown():
    model = llava()
    before = logits(model)
    apply(expanded(model, group_size=2, part="language_model"), model, probe=ids(model))
    assert (model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers) == (6, 3)
    assert torch.equal(logits(model), before)
    both = pair()
    before = logits(both)
    apply(expanded(both, group_size=4, part="decoder"), both, probe=ids(both))
    assert (both.config.encoder.num_hidden_layers, both.config.decoder.num_hidden_layers) == (4, 5)
    assert torch.equal(logits(both), before)


@pytest.mark.parametrize("part", ["language_model", "model.language_model", "model.language_model.layers"])
def test_a_part_may_be_named_by_its_path(part):
    assert (
        expanded(llava(), group_size=2, part=part).edits == expanded(llava(), group_size=2, part="language_model").edits
    )


def test_a_refusal_says_the_words_for_each_part():
    words = r"part = vision_tower or part = language_model"
    with pytest.raises(PlanError, match=rf"part = 'text' names no layers .* Choose {words}\."):
        expanded(llava(), group_size=2, part="text")
    # Three layers here and four there.
    with pytest.raises(PlanError, match=rf"the 3 layers of .* For one stack alone, choose {words}\."):
        expanded(llava(), layers=8)
    with pytest.raises(PlanError, match=r"the 3 layers of [^ ]* can't be expanded .*[0-9]\.$"):
        expanded(llava(), layers=7, part="vision_tower")


@pytest.mark.parametrize(
    ("name", "plan", "settings", "message"),
    [
        ("roberta", expanded, {"group_size": 2}, r"identity block is impossible.*norm\(x \+ 0\) is not x"),
        ("gemma4_text", expanded, {"group_size": 2}, "no set of output modules is found.*layer_scalar"),
        ("albert", stacked, {"factor": 2}, r"share 1 set\(s\) of parameters"),
        ("dots1", stacked, {"factor": 2}, r"first_k_dense_replace = 1 .*they would be 0, 4, and no value"),
        ("jamba", expanded, {"group_size": 1}, "attn_layer_period = 2, attn_layer_offset = 1"),
        ("bloom", stacked, {"factor": 2, "part": "decoder"}, r"part = 'decoder' names no layers.*transformer\.h"),
    ],
)
def test_the_impossible_is_refused_with_the_reason(name, plan, settings, message):
    model = layered(name)
    with pytest.raises(PlanError, match=message):
        plan(skeleton(model.config, type(model)), **settings)
