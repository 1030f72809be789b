"""What a checkpoint is said to be."""

import json

import pytest
import torch
from typer.testing import CliRunner

from auxin import cli
from auxin.accounting import flops_per_token
from auxin.errors import CheckpointError
from auxin.evaluation.inspection import describe_checkpoint
from auxin.models.loading import load_model
from tiny_models import tiny


def shown(folder) -> str:
    result = CliRunner().invoke(cli.app, ["show", str(folder)])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_model_of_text_has_all_sizes(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    c = model.config
    sizes = f"{c.num_hidden_layers} layers, hidden size {c.hidden_size}, {c.num_attention_heads} heads"
    assert shown(tmp_path).startswith(f"{family}: {sizes}, vocabulary {c.vocab_size:,} ")
    assert "FLOPs per token forward at" in shown(tmp_path)


def test_images_have_no_vocabulary_and_cost_per_sample(tmp_path):
    tiny("vit").save_pretrained(tmp_path)
    assert "vocabulary" not in shown(tmp_path)
    assert shown(tmp_path).endswith("FLOPs per sample forward")


def test_towers_have_their_own_sizes(tmp_path):
    tiny("clip").save_pretrained(tmp_path)
    text, vision = "2 layers, hidden size 16, 4 heads, vocabulary 19", "3 layers, hidden size 24, 3 heads"
    assert f"text_config: {text}" in shown(tmp_path)
    assert f"vision_config: {vision}" in shown(tmp_path)


def test_whisper_is_counted_at_the_tokens_that_its_decoder_takes(tmp_path):
    model = tiny("whisper")
    model.save_pretrained(tmp_path)
    found, tokens = describe_checkpoint(tmp_path), model.config.max_target_positions
    assert (found.unit, found.sequence_length) == ("sample", tokens)
    assert found.flops_per_token == flops_per_token(model, tokens).forward


def test_weights_that_are_cut_off_are_no_healthy_checkpoint(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read: .*Restore the file"):
        describe_checkpoint(tmp_path)
    weights.unlink()
    assert "holds no weights in safetensors files" in shown(tmp_path)


def test_a_pickle_of_more_than_tensors_is_refused_by_name(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"anything": [object]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="its weights are in a pickle"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [10**12, 2000])
def test_a_config_without_end_is_refused_at_once(tmp_path, size):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": size}))
    with pytest.raises(CheckpointError, match=rf"num_hidden_layers = {size}: so many take long to build"):
        describe_checkpoint(tmp_path)
