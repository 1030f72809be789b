"""Folders in which tensors lie in another form than in the model: experts one by one, other names."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from auxin.edits import ArrangeLayers, Plan, apply, apply_to_checkpoint
from auxin.errors import CheckpointError
from auxin.methods import methods
from auxin.models.loading import load_model
from auxin.planning.bench import Bench
from layered_models import llava
from tiny_models import logits, tiny

# transformers' products of experts want rows of 16 bytes.
WIDE = {
    "mixtral": {"intermediate_size": 16},
    "qwen2_moe": {"moe_intermediate_size": 8},
    "qwen3_moe": {"moe_intermediate_size": 8},
    "olmoe": {"intermediate_size": 16},
    "granitemoe": {},
}


def all_tensors(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def assert_same_tensors(folder, other):
    now, then = all_tensors(folder), all_tensors(other)
    assert now.keys() == then.keys()
    assert [
        name for name in then if now[name].dtype != then[name].dtype or not torch.equal(now[name], then[name])
    ] == []


def saved(family, folder, **options):
    tiny(family, seed=3, dtype=torch.float32, **WIDE[family]).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize(
    ("family", "name", "shards"),
    [
        ("mixtral", "hypercloning", "5GB"),
        ("mixtral", "llama-pro", "4KB"),
        ("mixtral", "graft", "5GB"),
        ("qwen2_moe", "hypercloning", "4KB"),
        ("qwen2_moe", "stacking", "5GB"),
        ("qwen3_moe", "bert2bert", "5GB"),
        ("olmoe", "solar", "4KB"),
        ("granitemoe", "llama-pro", "5GB"),
    ],
)
def test_experts_in_a_folder_become_what_they_become_in_memory_and_lie_as_before(family, name, shards, tmp_path):
    source = saved(family, tmp_path / "old", max_shard_size=shards)
    model, method = load_model(source), methods()[name]
    plan = method.plan(Bench(model, folder=tmp_path), method.settings.parse(method.examples(model)))
    apply_to_checkpoint(plan, source, tmp_path / "new")
    apply(plan, model)
    model.save_pretrained(tmp_path / "reference")
    assert_same_tensors(tmp_path / "new", tmp_path / "reference")
    loaded = load_model(tmp_path / "new").state_dict()
    assert [key for key, value in model.state_dict().items() if not torch.equal(loaded[key], value)] == []


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe"])
@pytest.mark.parametrize("order", [[0], [1], [1, 0], [0, 1, 1]])
def test_experts_go_with_their_layers(family, order, tmp_path):
    source = saved(family, tmp_path / "old")
    plan = Plan(method="by hand", promise="none", edits=[ArrangeLayers(layers="model.layers", order=order)])
    apply_to_checkpoint(plan, source, tmp_path / "new")
    model = load_model(source)
    apply(plan, model)
    model.save_pretrained(tmp_path / "reference")
    assert_same_tensors(tmp_path / "new", tmp_path / "reference")


def test_new_layers_have_the_names_of_the_old_ones_in_a_model_of_several_parts(tmp_path):
    model = llava(torch.float32)
    model.save_pretrained(tmp_path / "old")
    assert any(name.startswith("language_model.model.layers.0.") for name in all_tensors(tmp_path / "old"))
    path = next(path for path, _ in model.named_modules() if path.endswith("language_model.layers"))
    count = len(model.get_submodule(path))
    plan = Plan(method="by hand", promise="none", edits=[ArrangeLayers(layers=path, order=[*range(count), 0])])
    apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    apply(plan, model)
    model.save_pretrained(tmp_path / "reference")
    assert_same_tensors(tmp_path / "new", tmp_path / "reference")


def without(name):
    return lambda tensors: tensors.pop(name)


def narrower(part):
    def change(tensors):
        for name in tensors:
            if part in name:
                tensors[name] = tensors[name][:-1].clone()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.block_sparse_moe.experts.2.w1.weight"), "layers.1.mlp.experts.gate_up_proj can't be"),
        (without("model.layers.1.block_sparse_moe.experts.2.w2.weight"), r"of shape \[3, 16, 16\], but config.json"),
        (narrower("layers.0.block_sparse_moe.experts.1.w2"), "layers.0.mlp.experts.down_proj can't be made"),
        (narrower(".w2."), r"of shape \[4, 15, 16\], but config.json says \[4, 16, 16\]"),
    ],
)
def test_experts_that_do_not_fit_are_refused_before_a_byte_is_written(change, message, tmp_path):
    source = saved("mixtral", tmp_path / "old")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = Plan(method="by hand", promise="none", edits=[ArrangeLayers(layers="model.layers", order=[1, 0])])
    with pytest.raises(CheckpointError, match=message):
        apply_to_checkpoint(plan, source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_the_written_model_computes_the_same(tmp_path):
    source = saved("mixtral", tmp_path / "old")
    model, method = load_model(source), methods()["hypercloning"]
    plan = method.plan(Bench(model, folder=tmp_path), method.settings.parse({"factor": 2}))
    before = logits(model)
    receipt = apply_to_checkpoint(plan, source, tmp_path / "new")
    assert receipt.max_relative_change is not None
    assert receipt.max_relative_change <= receipt.tolerance
    after = logits(load_model(tmp_path / "new"))
    assert ((after - before).abs().max() / before.abs().max()).item() < 1e-5
