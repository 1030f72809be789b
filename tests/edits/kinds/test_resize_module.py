"""Layers of another size: what stays of them, what goes with them, coming back, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

import auxin
from auxin.edits import Plan, ResizeModule, SliceParameter, apply, inverse_plan
from auxin.edits.kinds.fills import NormalFill
from auxin.edits.kinds.module_edits import shortest
from auxin.edits.kinds.parameter_edits import PadParameter
from auxin.edits.runtimes import about_runtimes
from auxin.edits.structure import structural_edits
from auxin.errors import PlanError
from auxin.nn.resizing import resized, size_of
from tiny_models import logits, tiny

LAYER = "resnet.encoder.stages.1.layers.0.layer"
KEPT = [0, 2, 3, 7, 11]


def narrow() -> Plan:
    """A block of a ResNet that keeps five of its twelve channels."""
    first, norm, second = f"{LAYER}.0.convolution", f"{LAYER}.0.normalization", f"{LAYER}.1.convolution"
    of_norm = [f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    slices = [(f"{first}.weight", 0), *((name, 0) for name in of_norm), (f"{second}.weight", 1)]
    return Plan(
        method="by hand",
        promise="none",
        edits=[
            ResizeModule(module=first, outputs=5),
            ResizeModule(module=norm, outputs=5),
            ResizeModule(module=second, inputs=5),
            *(SliceParameter(parameter=name, axis=axis, index=KEPT) for name, axis in slices),
        ],
    )


def silenced(model: Any) -> Any:
    """The model whose second convolution reads the same channels alone."""
    made = copy.deepcopy(model)
    gone = [channel for channel in range(12) if channel not in KEPT]
    with torch.no_grad():
        made.get_parameter(f"{LAYER}.1.convolution.weight")[:, gone] = 0
    return made


def refused(*edits: Any, model: Any = None) -> str:
    with pytest.raises(PlanError) as caught:
        apply(Plan(method="by hand", promise="none", edits=list(edits)), tiny("resnet") if model is None else model)
    return str(caught.value)


@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), bias=st.booleans())
def test_a_layer_of_another_size_is_like_the_old_one_in_all_else(outputs, inputs, bias):
    for layer, shape in (
        (nn.Linear(4, 6, bias), (outputs, inputs)),
        (Conv1D(6, 4), (outputs, inputs)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, bias=bias, padding_mode="reflect"), (outputs, inputs)),
        (nn.Conv1d(4, 6, 3, bias=bias), (outputs, inputs)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias), (outputs + 1, None)),  # of one channel it is any other
        (nn.BatchNorm2d(6, eps=0.1, momentum=0.3), (outputs, None)),
        (nn.LayerNorm(6, eps=0.1, bias=bias), (outputs, None)),
    ):
        layer = layer.double().eval()
        new = resized(layer, *shape)
        assert type(new) is type(layer)
        assert size_of(new) == shape
        assert not new.training
        assert {tensor.dtype for tensor in new.parameters()} == {torch.float64}
        assert [name for name, _ in new.named_parameters()] == [name for name, _ in layer.named_parameters()]
        same = ("eps", "momentum", "stride", "padding", "dilation", "padding_mode", "kernel_size")
        assert all(getattr(new, name, None) == getattr(layer, name, None) for name in same)


def test_a_block_without_some_channels_is_the_one_that_reads_the_others_alone(tmp_path):
    model = tiny("resnet")
    expected = logits(silenced(model))
    apply(narrow(), model)
    assert model.get_submodule(f"{LAYER}.0.convolution").out_channels == 5
    assert model.get_submodule(f"{LAYER}.0.normalization").num_features == 5
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))
    assert "layers of a size of their own" in about_runtimes(model.config)


def test_the_way_back_leaves_an_ordinary_model():
    model, old = tiny("resnet"), tiny("resnet")
    wider = [
        ResizeModule(module=f"{LAYER}.0.convolution", outputs=14),
        ResizeModule(module=f"{LAYER}.0.normalization", outputs=14),
        ResizeModule(module=f"{LAYER}.1.convolution", inputs=14),
        *(
            PadParameter(parameter=f"{LAYER}.{name}", axis=axis, size=14, fill=NormalFill())
            for name, axis in (
                ("0.convolution.weight", 0),
                ("0.normalization.weight", 0),
                ("0.normalization.bias", 0),
                ("0.normalization.running_mean", 0),
                ("1.convolution.weight", 1),
            )
        ),
        PadParameter(parameter=f"{LAYER}.0.normalization.running_var", size=14, fill={"kind": "mean"}),
    ]
    plan = Plan(method="by hand", promise="none", edits=wider)
    back = inverse_plan(plan, model)
    apply(plan, model)
    assert len(structural_edits(model.config)) == 3
    apply(back, model)
    assert structural_edits(model.config) == []
    assert torch.equal(logits(model), logits(old))


def test_later_sizes_win_and_the_others_stay():
    edits = [
        ResizeModule(module="a", outputs=3, inputs=4),
        ResizeModule(module="b", outputs=5),
        ResizeModule(module="a", inputs=2),
    ]
    assert shortest(edits) == [edits[1], ResizeModule(module="a", outputs=3, inputs=2)]


def test_what_can_t_be_resized_is_refused_with_the_reason():
    assert "has that size already" in refused(ResizeModule(module=f"{LAYER}.0.convolution", outputs=12))
    assert "is ResNetConvLayer, and what is given another size is" in refused(
        ResizeModule(module=f"{LAYER}.0", outputs=5)
    )
    assert "gives what it reads" in refused(ResizeModule(module=f"{LAYER}.0.normalization", inputs=5))
    assert "merge the two" in refused(*(ResizeModule(module=f"{LAYER}.0.convolution", outputs=n) for n in (5, 6)))
    assert "no module has this path" in refused(ResizeModule(module="resnet.nothing", outputs=5))
    # What reads the layer is not told, so that the shapes do not go together.
    said = refused(ResizeModule(module=f"{LAYER}.0.convolution", outputs=5))
    assert f"{LAYER}.0.convolution.weight has shape [12, 8, 3, 3]" in said
    with pytest.raises(ValidationError, match=r"neither outputs nor inputs is given\. Give one"):
        ResizeModule(module="a")


def test_a_plan_of_it_is_data():
    plan = Plan.model_validate(narrow().model_dump(mode="json"))
    assert plan == narrow()
    one, other = tiny("resnet"), tiny("resnet")
    apply(plan, one)
    auxin.apply(narrow(), other)
    assert torch.equal(logits(one), logits(other))
