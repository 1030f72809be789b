"""FLOPs that a module tells itself, where torch's counter sees none, or too many."""

import pytest
import torch
from torch import Tensor, nn

from auxin.accounting import flops_per_token
from auxin.edits import Plan, ReplaceModule, WrapModule, apply
from auxin.nn.bricks import Brick, brick
from tiny_models import tiny

LENGTH = 7


@brick("test_sums")
class Sums(Brick):
    """A linear layer without a matrix product: sums of products, as a kernel of one's own would be to the counter."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @classmethod
    def replacing(cls, module: nn.Linear) -> "Sums":
        return cls(module.weight, module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias

    def forward_flops(self, counted: float, x: Tensor) -> float:
        return counted + 2 * x[..., 0].numel() * self.weight.numel()


@brick("test_now_and_then")
class NowAndThen(Brick):
    """A module that half of the tokens pass by, which ones depends on their values. The shapes are those of all."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return torch.where(x.sum(-1, keepdim=True) > 0, self.inner(x, **kwargs), 0.0)

    def forward_flops(self, counted: float, x: Tensor, **kwargs: Tensor) -> float:
        return counted / 2


def edited(*edits):
    model = tiny("llama")
    for edit in edits:
        apply(Plan(method="by hand", promise="none", edits=[edit]), model)
    return model


def forward(model) -> float:
    return flops_per_token(model, LENGTH).forward


def test_what_torch_does_not_see_is_told():
    model = edited(ReplaceModule(module="model.layers.*.mlp.up_proj", brick="test_sums"))
    assert forward(model) == forward(tiny("llama"))
    # Without a word of it the layer would be free.
    plain = 2 * 2 * model.config.hidden_size * model.config.intermediate_size
    told = Sums.forward_flops
    try:
        del Sums.forward_flops
        assert forward(model) == forward(tiny("llama")) - plain
    finally:
        Sums.forward_flops = told


def test_what_is_told_of_a_module_inside_counts_in_the_one_around_it():
    dense = tiny("llama")
    mlp = 3 * 2 * dense.config.hidden_size * dense.config.intermediate_size
    half = edited(WrapModule(module="model.layers.0.mlp", brick="test_now_and_then"))
    assert forward(half) == forward(dense) - mlp / 2
    both = edited(
        ReplaceModule(module="model.layers.*.mlp.up_proj", brick="test_sums"),
        WrapModule(module="model.layers.0.mlp", brick="test_now_and_then"),
    )
    assert forward(both) == forward(half)


@pytest.mark.parametrize("around", ["model.layers.0", "model.layers.0.self_attn"])
def test_keyword_arguments_reach_the_one_who_tells(around):
    seen = []

    @brick("test_listens")
    class Listens(Brick):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

        def forward_flops(self, counted: float, *args, **kwargs) -> float:
            seen.append((len(args), set(kwargs)))
            return counted

    model = edited(WrapModule(module=around, brick="test_listens"))
    assert forward(model) == forward(tiny("llama"))
    ((positional, named),) = seen
    assert positional == 1 or "hidden_states" in named
    assert "position_embeddings" in named
