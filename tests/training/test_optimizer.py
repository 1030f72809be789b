"""Parameter groups, AdamW's update against its definition, and moments by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from auxin.errors import CheckpointError
from auxin.models.pieces import StoredTensors
from auxin.training.optimizer import build_optimizer, optimizer_tensors, parameter_groups, restore_optimizer
from training.tiny import MODELS, stepped, tiny_llama, tiny_settings


@pytest.mark.parametrize("kind", MODELS)
def test_groups_hold_every_parameter_once_and_spare_vectors_from_decay(kind):
    model = MODELS[kind]()
    decaying, others = parameter_groups(model, 0.1)
    ids = [id(p) for group in (decaying, others) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    spared = {id(p) for p in others["params"]}
    for name, parameter in model.named_parameters():
        vector = "norm" in name or ".ln_" in name or name.endswith("bias")
        assert (id(parameter) in spared) == vector, name


def test_tied_and_frozen_parameters():
    model = tiny_llama(tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    ids = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert ids.count(id(model.lm_head.weight)) == 1
    assert len(ids) == len(set(ids)) == len(list(model.parameters())) - 1
    assert id(model.model.norm.weight) not in ids


def test_stacked_biases_do_not_decay():
    model = torch.nn.Module()
    model.experts_bias = torch.nn.Parameter(torch.ones(3, 4))
    assert parameter_groups(model, 0.1)[0]["params"] == []


def test_update_is_adamw():
    """Two steps of Loshchilov & Hutter 2019, algorithm 2, in float64 from the formula."""
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    model = torch.nn.Module()
    model.weight = parameter
    settings = tiny_settings(steps=1, learning_rate=0.1, adam_betas=(0.8, 0.9), adam_epsilon=1e-8, weight_decay=0.5)
    optimizer = build_optimizer(model, settings)
    x = parameter.detach().double()
    m = v = torch.zeros_like(x)
    for t, gradient in enumerate(([[0.3, -1.0]], [[-0.2, 4.0]]), start=1):
        g = torch.tensor(gradient, dtype=torch.float64)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x = x - 0.1 * 0.5 * x - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        parameter.grad = g.float()
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), x, atol=1e-6, rtol=1e-6)


def stored(tensors: dict[str, Tensor], folder: Path) -> StoredTensors:
    """The tensors, written to a file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "moments.safetensors")
    return StoredTensors(folder)


def test_moments_move_by_name(tmp_path):
    model, optimizer = stepped(0)
    tensors = optimizer_tensors(model, optimizer)
    assert len(tensors) == 3 * len(list(model.parameters()))
    other = tiny_llama(1)
    target = build_optimizer(other, tiny_settings(steps=1))
    assert restore_optimizer(other, target, stored(tensors, tmp_path)) == []
    again = optimizer_tensors(other, target)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


def test_missing_moments_start_fresh_and_are_named(tmp_path):
    model, optimizer = stepped(0)
    tensors = {k: v for k, v in optimizer_tensors(model, optimizer).items() if not k.endswith(".lm_head.weight")}
    target = build_optimizer(model, tiny_settings(steps=1))
    assert restore_optimizer(model, target, stored(tensors, tmp_path)) == ["lm_head.weight"]
    assert model.lm_head.weight not in target.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"optimizer.exp_avg.lm_head.weight": torch.zeros(3, 3)}), r"lm_head.*\(3, 3\).*\(64, 32\)"),
        (lambda t: t.update({"optimizer.exp_avg.ghost": torch.zeros(3)}), "ghost.*does not exist"),
        (lambda t: t.pop("optimizer.step.lm_head.weight"), "lm_head.weight lacks step"),
    ],
)
def test_moments_of_another_model_are_refused(tmp_path, change, message):
    model, optimizer = stepped(0)
    tensors = optimizer_tensors(model, optimizer)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        restore_optimizer(model, optimizer, stored(tensors, tmp_path))
