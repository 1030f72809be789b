"""What bricks say of themselves is true of what they compute."""

import copy
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from auxin.errors import PlanError
from auxin.nn.altup_layer import AltUpLayer
from auxin.nn.bricks import BRICKS, Brick, brick, find_brick
from auxin.nn.graft import GraftedConv1D, GraftedLinear
from auxin.nn.masked import MaskedBlock, MaskedModule, MaskedNorm
from auxin.nn.pattention import Pattention
from auxin.nn.sequence_altup import SequenceAltUpLayer
from auxin.nn.stand_ins import Identity, Zeros
from auxin.nn.token_merging import TokenMergingLayer
from auxin.nn.wide_stream import ParallelEmbeddings
from auxin.words.roles import ParameterRole, Segment, conv1d, linear
from auxin.words.widths import Stream
from tiny_models import tiny

WIDTH = 6
RESIDUAL, UNITS = (Segment("residual", 1, WIDTH),), (Segment("ffn", 1, 5),)


class Layer(nn.Module):
    """x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(torch.tanh(self.up(hidden_states)))


SILENT = {"down.weight": 0.0, "down.bias": 0.0}
"""What makes an identity block of a `Layer`."""


def awake(module: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters random, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def multiplied(module: nn.Module, factors: dict[str, float]) -> nn.Module:
    new = copy.deepcopy(module)
    with torch.no_grad():
        for name, factor in factors.items():
            new.get_parameter(name).mul_(factor)
    return new


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PLAIN = dict.fromkeys(("weight", "bias"))


def half_masked(module: MaskedModule | MaskedNorm) -> nn.Module:
    module.set_strength(0.5)
    return module


MODULES = {
    "pattention": lambda: (Pattention(WIDTH, 5, [4, 3]), ("not", "its", "own")),
    "grafted linear": lambda: (GraftedLinear(WIDTH, 5, [4, 3]), PLAIN),
    "grafted linear without bias": lambda: (GraftedLinear(WIDTH, 5, [4], bias=False), ["weight"]),
    "grafted conv1d": lambda: (GraftedConv1D(5, WIDTH, [4]), PLAIN),
    "masked": lambda: (MaskedModule(nn.Linear(WIDTH, 5), WIDTH, [(4, 6)], 5, [(3, 5)]), PLAIN),
    "masked graft": lambda: (MaskedModule(GraftedLinear(WIDTH, 5, [4]), WIDTH, [(4, 6)]), PLAIN),
    "masked norm": lambda: (MaskedNorm(nn.LayerNorm(WIDTH), "layer", 1e-2, WIDTH, [(4, 6)]), PLAIN),
    "masked rms": lambda: (MaskedNorm(LlamaRMSNorm(WIDTH), "rms", 1e-2, WIDTH, [(4, 6)]), ["weight"]),
}


@pytest.mark.parametrize("kind", MODULES)
@given(factor=st.sampled_from([0.0, -1.0, 0.25, 3.0]), seed=st.integers(0, 50))
def test_factors_multiply_what_a_module_gives(kind, factor, seed):
    module, plain = MODULES[kind]()
    module = awake(module, seed)
    if isinstance(module, MaskedModule | MaskedNorm):
        half_masked(module)
        inner = module.wrapped
        factors = dict.fromkeys(plain, factor)
        factors = module.scaled(factor, inner.scaled(factor, factors) if isinstance(inner, Brick) else factors)
    else:
        factors = module.scaled(factor, dict.fromkeys(plain, factor))
    x = numbers(3, WIDTH, seed=seed + 1)
    torch.testing.assert_close(multiplied(module, factors)(x), factor * module(x), rtol=1e-12, atol=1e-12)
    assert module(x).abs().max() > 0


LAYERS = {
    "altup": lambda layer: AltUpLayer.replacing(layer, 3, 1),
    "dynamic altup": lambda layer: AltUpLayer.replacing(layer, 3, 1, coefficients="dynamic", hidden_size=WIDTH),
    "altup without coefficients": lambda layer: AltUpLayer.replacing(layer, 3, 1, coefficients="none"),
    "sequence altup": lambda layer: SequenceAltUpLayer.replacing(layer, 3),
    "skipping": lambda layer: SequenceAltUpLayer.replacing(layer, 3, "skip"),
    "both": lambda layer: AltUpLayer.replacing(SequenceAltUpLayer.replacing(layer, 2), 3, 0),
    "masked block": MaskedBlock,
}


@pytest.mark.parametrize("kind", LAYERS)
@given(seed=st.integers(0, 50))
def test_with_factors_of_0_a_layer_gives_what_it_gets(kind, seed):
    layer = awake(LAYERS[kind](Layer()), seed)
    if isinstance(layer, MaskedBlock):
        layer.set_strength(0.5)
    x = numbers(2, 5, WIDTH, seed=seed)
    if ("altup" in kind and "sequence" not in kind) or kind == "both":
        x = numbers(3, 2, 5, WIDTH, seed=seed)  # streams
    silent = multiplied(layer, layer.scaled(0.0, SILENT))
    torch.testing.assert_close(silent(x), x, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x), x)
    # Each of the factors is needed, also those that are not the plain layer's.
    for name in layer.scaled(0.0, SILENT):
        factors = {other: 0.0 for other in layer.scaled(0.0, SILENT) if other != name}
        assert not torch.allclose(multiplied(layer, factors)(x), x), name


def test_other_factors_are_those_of_the_layer_alone():
    half = {"down.weight": 0.5, "down.bias": 0.5}
    for kind in ("altup", "dynamic altup", "sequence altup", "both"):
        assert LAYERS[kind](Layer()).scaled(0.5, half) == half
    assert MaskedBlock(Layer()).scaled(0.5, half) == {f"inner.{name}": 0.5 for name in half}


def test_what_no_factor_silences_says_so():
    pooled = SequenceAltUpLayer.replacing(Layer(), 2, "pool")
    with pytest.raises(PlanError, match=r"mode = pool.*pool then"):
        pooled.scaled(0.0, SILENT)
    assert pooled.scaled(0.5, SILENT) == SILENT
    merging = TokenMergingLayer.replacing(tiny("vit").vit.layers[0], 2)
    with pytest.raises(PlanError, match=r"merges tokens.*merge then"):
        merging.scaled(0.0, SILENT)
    assert merging.scaled(0.5, SILENT) == SILENT
    with pytest.raises(PlanError, match="no parameter scales"):
        Identity().scaled(0.0, {})
    assert Zeros().scaled(0.0, {}) == {}


def test_grafts_read_and_write_what_their_layer_does():
    for module, roles in (
        (GraftedLinear(WIDTH, 5, [4]), linear("x", UNITS, RESIDUAL)),
        (GraftedConv1D(5, WIDTH, [4]), conv1d("x", UNITS, RESIDUAL)),
    ):
        told = module.roles({role.pattern.removeprefix("x."): role for role in roles})
        shapes = {name: list(p.shape) for name, p in module.named_parameters() if name.startswith("branch.")}
        assert told.keys() == shapes.keys()
        (keys, values) = (role for _, role in sorted(told.items()))
        assert (keys.axes, keys.access) == (((), RESIDUAL), (None, "reads"))
        assert (values.axes, values.access) == (((), UNITS), (None, "writes"))
        assert module.roles({}) == {}


def test_extended_twice_both_say_what_they_have():
    layer = LAYERS["both"](Layer())
    roles = layer.roles({})
    assert set(roles) == {"altup.prediction", "altup.correction", "sequence_altup.deviations"}
    for name, role in roles.items():
        assert role.axes == ((),) * layer.get_parameter(name).dim()
    assert layer.residual_blocks() == "recycled"
    assert SequenceAltUpLayer.replacing(Layer(), 2).residual_blocks() is None


def test_copies_of_an_embedding_have_its_roles():
    module = ParallelEmbeddings.replacing(nn.Embedding(7, WIDTH), 3)
    role = ParameterRole("any", ((Segment("vocabulary", 1, 7),), RESIDUAL), ("writes", "writes"), "embedding")
    assert module.roles({"weight": role}) == {"others.0.weight": role, "others.1.weight": role}


def test_widths_that_are_settings_are_fixed():
    assert "residual" in AltUpLayer.replacing(Layer(), 2, 0, split=True, hidden_size=WIDTH).fixed_widths()
    assert "residual" in LAYERS["dynamic altup"](Layer()).fixed_widths()
    assert LAYERS["altup"](Layer()).fixed_widths() == {}
    assert set(MODULES["masked"]()[0].fixed_widths()) == set(get_args(Stream))
    assert MaskedBlock(Layer()).fixed_widths() == {}


def test_scales_follow_those_that_they_were_overwritten_with():
    module, other = Pattention(4, 4, [3, 2], tau=[1.0, 2.0]), Pattention(4, 4, [3, 2], tau=[0.1, 6.0])
    module.tau.copy_(other.tau)
    module.overwritten_with(other)
    assert module.initial_tau == (0.1, 6.0), "the buffer rounds 0.1"
    assert torch.equal(module.double().tau, torch.tensor([0.1, 6.0], dtype=torch.float64))


def test_every_brick_is_one_and_knows_its_name():
    found = BRICKS.all()
    assert {"altup_layer", "grafted_linear", "masked", "identity"} <= set(found)
    for name, cls in found.items():
        assert issubclass(cls, Brick)
        assert cls.brick_name == name
        assert find_brick(name) is cls


def test_what_can_not_say_what_it_is_is_no_brick():
    with pytest.raises(TypeError, match=r"Silent is no auxin\.nn\.bricks\.Brick"):

        @brick("test_silent")
        class Silent(nn.Module):
            pass

    with pytest.raises(PlanError, match="test_silent"):
        find_brick("test_silent")


def test_roles_are_made_of_roles():
    weight, bias = linear("x", UNITS, RESIDUAL)
    assert (bias.axes, bias.access) == (weight.vector(0, "bias").axes, weight.vector(0, "bias").access)
    # A factor of what is read is a factor of units that are there: they are written once more.
    assert weight.vector(1, "scale") == ParameterRole("x.weight", (RESIDUAL,), ("writes",), "scale")
    assert weight.beside(1, 0) == ParameterRole("x.weight", (RESIDUAL, ()), ("reads", None), "matrix")
    assert weight.beside(0, 1) == ParameterRole("x.weight", ((), UNITS), (None, "writes"), "matrix")
    assert linear("x", (), RESIDUAL)[0].vector(0, "scale").access == (None,)
