"""Layers and adapters of random features, as modules."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from auxin.errors import PlanError
from auxin.nn.feature_layers import FeatureAdapter, ReluFeatureConv1D, ReluFeatureLinear, ReluFeatures
from auxin.nn.low_rank import LowRankLinear
from oracles import random_features as oracle


def a_layer(transposed: bool, inputs: int, outputs: int, seed: int = 0):
    torch.manual_seed(seed)
    layer = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.double()


@settings(max_examples=25, deadline=None)
@given(
    transposed=st.booleans(),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 4),
    features=st.integers(1, 7),
    threshold=st.sampled_from([0.0, -0.5]),
    orthogonal=st.booleans(),
    seed=st.integers(0, 999),
)
def test_at_first_a_layer_gives_the_products_of_both_sides_features(
    transposed, inputs, outputs, features, threshold, orthogonal, seed
):
    layer = a_layer(transposed, inputs, outputs, seed)
    cls = ReluFeatureConv1D if transposed else ReluFeatureLinear
    new = cls.replacing(layer, features=features, threshold=threshold, orthogonal=orthogonal)
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    weight = (layer.weight.mT if transposed else layer.weight).detach().numpy()
    told = oracle.layer(x[1, 2].numpy(), weight, new.directions.numpy(), threshold)
    np.testing.assert_allclose(new(x)[1, 2].detach().numpy(), told, atol=1e-12)
    assert {name for name, _ in new.named_parameters()} == {"weight_features"}  # no bias, and directions stay
    assert set(new.state_dict()) == {"weight_features", "directions"}


def test_many_features_give_the_arc_cosine_kernel_and_no_relu():
    layer = a_layer(False, 6, 3)
    new = ReluFeatureLinear.replacing(layer, features=200_000)
    x = torch.randn(6, dtype=torch.float64)
    found = new(x).detach()
    for row, value in zip(layer.weight.detach(), found, strict=True):
        mean, variance = oracle.arc_cosine(x.numpy(), row.numpy())
        assert float(value) == pytest.approx(mean, abs=4 * math.sqrt(variance / 200_000))
    assert (found - torch.relu(layer(x))).abs().max() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_have_the_type_of_the_layer(dtype):
    new = ReluFeatureLinear.replacing(a_layer(False, 6, 3).to(dtype), features=4)
    assert {tensor.dtype for tensor in new.state_dict().values()} == {dtype}
    assert new(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert new(torch.randn(2, 6, dtype=dtype)).dtype == torch.bfloat16


def test_what_reads_features_alone_gives_what_it_gave():
    layer, behind = a_layer(False, 6, 9), a_layer(False, 9, 2)
    new = ReluFeatureLinear.replacing(layer, features=4, threshold=-1.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    merged = ReluFeatures.replacing(new)(x) @ (behind.weight @ new.weight_features).mT + behind.bias
    torch.testing.assert_close(merged, behind(new(x)), rtol=0, atol=1e-12)
    assert not list(ReluFeatures.replacing(new).parameters())


def test_an_adapter_is_nothing_at_first_and_its_gate_learns_before_its_features():
    torch.manual_seed(0)
    adapter = FeatureAdapter(a_layer(False, 6, 5), width=5, features=3)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(adapter(x), adapter.inner(x))
    optimizer = torch.optim.SGD(adapter.adapter.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        adapter(x).square().sum().backward()
        assert (adapter.adapter.gate.grad != 0).any()
        assert bool((adapter.adapter.weight_features.grad != 0).any()) == (step > 0)
        optimizer.step()
    own, z = adapter.adapter, adapter.inner(x).detach()
    features = [np.maximum(own.directions.numpy() @ row, 0) / math.sqrt(3) for row in z.numpy()]
    told = z + own.gate * (torch.tensor(np.stack(features)) @ own.weight_features.mT)
    torch.testing.assert_close(adapter(x), told, rtol=0, atol=1e-12)


def test_an_adapter_takes_what_comes_first_of_several_and_hands_on_the_rest():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, hidden_states, other=None):
            return self.layer(hidden_states), other

    adapter, x = FeatureAdapter(Several(), width=3, features=2), torch.randn(2, 3)
    nn.init.ones_(adapter.adapter.gate)
    first, second = adapter(x, other="kept")
    assert second == "kept"
    assert torch.equal(first, adapter.adapter(adapter.inner(x)[0]))


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_of_nothing_an_adapter_makes_nothing_and_of_a_multiple_a_multiple_where_it_can(threshold):
    adapter = FeatureAdapter(nn.Linear(3, 3), width=3, features=2, threshold=threshold)
    nn.init.normal_(adapter.adapter.gate)
    x, plain = torch.randn(2, 3), {"weight": 0.0, "bias": 0.0}
    before = adapter(x)
    assert adapter.scaled(0.0, plain) == {"inner.weight": 0.0, "inner.bias": 0.0}
    if threshold:
        with pytest.raises(PlanError, match="has an adapter of random features, which is not linear"):
            adapter.scaled(0.5, plain)
    else:
        assert adapter.scaled(0.5, {"weight": 0.5}) == {"inner.weight": 0.5}
        with torch.no_grad():
            adapter.inner.weight.mul_(0.5)
            adapter.inner.bias.mul_(0.5)
        torch.testing.assert_close(adapter(x), before / 2)
    with torch.no_grad():
        adapter.inner.weight.zero_()
        adapter.inner.bias.zero_()
    assert not adapter(x).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReluFeatureLinear.replacing(nn.LayerNorm(4), features=2), "replaces a Linear, received a LayerNorm"),
        (lambda: ReluFeatureLinear.replacing(Conv1D(4, 4), features=2), "replaces a Linear, received a Conv1D"),
        (lambda: ReluFeatureLinear.replacing(nn.Linear(4, 4), features=0), "features = 0, .* Give 1 or more"),
        (lambda: ReluFeatures.replacing(nn.Linear(4, 4)), "received a Linear. Replace it by such a layer first"),
        (lambda: FeatureAdapter(nn.Linear(4, 4), 4, 0), "features = 0 must be 1 or more"),
        (lambda: FeatureAdapter(nn.Linear(4, 4), 4, 2, 1.0), "threshold = 1 0 or below"),
        (
            lambda: ReluFeatureLinear.making.shapes({"output_factor": (4, 2)}, 2),
            r"has the tensors \{'output_factor': \[4, 2\]\}. Choose another layer",
        ),
        (
            lambda: ReluFeatureLinear.replacing(LowRankLinear(4, 4, 2), features=2),
            "received a LowRankLinear, which does something of its own",
        ),
    ],
)
def test_what_can_not_be_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()
