"""Modules are built anew as they are, by constructor arguments that are found in them."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from auxin.errors import PlanError
from auxin.models.building import Builder, likeness
from auxin.models.loading import skeleton
from tiny_models import FAMILIES, tiny

ALL = [*FAMILIES, "gemma"]


@pytest.mark.parametrize("family", ALL)
def test_every_module_that_takes_the_config_is_built_again_as_it_is(family):
    model = tiny(family)
    model = skeleton(model.config, type(model))
    built = 0
    for path, module in model.named_modules():
        if path and "config" in inspect.signature(type(module).__init__).parameters:
            assert likeness(Builder(model, path).build({}), alone=True) == likeness(module, alone=True), path
            built += 1
    assert built >= 5
    with pytest.raises(PlanError, match="is not built from a config"):
        Builder(model, next(path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)))


def test_arguments_are_found_in_the_module_or_in_what_it_holds():
    model = tiny("t5")
    model = skeleton(model.config, type(model))
    first, second = (Builder(model, f"decoder.block.{number}").arguments for number in (0, 1))
    assert first == {"has_relative_attention_bias": True, "layer_idx": 0}
    assert second == {"has_relative_attention_bias": False, "layer_idx": 1}
    assert Builder(model, "decoder.block.0.layer.0.SelfAttention").arguments["is_causal"] is True
    model = tiny("gpt2")
    mlp = Builder(skeleton(model.config, type(model)), "transformer.h.1.mlp")
    assert mlp.arguments == {"intermediate_size": 12}
    assert mlp.value("intermediate_size") == 12
    assert mlp.value("activation_function") == "gelu_new"
    with pytest.raises(PlanError, match=r"no value 'nonsense', and GPT2MLP is given no such argument \(but inter"):
        mlp.value("nonsense")


class Secretive(nn.Module):
    """Keeps nothing of what it was given."""

    def __init__(self, config, wide):
        super().__init__()
        self.inner = nn.Linear(4, 7 if wide == "very" else 3)


def test_a_module_whose_arguments_are_not_found_is_refused():
    with torch.device("meta"):
        model = nn.ModuleDict({"part": Secretive(None, "very"), "other": Secretive(None, "not")})
    model.config = LlamaConfig()
    with pytest.raises(PlanError, match=r"part can't be built anew: Secretive, .* wide, makes another module"):
        Builder(model, "part")
    assert Builder(model, "other").build({}).inner.out_features == 3


def test_an_outline_shows_shapes_attributes_classes_ties_and_buffers():
    def made(**changes):
        part = nn.Module()
        part.one, part.two = nn.Linear(2, 3), nn.Linear(2, 3)
        part.rate = 0.5
        part.register_buffer("table", torch.arange(3.0), persistent=False)
        for name, value in changes.items():
            setattr(part, name, value)
        return part

    plain = likeness(made())
    assert likeness(made()) == plain
    assert likeness(made(rate=0.25)) != plain
    assert likeness(made(one=nn.Linear(2, 4))) != plain
    assert likeness(made(one=nn.Identity())) != plain
    assert likeness(made(table=torch.ones(3))) != plain
    assert likeness(made(table=torch.ones(3)), alone=True) == likeness(made(), alone=True)
    tied = made()
    tied.two.weight = tied.one.weight
    assert likeness(tied) != plain
    assert likeness(tied, alone=True) == likeness(made(), alone=True)
    unseen = made(config=SimpleNamespace(a=1), _private=3)
    unseen.eval()
    with torch.no_grad():
        unseen.one.weight.zero_()
    assert likeness(unseen) == plain
