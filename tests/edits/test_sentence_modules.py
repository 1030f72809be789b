"""Folders of sentence-transformers: what stands behind the model follows its hidden size, or is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from auxin.edits import apply_to_checkpoint
from auxin.errors import CheckpointError, PlanError
from auxin.methods import methods
from auxin.planning.method import plan_for
from tiny_models import inputs, tiny

TYPES = {
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Dense": "sentence_transformers.models.Dense",
    "2_LayerNorm": "sentence_transformers.models.LayerNorm",
    "3_LayerNorm": "sentence_transformers.models.LayerNorm",
    "3_Normalize": "sentence_transformers.models.Normalize",
}
POOLING = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}


def folder(path, *modules, features=32):
    """A folder with a tiny BERT and these modules behind it; two ways of pooling, so that vectors are twice as long."""
    tiny("bert", head="BertModel", dtype=torch.float32).save_pretrained(path)
    listed = [("0", "", "sentence_transformers.models.Transformer")]
    listed += [(str(number), name, TYPES[name]) for number, name in enumerate(modules, 1)]
    (path / "modules.json").write_text(
        json.dumps([{"idx": int(n), "name": n, "path": p, "type": t} for n, p, t in listed])
    )
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    for name in modules:
        (path / name).mkdir()
    if "1_Pooling" in modules:
        (path / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    if "2_Dense" in modules:
        config = {"in_features": features, "out_features": 5, "bias": True, "activation_function": "torch.nn.Tanh"}
        (path / "2_Dense" / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        weights = {"linear.weight": torch.randn(5, features), "linear.bias": torch.randn(5)}
        save_file(weights, path / "2_Dense" / "model.safetensors")
    return path


def grown(source, target, method, **settings):
    plan = plan_for(methods()[method], source, settings, folder=target.parent)
    return apply_to_checkpoint(plan, source, target)


def sentence(path):
    """What the folder says of the tiny inputs, by its files alone: model, pooling, dense."""
    model = BertModel.from_pretrained(path).eval()
    with torch.no_grad():
        states = model(**inputs(model)).last_hidden_state
    pooled = torch.cat([states.amax(1), states.mean(1)], dim=-1)
    config = json.loads((path / "1_Pooling" / "config.json").read_text())
    assert 2 * config["word_embedding_dimension"] == pooled.shape[-1]
    if not (path / "2_Dense").is_dir():
        return pooled
    config = json.loads((path / "2_Dense" / "config.json").read_text())
    weights = load_file(path / "2_Dense" / "model.safetensors")
    assert weights["linear.weight"].shape == (config["out_features"], config["in_features"])
    return torch.tanh(pooled @ weights["linear.weight"].T + weights["linear.bias"])


@pytest.mark.parametrize(
    ("method", "settings", "hidden"),
    [
        ("hypercloning", {"factor": 3}, 48),
        ("lemon", {"hidden_size": 32, "num_attention_heads": 4}, 32),
    ],
)
def test_pooling_and_dense_follow_a_wider_model(method, settings, hidden, tmp_path):
    source = folder(tmp_path / "old", "1_Pooling", "2_Dense", "3_LayerNorm")
    grown(source, tmp_path / "new", method, **settings)
    names = {path.relative_to(source) for path in source.rglob("*")}
    assert {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*")} == names
    for name in ("modules.json", "sentence_bert_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "new" / "1_Pooling" / "config.json").read_text())
    assert config == {**POOLING, "word_embedding_dimension": hidden}
    before, after = sentence(source), sentence(tmp_path / "new")
    assert (after - before).abs().max() < 1e-5


def test_the_similarity_of_copies_is_that_of_the_originals(tmp_path):
    source = folder(tmp_path / "old", "1_Pooling", "3_Normalize")
    grown(source, tmp_path / "new", "hypercloning", factor=2)
    cosines = [torch.nn.functional.cosine_similarity(*sentence(path), dim=0) for path in (source, tmp_path / "new")]
    assert cosines[0] < 0.999
    assert torch.isclose(*cosines, atol=1e-6)


def test_a_change_that_keeps_the_hidden_size_keeps_the_files(tmp_path):
    source = folder(tmp_path / "old", "1_Pooling", "2_LayerNorm")
    grown(source, tmp_path / "new", "net2net", intermediate_size=18)
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    assert torch.allclose(sentence(source), sentence(tmp_path / "new"), atol=1e-5)


def test_what_can_not_follow_is_refused_by_its_name_and_nothing_is_written(tmp_path):
    cases = {
        "norm": (
            ("1_Pooling", "2_LayerNorm"),
            {},
            r"2_LayerNorm \(LayerNorm, in modules.json\) works on vectors of 16",
        ),
        "odd": (("1_Pooling", "2_Dense"), {"features": 40}, r"2_Dense \(Dense.* vectors of 40, which are no whole num"),
    }
    for name, (modules, options, reason) in cases.items():
        source = folder(tmp_path / name, *modules, **options)
        with pytest.raises(PlanError, match=rf"hidden_size = 32: {reason}.*Leave the hidden size as it is"):
            grown(source, tmp_path / "new", "hypercloning", factor=2)
    source = folder(tmp_path / "drawn", "1_Pooling", "2_Dense")
    with pytest.raises(PlanError, match=r"2_Dense .* whose units this plan does not keep"):
        grown(source, tmp_path / "new", "ligo", num_attention_heads=5, steps=0)
    (source / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(PlanError, match=r"2_Dense .* has no model.safetensors"):
        grown(source, tmp_path / "new", "hypercloning", factor=2)
    (source / "modules.json").write_text("[{")
    with pytest.raises(CheckpointError, match=r"modules.json can't be read"):
        grown(source, tmp_path / "new", "hypercloning", factor=2)
    assert not (tmp_path / "new").exists()
