"""What a checkpoint is said to be."""

import pytest
from typer.testing import CliRunner

from auxin import cli
from auxin.accounting import flops_per_token
from auxin.evaluation.inspection import describe_checkpoint
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
