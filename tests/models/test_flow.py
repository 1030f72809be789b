"""Who reads what a module gives, in models of several kinds."""

import pytest

from auxin.models.flow import Flow
from tiny_models import tiny


@pytest.mark.parametrize(
    ("family", "path", "readers"),
    [
        ("bert", "bert.encoder.layer.1.intermediate.dense", ["bert.encoder.layer.1.intermediate.intermediate_act_fn"]),
        ("bert", "bert.encoder.layer.1.intermediate.intermediate_act_fn", ["bert.encoder.layer.1.output.dense"]),
        ("gpt2", "transformer.h.0.mlp.c_fc", ["transformer.h.0.mlp.act"]),
        ("llama", "model.layers.0.mlp.gate_proj", ["model.layers.0.mlp.act_fn"]),
        # Multiplied, then read.
        ("llama", "model.layers.0.mlp.up_proj", []),
        ("llama", "model.layers.0.mlp.act_fn", []),
        # A fused matrix, whose halves are read.
        ("phi3", "model.layers.0.mlp.gate_up_proj", []),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.act", ["dropout", "wo"]),
        ("llama", "model.layers.0.input_layernorm", ["q_proj", "k_proj", "v_proj"]),
        ("llama", "no.such.module", []),
    ],
)
def test_readers_are_those_that_get_all_of_it_as_it_is(family, path, readers):
    found = Flow.of(tiny(family)).readers(path)
    assert [name.split(".")[-1] for name in found] == [name.split(".")[-1] for name in readers]


def test_widths_are_those_of_what_modules_give():
    flow = Flow.of(tiny("bert"))
    assert flow.width("bert.encoder.layer.0.intermediate.dense") == 12
    assert flow.width("bert.encoder.layer.0.output.dense") == 16
    assert flow.width("nothing") is None
