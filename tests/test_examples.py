"""The examples do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_a_model_grows_in_the_middle_of_a_trainers_run(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    example = runpy.run_path(str(EXAMPLES / "trainer.py"))
    one, two = (example[way](tmp_path / way) for way in ("grown_in_one_run", "grown_between_two_runs"))
    for run in (one, two):
        assert run.model.config.hidden_size == 64
        assert run.state.global_step == example["STEPS"]
        moments = run.optimizer.state[run.model.model.embed_tokens.weight]
        assert moments["exp_avg"].shape == (64, 64)
        assert moments["step"] == example["STEPS"], "they were carried along"
    # Both went on alike: with the same data, rates and moments.
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
