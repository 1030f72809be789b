"""Tiny models with alternating updates, and what they are watched by."""

import warnings

import torch

from auxin.edits import apply
from auxin.methods.grow.altup import AltUpSettings, plan_altup
from auxin.models.anatomy import anatomy
from auxin.nn.altup_layer import AltUpLayer
from tiny_models import FAMILIES, inputs, labels, tiny

EXACT = 1e-12
EVERY = [*FAMILIES, "gemma"]
LENGTH_FIELD = {"gpt2": "n_layer", "t5": "num_layers"}
TIED = ("gpt2", "tokenformer", "gemma", "t5")


def small(family, layers=4, **values):
    """A tiny model with more layers than blocks."""
    return tiny(family, **{LENGTH_FIELD.get(family, "num_hidden_layers"): layers}, **values)


def alter(model, optimizer=None, **values):
    """Alternating updates on `model`, in place, notes not said aloud."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apply(plan_altup(model, AltUpSettings.parse(values)), model, optimizer)


def altered(model, **values):
    """`model` after `alter`."""
    alter(model, **values)
    return model


def updates(model):
    """The modules with mixing and gains, by the path of their layers."""
    return {name: module.altup for name, module in model.named_modules() if isinstance(module, AltUpLayer)}


def shake(model, scale=0.2, seed=5):
    """Mixing and gains as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in updates(model).values():
            for parameter in module.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def outputs(model):
    """The logits in the model's own arithmetic."""
    with torch.no_grad():
        return model(**inputs(model)).logits


def streams(model, seed=1):
    """What the last layer of the last stack gives."""
    found = []
    layer = list(model.get_submodule(anatomy(model, complete=False).stacks[-1].path))[-1]
    handle = layer.register_forward_hook(lambda module, args, out: found.append(out[0] if type(out) is tuple else out))
    with torch.no_grad():
        model(**inputs(model, seed))
    handle.remove()
    return found[-1]


def train(model, optimizer=None, steps=20, rate=1e-2):
    """Some steps of Adam."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        model(**inputs(model, 10 + step), labels=labels(model, 20 + step)).loss.backward()
        optimizer.step()
    return optimizer


def untied(family, **values):
    """A small model in which every conversion is possible; T5, which always is tied, as it is."""
    return small(family, **values, **({"tie_word_embeddings": False} if family in TIED and family != "t5" else {}))
