"""The examples do what they say."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import auxin
from stand_in import SENTENCE, SMOLLM2, write_stand_in

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


def test_smollm2_grows_deeper_and_answers_without_auxin(tmp_path, capsys, monkeypatch):
    source, output = tmp_path / "SmolLM2-135M-Instruct", tmp_path / "SmolLM2-33-layers"
    write_stand_in(source)
    example = EXAMPLES / "grow_smollm2.py"
    runpy.run_path(str(example))["grow"](source, output)
    assert "promise exact, measured change of a logit 0.0e+00" in capsys.readouterr().out
    monkeypatch.delenv("PYTHONPATH", raising=False)
    asked = [sys.executable, str(example), "--ask", str(source), str(output)]  # fails where auxin was imported
    answers = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert answers.splitlines() == [f"30 layers: {SENTENCE}", f"33 layers: {SENTENCE}"]


def test_the_readme_has_the_real_models_numbers(tmp_path):
    """On shapes alone: nothing is downloaded."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (parameters,) = re.findall(r"([\d,]+ -> [\d,]+) parameters", readme)
    LlamaConfig(**SMOLLM2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert parameters in str(auxin.plan(tmp_path, "llama-pro", layers=33))
