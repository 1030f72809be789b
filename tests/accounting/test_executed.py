"""FLOPs of what is executed are those that the shapes say, on every kernel, and nothing that is not executed counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from auxin.accounting import ExecutedFlops, flops_per_token
from tiny_models import FAMILIES, inputs, labels, tiny


def executed(run) -> int:
    with ExecutedFlops() as counter:
        run()
    return counter.total


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_passes_of_a_model_count_as_its_shapes_say(family):
    """The count on shapes uses plain attention; this one runs what the CPU really runs, fused attention among it."""
    model = tiny(family)
    given, targets = inputs(model), labels(model)
    tokens, length = given["input_ids"].numel(), given["input_ids"].shape[1]
    per_token = flops_per_token(model, length, decoder_length=targets.shape[1])

    def forward():
        return model(**given, labels=targets).loss

    assert executed(forward) == per_token.forward * tokens
    assert executed(lambda: forward().backward()) == per_token.training * tokens
    with torch.inference_mode():
        assert executed(forward) == per_token.forward * tokens


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_costs_the_same_on_every_kernel(backend):
    """Two products of T x T x d forward, four backward: the scores that a fused kernel computes again are its own."""
    batch, heads, queries, keys, size = 2, 3, 5, 7, 4
    query = torch.randn(batch, heads, queries, size, requires_grad=True)
    key, value = (torch.randn(batch, heads, keys, size, requires_grad=True) for _ in range(2))

    def run():
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(query, key, value).square().sum().backward()

    assert executed(run) == 6 * 2 * batch * heads * queries * keys * size


def test_grouped_products_count_every_token_once():
    tokens = torch.randn(6, 8, dtype=torch.bfloat16)
    experts = torch.randn(2, 8, 16, dtype=torch.bfloat16)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    assert executed(lambda: torch._grouped_mm(tokens, experts, offs=ends)) == 2 * 6 * 8 * 16


def test_shapes_alone_cost_nothing():
    model = tiny("llama")
    given = {name: tensor.to("meta") for name, tensor in inputs(model).items()}
    counted = []
    assert executed(lambda: counted.append(flops_per_token(model, 7))) == 0
    assert counted == [flops_per_token(model, 7)], "the count on shapes is not disturbed"
    assert executed(lambda: model.to("meta")(**given)) == 0
