"""Where layers are, and what is zero in one that is an identity: found in any model, against what anatomies know."""

import pytest

from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.identity_outputs import zeroed_outputs
from auxin.models.layers import layer_paths
from auxin.models.layout import found_stacks, layer_stacks, tensors_by_layer
from auxin.models.loading import skeleton
from layered_models import layered, llava, pair
from tiny_models import FAMILIES, tiny


def on_meta(model):
    return skeleton(model.config, type(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stacks_that_are_found_are_those_that_anatomies_tell_of(family):
    model = on_meta(tiny(family))
    found, known = found_stacks(model), anatomy(model).stacks
    assert [stack.path for stack in found] == [stack.path for stack in known]
    for one, other in zip(found, known, strict=True):
        assert getattr(model.config, one.length_field) == getattr(model.config, other.length_field)
        assert one.length_field == other.length_field or one.length_field in (
            model.config.attribute_map.get(other.length_field),
            *(name for name, mapped in model.config.attribute_map.items() if mapped == other.length_field),
        )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "tokenformer"])
def test_the_outputs_that_are_found_are_those_that_anatomies_tell_of(family):
    model = on_meta(tiny(family))
    for found, known in zip(found_stacks(model), anatomy(model).stacks, strict=True):
        layers = range(len(model.get_submodule(found.path)))
        if known.norm_position == "after_residual":
            with pytest.raises(PlanError, match=r"identity block is impossible.*norm\(x \+ 0\) is not x"):
                zeroed_outputs(model, found, layers)
            continue
        zeroed = zeroed_outputs(model, found, layers)
        has = [{name for name, _ in layer.named_modules()} for layer in model.get_submodule(found.path)]
        has = set.union(*has) | {
            name for layer in model.get_submodule(found.path) for name, _ in layer.named_parameters()
        }
        assert zeroed.stack.norm_position == known.norm_position
        if known.norm_position == "after_output":
            assert set(zeroed.stack.output_norms) == set(known.output_norms)
            assert zeroed.gain_offset == anatomy(model).gain_offset
        else:
            assert set(zeroed.stack.outputs) == set(known.outputs) & has


@pytest.mark.parametrize(
    ("model", "stacks"),
    [
        (lambda: layered("bloom"), {"transformer.h": "num_hidden_layers"}),
        (lambda: layered("zamba2"), {"model.layers": "num_hidden_layers"}),
        (lambda: layered("gpt_neo"), {"transformer.h": "num_hidden_layers"}),
        (lambda: layered("classifier"), {"model.layers": "num_hidden_layers"}),
        (
            llava,
            {
                "model.vision_tower.encoder.layers": "vision_config.num_hidden_layers",
                "model.language_model.layers": "text_config.num_hidden_layers",
            },
        ),
        (
            pair,
            {
                "encoder.encoder.layer": "encoder.num_hidden_layers",
                "decoder.transformer.h": "decoder.num_hidden_layers",
            },
        ),
    ],
)
def test_stacks_are_found_with_the_values_that_count_them(model, stacks):
    assert {stack.path: stack.length_field for stack in found_stacks(on_meta(model()))} == stacks


def test_layers_are_numbered_through_all_stacks_of_any_model():
    model = on_meta(llava())
    paths = [f"model.vision_tower.encoder.layers.{number}" for number in range(3)]
    assert layer_paths(model) == (*paths, *(f"model.language_model.layers.{number}" for number in range(4)))
    assert [stack.path for stack in layer_stacks(on_meta(tiny("t5")))] == ["encoder.block", "decoder.block"]


def test_layers_that_share_their_weights_are_no_stack():
    with pytest.raises(PlanError, match=r"No stack.*share their weights: albert\.encoder.*1 modules run 4 times each"):
        found_stacks(on_meta(layered("albert")))


def test_what_scales_the_whole_stream_is_named_as_the_reason():
    model = on_meta(layered("gemma4_text"))
    with pytest.raises(PlanError, match=r"no set of output modules is found.*by layer_scalar, which no edit sets to 1"):
        zeroed_outputs(model, found_stacks(model)[0], [1])


def test_layers_that_do_not_run_with_the_model_run_with_their_part():
    model = on_meta(llava())
    images = found_stacks(model)[0]
    assert zeroed_outputs(model, images, [2]).stack.outputs == ("self_attn.out_proj", "mlp.fc2")


def test_tensors_outside_of_the_stack_hold_entries_of_its_layers():
    model = on_meta(layered("gemma4_text"))
    assert tensors_by_layer(model, "model.layers", [0, 0, 1, 2, 3]) == {
        "model.embed_tokens_per_layer.weight": (1, 8),
        "model.per_layer_model_projection.weight": (0, 8),
    }
    assert tensors_by_layer(model, "model.layers", [0, 1, 2, 3]) == {}
    assert tensors_by_layer(on_meta(layered("bloom")), "transformer.h", [0, 0, 1, 2, 3]) == {}
