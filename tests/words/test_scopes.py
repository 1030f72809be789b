"""Widths by scope: the innermost one that encloses a place holds."""

import pytest

from auxin.words.paths import encloses, innermost
from auxin.words.roles import Axes, Segment
from auxin.words.widths import Sizes, Width

EXPERTS = "model.layers.*.mlp.experts"
SIZES = Sizes(16, 4, 2, 4, 12).with_widths(
    [
        Width("ffn", "decoder.block", 6),
        Width("ffn", "decoder.block.1", 3),
        Width("query", "decoder.block.1", 2),
        Width("ffn", EXPERTS, 8),
    ]
)


@pytest.mark.parametrize(
    ("scope", "path", "holds"),
    [
        ("", "model.layers.3", True),
        ("", "", True),
        ("model.layers.3", "model.layers.3", True),
        ("model.layers.3", "model.layers.3.mlp.up_proj", True),
        ("model.layers.3", "model.layers.31", False),
        ("model.layers.3", "model.layers", False),
        ("model.layers.3", "model.layers.*.mlp", False),
        ("model.layers", "model.layers.*.mlp", True),
        (EXPERTS, "model.layers.3.mlp.experts.gate_up_proj", True),
        (EXPERTS, EXPERTS, True),
        (EXPERTS, "model.layers.3.mlp.gate", False),
    ],
)
def test_a_scope_encloses_what_lies_in_it(scope, path, holds):
    assert encloses(scope, path) == holds


def test_the_innermost_scope_has_the_most_parts_and_then_the_fewest_stars():
    scopes = ["", "model.layers", "model.layers.3", "model.layers.*.mlp", "model.layers.3.mlp"]
    assert innermost("model.layers.3.mlp.up_proj", scopes) == "model.layers.3.mlp"
    assert innermost("model.layers.4.mlp.up_proj", scopes) == "model.layers.*.mlp"
    assert innermost("model.layers.3.self_attn", scopes) == "model.layers.3"
    assert innermost("model.layers.4.self_attn", scopes) == "model.layers"
    assert innermost("lm_head", scopes) == ""


@pytest.mark.parametrize(
    ("stream", "scope", "units"),
    [
        ("ffn", "", 12),
        ("ffn", "encoder.block.0", 12),
        ("ffn", "decoder.block", 6),
        ("ffn", "decoder.block.0", 6),
        ("ffn", "decoder.block.1", 3),
        ("ffn", "model.layers.7.mlp.experts", 8),
        ("ffn", "model.layers.7.mlp", 12),
        ("query", "decoder.block.1", 2),
        ("query", "decoder.block.0", 4),
        ("key_value", "decoder.block.1", 2),
        ("residual", "decoder.block.1", 16),
        ("vocabulary", "", None),
    ],
)
def test_units_are_those_of_the_innermost_scope(stream, scope, units):
    assert SIZES.units(stream, scope) == units


def test_the_sizes_at_a_scope_are_those_of_a_model_of_its_own():
    assert SIZES.at("decoder.block.1") == Sizes(16, 2, 2, 4, 3)
    assert SIZES.at("decoder.block.0") == Sizes(16, 4, 2, 4, 6)
    assert SIZES.at("") == Sizes(16, 4, 2, 4, 12)
    assert Sizes(16, 4, 2, 4, None).at("model.layers.1").ffn is None


def test_widths_that_say_nothing_new_are_left_out():
    assert Sizes(16, 4, 2, 4, 12).with_widths([Width("ffn", "decoder.block", 12)]) == Sizes(16, 4, 2, 4, 12)
    # A layer as wide as the model says something where its stack is narrower, and one as narrow as the stack does not.
    stack, wide, narrow = (
        Width("ffn", f"decoder.block{end}", units) for end, units in (("", 6), (".0", 12), (".1", 6))
    )
    assert Sizes(16, 4, 2, 4, 12).with_widths([stack, wide, narrow]).scoped == (stack, wide)


def test_axes_of_a_whole_model_have_no_scope():
    axes = Axes.of(Sizes(16, 4, 2, 4, 12), 19)
    assert axes.ffn == (Segment("ffn", 1, 12),)
    assert {segment.scope for part in vars(axes).values() for segment in part} == {""}
