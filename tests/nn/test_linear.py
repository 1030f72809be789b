"""Linear layers are told by what they compute, whatever their class is called."""

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from auxin.edits import MergeModule, Plan, ReplaceModule, apply
from auxin.errors import PlanError
from auxin.methods.adapt.graft import Graft, plan_graft
from auxin.nn.graft import GraftedLinear
from auxin.nn.linear import linear_class
from auxin.nn.low_rank import LowRankLinear
from tiny_models import inputs, logits, tiny


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Restless(nn.Linear):
    def forward(self, input):
        return super().forward(input) + self.training


class Stateful(nn.Linear):
    def __init__(self, *args, scale: float = 1.0, **settings):
        super().__init__(*args, **settings)
        self.scale = scale

    def forward(self, input):
        return self.scale * super().forward(input)


class Buffered(nn.Linear):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register_buffer("shift", torch.zeros(self.out_features))

    def forward(self, input):
        return super().forward(input) + self.shift


class Peculiar(nn.Linear):
    def __init__(self, size: int):
        super().__init__(size, size)

    def forward(self, input):
        return super().forward(input)


class Turned(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_class_that_computes_the_same_counts_as_its_base():
    assert linear_class(nn.Linear(3, 4)) is nn.Linear
    assert linear_class(Conv1D(3, 4)) is Conv1D
    assert linear_class(FalconLinear(3, 4, bias=False)) is nn.Linear
    assert linear_class(Turned(3, 4)) is Conv1D
    with torch.device("meta"):
        assert linear_class(FalconLinear(3, 4)) is nn.Linear


@pytest.mark.parametrize(
    "module",
    [
        Doubled(3, 4),
        Restless(3, 4),
        Stateful(3, 4),
        Buffered(3, 4),
        Peculiar(3),
        NonDynamicallyQuantizableLinear(3, 4),
        GraftedLinear(3, 4, [2]),
        nn.Conv1d(3, 4, 1),
        nn.Identity(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_others_are_no_linear_layers(module):
    assert linear_class(module) is None


def test_telling_does_not_touch_random_numbers():
    class Fresh(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T + (0 if self.bias is None else self.bias)

    layer, state = Fresh(3, 4), torch.get_rng_state()
    assert linear_class(layer) is nn.Linear
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graft_leaves_the_computing_to_the_class_that_was_there(dtype):
    dense = FalconLinear(33, 17).to(dtype)
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    graft = GraftedLinear.replacing(dense, [4])
    assert torch.equal(graft(x), dense(x))
    assert torch.equal(GraftedLinear.replacing(graft, [4, 4])(x), dense(x))


def test_falcon_is_grafted_to_the_last_bit_and_refuses_what_is_no_linear_layer():
    model = tiny("falcon", dtype=torch.float32)
    with torch.no_grad():
        before = model(**inputs(model)).logits
        apply(plan_graft(model, Graft(tokens=3)), model)
        assert torch.equal(model(**inputs(model)).logits, before)
    odd = tiny("falcon")
    for layer in odd.transformer.h:
        for parent, name in ((layer.self_attention, "query_key_value"), (layer.self_attention, "dense")):
            setattr(parent, name, Doubled(4, 4))
        layer.mlp = nn.Identity()
    with pytest.raises(PlanError, match=r"query_key_value is a Doubled, which does not compute what nn\.Linear"):
        plan_graft(odd, Graft())


def test_falcons_layers_can_be_of_low_rank_and_whole_again():
    model = tiny("falcon")
    path, settings = "transformer.h.*.mlp.dense_h_to_4h", {"rank": 12}
    before = logits(model)
    edit = ReplaceModule(module=path, brick="low_rank_linear", settings=settings)
    apply(Plan(method="low", promise="exact", edits=[edit]), model, probe=inputs(model))
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is LowRankLinear
    assert torch.allclose(logits(model), before, rtol=1e-9, atol=1e-9)
    apply(Plan(method="whole", promise="exact", edits=[MergeModule(module=path)]), model, probe=inputs(model))
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is FalconLinear
    assert torch.allclose(logits(model), before, rtol=1e-9, atol=1e-9)
