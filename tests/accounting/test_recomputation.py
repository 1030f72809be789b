"""Layers that are computed again in the backward pass: the same bits, and less memory."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from auxin.accounting import training_memory
from auxin.accounting.recomputation import check_recomputable, recomputed
from auxin.errors import ConfigError
from auxin.nn.autocast import bfloat16_autocast
from tiny_models import MODELS, inputs, tiny
from training.tiny import tiny_gpt2, tiny_llama, tiny_tokenformer

DECODERS = {
    "llama": partial(tiny_llama, num_hidden_layers=6),
    "tokenformer": tiny_tokenformer,
    "dropout": tiny_gpt2,
}
REFUSED = {"albert", "mpnet", "resnet", "resnet bottlenecks"}


def gradients(model: nn.Module, again: bool, **given: torch.Tensor) -> list[torch.Tensor]:
    model.train().zero_grad()
    torch.manual_seed(3)
    with recomputed(model, again):
        output = model(**given)
        loss = output.loss if "labels" in given else output[0].square().mean()
        loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", MODELS)
def test_gradients_of_every_architecture_are_the_same_to_the_bit(family):
    """T5's are not by transformers' own switch."""
    model = tiny(family).train()
    model.config.apply_spec_augment = False  # of sound, which is too short here
    if family in REFUSED:
        with pytest.raises(ConfigError, match="transformers computes no layer of"):
            check_recomputable(model)
        return
    check_recomputable(model)
    plain, again = (gradients(model, how, **inputs(model)) for how in (False, True))
    assert plain
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_dropout_draws_the_same_numbers_and_products_are_of_the_same_type(name, bfloat16):
    model, ids = DECODERS[name](), torch.arange(64).view(4, 16)

    def run(again: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        model.train().zero_grad()
        torch.manual_seed(3)
        with recomputed(model, again):
            with bfloat16_autocast("cpu", bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        return [parameter.grad for parameter in model.parameters()], torch.rand(3)

    (plain, drawn), (again, drawn_again) = run(False), run(True)
    assert all(map(torch.equal, plain, again))
    assert torch.equal(drawn, drawn_again), "what is drawn afterwards does not depend on it"


def tracked(model: nn.Module, again: bool, ids: torch.Tensor) -> int:
    """The peak of a pass by torch's own tracker, beyond parameters and gradients that are there before."""
    gradients(model, again, input_ids=ids, labels=ids)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        before = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
        with recomputed(model, again):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before)


@pytest.mark.parametrize("name", DECODERS)
def test_the_peak_falls_and_is_what_is_computed_on_shapes(name):
    """With six layers to less than half; of two layers one is kept while it is computed again."""
    model, ids = DECODERS[name](), torch.arange(64).view(4, 16)
    peaks = [tracked(model, again, ids) for again in (False, True)]
    assert peaks[1] < (0.4 if name == "llama" else 0.8) * peaks[0]
    for again, peak in enumerate(peaks):
        assert training_memory(model, 4, 16, recompute=bool(again)).activations == pytest.approx(peak, rel=0.2)


def test_the_switch_is_left_as_it_was():
    """Off, on, or never set."""
    model = tiny_llama()
    model.model.layers[1].gradient_checkpointing = True
    model.model.layers[1]._gradient_checkpointing_func = len
    before = [dict(vars(module)) for module in model.modules()]
    with recomputed(model):
        assert model.model.layers[0].gradient_checkpointing
    assert [dict(vars(module)) for module in model.modules()] == before


def test_what_would_have_no_effect_or_another_is_refused():
    """An architecture of one piece; statistics that would count a batch twice."""
    plain = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, image_size=32))
    with pytest.raises(ConfigError, match="computes no layer of MobileNetV2ForImageClassification again"):
        check_recomputable(plain)
    model = tiny_llama()
    model.model.layers[1].mlp.norm = nn.BatchNorm1d(4)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.norm is a batch norm"):
        check_recomputable(model)
