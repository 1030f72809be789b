"""Gates on heads: where they begin, what they read and multiply, how many parameters they have."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxin.errors import PlanError
from auxin.nn.gated_attention import GatedAttention, bias_for
from nn.attentions import CASE, attention, called
from oracles import quiet_heads as oracle
from tiny_models import tiny

GATES = ("all-heads", "per-head", "mlp", "elementwise")


def gated(module: Any, gate: str, heads: int, **settings: Any) -> Any:
    """With random gates."""
    new = GatedAttention.replacing(module, heads=heads, head_width=4, width=8, gate=gate, **settings)  # type: ignore[arg-type]
    for name, parameter in new.named_parameters(recurse=False):
        torch.nn.init.normal_(parameter)
        assert name.startswith("gate_")
    return new


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_gate_begins_at_a_half_or_a_quarter_to_the_last_bit(dtype):
    for opening in (0.5, 0.25):
        bias = torch.full((5, 3), bias_for(opening, dtype), dtype=dtype)
        assert (bias.sigmoid() == opening).all()
    assert bias_for(0.5, dtype) == 0


@given(opening=st.floats(0.01, 0.99))
def test_a_bias_is_the_logit(opening):
    assert bias_for(opening, torch.float64) == pytest.approx(math.log(opening / (1 - opening)), abs=1e-12)


@settings(max_examples=40)
@given(gate=st.sampled_from(GATES), **CASE)
def test_heads_are_multiplied_before_they_are_read_by_gates_of_the_input(
    gate, heads, tokens, samples, implementation, padding, seed
):
    """What W_o reads is the plain attention's, head by head times the gate of what came in."""
    if gate in ("per-head", "mlp"):
        heads = (2, min(heads[1], 2))
    plain = attention(*heads, implementation, torch.float64, seed)
    module = gated(copy.deepcopy(plain), gate, heads[0], **({"hidden": 3} if gate == "mlp" else {}))
    hidden = torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(seed)).double()
    read = []
    for one in (plain, module):
        one.o_proj.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
        with torch.no_grad():
            called(one, hidden, padding, implementation)
    for sample in range(samples):
        for token in range(tokens):
            for head in range(heads[0]):
                expected = by_hand(module, gate, hidden[sample, token].tolist(), head)
                before, after = (one[sample, token, head * 4 : head * 4 + 4] for one in read)
                torch.testing.assert_close(after, before * torch.tensor(expected, dtype=torch.float64))


def by_hand(module: Any, gate: str, x: list[float], head: int) -> list[float]:
    """The gates of the four entries that a head gives for one token."""
    weight, piece = module.gate_weight.tolist(), x[head * 4 : head * 4 + 4]
    if gate == "elementwise":
        return [oracle.linear_gate(x, row, 0.0) for row in weight[head * 4 : head * 4 + 4]]
    bias = module.gate_bias.tolist()[head]
    if gate == "mlp":
        inner = module.gate_inner_weight.tolist()[head], module.gate_inner_bias.tolist()[head]
        return [oracle.mlp_gate(piece, *inner, weight[head], bias)] * 4
    return [oracle.linear_gate(x if gate == "all-heads" else piece, weight[head], bias)] * 4


@given(heads=st.integers(1, 12), head_width=st.integers(4, 32), more=st.integers(0, 9))
def test_it_has_as_many_parameters_as_the_paper_s_table_says(heads, head_width, more):
    width = heads * head_width
    hidden = head_width // 4
    expected = {
        "per-head": heads * (head_width + 1),
        "mlp": heads * (hidden * (head_width + 2) + 1),
        "all-heads": heads * (width + 1),
        "elementwise": width * heads * head_width,
    }
    for gate, count in expected.items():
        shapes = GatedAttention.making.shapes({}, gate, heads, head_width, width, 0.5)  # type: ignore[arg-type]
        assert sum(math.prod(shape) for shape in shapes.values()) == count
    shapes = GatedAttention.making.shapes({}, "mlp", heads, head_width, width, 0.5, head_width + more)
    n = head_width + more
    assert sum(math.prod(shape) for shape in shapes.values()) == heads * (n * (head_width + 2) + 1)


@pytest.mark.parametrize("gate", GATES)
def test_weights_of_gates_have_a_gradient_at_once(gate):
    module = GatedAttention.replacing(attention(2, 1, "sdpa", torch.float64, 0), 2, 4, 8, gate)
    result, _, _ = called(module, torch.randn(2, 5, 8).double(), 0, "sdpa")
    result.square().sum().backward()
    assert (module.gate_weight == 0).all()
    assert module.gate_weight.grad.abs().min() > 0 or gate == "mlp"
    assert module.gate_weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gate": "sum"}, "'sum' is none. Give one of all-heads"),
        ({"opening": 1.0}, "a gate stands between 0 and 1"),
        ({"gate": "elementwise", "opening": 0.25}, "begins at 0.5. Leave opening out"),
        ({"hidden": 2}, "are those of gate = mlp"),
        ({"gate": "mlp", "hidden": 0}, "1 or more"),
        ({"gate": "mlp", "head_width": 2, "width": 4}, "no hidden unit"),
        ({"gate": "per-head", "width": 9}, "2 heads of 4 are no input of 9. Take all-heads"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(values, words):
    sizes = {"heads": 2, "head_width": 4, "width": 8}
    with pytest.raises(PlanError, match=words):
        GatedAttention.replacing(attention(2, 1, "sdpa", torch.float32, 0), **{**sizes, **values})


def test_an_attention_that_computes_itself_is_refused():
    with pytest.raises(PlanError, match="a FalconAttention does not hand"):
        GatedAttention.replacing(tiny("falcon").transformer.h[0].self_attention, 4, 4, 16)
