"""Training a part of a model: the rest stays to the last bit, through interruptions too."""

import pytest
import torch

from auxin.errors import CheckpointError, ConfigError
from auxin.training import TrainOnly, train
from training.tiny import MODELS, TinyData, checkpoint_bits, tiny_llama, tiny_settings


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("paths", "moving"),
    [
        (["model.layers.1"], "model.layers.1."),
        (["model.layers.*.mlp", "model.norm.weight"], ("model.layers.0.mlp.", "model.layers.1.mlp.", "model.norm.")),
    ],
)
def test_only_what_is_named_moves(tmp_path, paths, moving):
    model = tiny_llama()
    before = parameters(model)
    train(model, TinyData(), tiny_settings(steps=3), tmp_path, hooks=[TrainOnly(paths)], progress=False)
    for name, now in parameters(model).items():
        assert torch.equal(now, before[name]) != name.startswith(moving), name


def test_tied_parameters_are_trained_by_either_name(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters())
    TrainOnly(["lm_head"]).attach(model, optimizer)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


def test_frozen_parameters_lose_gradient_and_moments(tmp_path):
    model = MODELS["tokenformer"]()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    TrainOnly(["model.layers.0.mlp"]).attach(model, optimizer)
    for name, parameter in model.named_parameters():
        trained = name.startswith("model.layers.0.mlp")
        assert (parameter.grad is not None, bool(optimizer.state.get(parameter))) == (trained, trained), name


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def run(folder, **options):
        paths = ["model.layers.0", "lm_head"]
        return train(
            tiny_llama(),
            TinyData(),
            tiny_settings(steps=6),
            folder,
            hooks=[TrainOnly(paths)],
            progress=False,
            **options,
        )

    whole = run(tmp_path / "whole")
    run(tmp_path / "pieces", stop_after=3)
    pieces = run(tmp_path / "pieces")
    bits = checkpoint_bits(whole.checkpoint)
    assert bits == checkpoint_bits(pieces.checkpoint)
    assert not [name for name in bits if "exp_avg" in name and "layers.1" in name]
    with pytest.raises(CheckpointError, match=r"resumed with \['model\.norm'\]"):
        train(tiny_llama(), TinyData(), tiny_settings(steps=6), tmp_path / "pieces", hooks=[TrainOnly(["model.norm"])])


def test_paths_that_mean_nothing_are_refused():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"model\.layers\.2 is no module"):
        TrainOnly(["model.layers.1", "model.layers.2"]).attach(model, optimizer)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for wrong in ([], "model.layers.1"):
        with pytest.raises(ConfigError, match="a list of at least one path"):
            TrainOnly(wrong)
