"""Batches whose samples have different numbers of targets: every target weighs the same; none at all is a bad step."""

import pytest
import torch

from auxin.data import make_loader
from auxin.errors import TrainingError
from auxin.objectives.causal import Causal, CausalObjective
from auxin.objectives.objective import IGNORED
from auxin.training import train
from training.tiny import Look, TinyData, read_metrics, tiny_llama, tiny_settings, weights


class _Half(CausalObjective):
    """Predicts even tokens alone, and nothing of contexts that begin with a multiple of three."""

    def inputs(self, batch, noise):
        ids = batch["input_ids"]
        return {"input_ids": ids, "labels": ids.masked_fill((ids % 2 == 1) | (ids[:, :1] % 3 == 0), IGNORED)}


class Half(Causal):
    def _bound(self, config, form, references):
        return _Half(config, form)


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_micro_batches_with_different_numbers_of_targets_weigh_by_them(tmp_path, micro):
    """The gradient is that of the mean over all targets, though one micro-batch has none."""
    look, data = Look(), TinyData()
    options = {"steps": 1, "batch_size": 8, "micro_batch_size": micro, "gradient_clip": None, "warmup_steps": 0}
    settings = tiny_settings(objective=Half(), decay_fraction=0.0, **options)
    train(tiny_llama(), data, settings, tmp_path, hooks=[look], progress=False)
    inputs = _Half(None, data.form).inputs(next(iter(make_loader(data.split("train"), 8, seed=0))), None)
    counts = (inputs["labels"][:, 1:] != IGNORED).sum(dim=1)
    assert counts.min() == 0
    assert len(set(counts.tolist())) > 2 or micro is None
    model = tiny_llama().train()
    logits, labels = model(input_ids=inputs["input_ids"]).logits[:, :-1].double(), inputs["labels"][:, 1:]
    wanted = labels != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[wanted], labels[wanted])
    loss.backward()
    for got, expected in zip(look.gradients[0], model.parameters(), strict=True):
        torch.testing.assert_close(got, expected.grad, atol=1e-6, rtol=1e-4)
    line = next(line for line in read_metrics(tmp_path) if "loss" in line)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)


class _Nothing(CausalObjective):
    def inputs(self, batch, noise):
        return {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["input_ids"], IGNORED)}


class Nothing(Causal):
    def _bound(self, config, form, references):
        return _Nothing(config, form)


def test_a_batch_without_a_target_is_a_bad_step(tmp_path):
    model = tiny_llama()
    with pytest.raises(TrainingError, match=r"more than 3 bad steps.*the last: the loss is nan"):
        train(
            model,
            TinyData(),
            tiny_settings(steps=9, objective=Nothing()),
            tmp_path,
            measured_objective=Causal(),
            progress=False,
        )
    assert torch.equal(weights(model), weights(tiny_llama()))
