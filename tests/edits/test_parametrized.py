"""Modules under torch's parametrizations, each of which has a class of its own, are what they were."""

import torch

from auxin.edits import Plan, ScaleParameter, apply
from tiny_kinds import tiny_kind


def test_a_module_with_a_weight_norm_stays_and_its_factors_can_be_changed():
    model = tiny_kind("Wav2Vec2Model")
    convolution = model.encoder.pos_conv_embed.conv
    weight, sound = convolution.weight.detach().clone(), torch.randn(2, 400)
    called = []
    convolution.register_forward_hook(lambda *_: called.append(True))
    factors = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    edits = [ScaleParameter(parameter=f"{factors}{place}", factor=2.0) for place in (0, 1)]
    apply(Plan(method="hand", promise="approximate", edits=edits), model)
    assert model.encoder.pos_conv_embed.conv is convolution
    # The first factor is the norm, the second the direction.
    torch.testing.assert_close(convolution.weight.detach(), 2 * weight)
    called.clear()
    model(sound)
    assert called
