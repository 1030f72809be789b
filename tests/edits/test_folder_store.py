"""Applying plans to checkpoint folders."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import auxin.edits.folder_store
from auxin.edits import NormalFill, PadParameter, Plan, SetConfig, apply, apply_to_checkpoint
from auxin.errors import CheckpointError, PlanError, PromiseError
from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
from auxin.models.tokenformer import TokenFormerForCausalLM
from auxin.sums import has_sums
from auxin.training.checkpoint import write_checkpoint_folder
from edits.models import tiny_model, token_ids, trained


def save(model, folder, optimizer=None, **options):
    model.save_pretrained(folder, **options)
    if optimizer is not None:
        (folder / "training").mkdir()
        save_file(optimizer_tensors(model, optimizer), folder / "training" / "state.safetensors", {"format": "pt"})
    return folder


def optimizer_tensors(model, optimizer):
    tensors = {"rng.cpu": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for state, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{state}.{name}"] = tensor.clone()
    return tensors


def all_tensors(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def assert_equal_tensors(now, then):
    assert now.keys() == then.keys()
    for name in then:
        assert now[name].dtype == then[name].dtype
        assert torch.equal(now[name], then[name]), name


@pytest.mark.parametrize(
    ("regime", "dtype", "tied", "shards"),
    [
        ("grouped", torch.float32, True, "5GB"),
        ("grouped", torch.bfloat16, False, "10KB"),
        ("duplicate", torch.float64, True, "10KB"),
        ("zero_keys", torch.float32, False, "5GB"),
        ("official", torch.float16, True, "5GB"),
    ],
)
def test_a_checkpoint_grows_bit_by_bit_as_the_model_in_memory(regime, dtype, tied, shards, tmp_path):
    model = tiny_model(dtype=dtype, tie_word_embeddings=tied)
    optimizer = trained(model, amsgrad=True, eps=1e-3)  # float16 can not hold the default
    source = save(model, tmp_path / "old", optimizer, max_shard_size=shards)
    plan = plan_token_growth(model.config, TokenGrowth(qkv_tokens=36, ffn_tokens=60, regime=regime, seed=4))
    receipt = apply_to_checkpoint(plan, source, tmp_path / "new")
    reference = apply(plan, model, optimizer)
    save(model, tmp_path / "reference", optimizer, max_shard_size=shards)
    assert_equal_tensors(all_tensors(tmp_path / "new"), all_tensors(tmp_path / "reference"))
    assert_equal_tensors(load_file(tmp_path / "new/training/state.safetensors"), optimizer_tensors(model, optimizer))
    written, wanted = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("new", "reference"))
    assert written == wanted
    assert receipt.max_relative_change == reference.max_relative_change
    assert receipt.parameters_after == reference.parameters_after == model.num_parameters()
    loaded = TokenFormerForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert torch.equal(loaded(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)


def test_an_index_of_shards_tells_the_new_size(tmp_path):
    model = tiny_model()
    source = save(model, tmp_path / "old", max_shard_size="10KB")
    apply_to_checkpoint(plan_token_growth(model.config, TokenGrowth(ffn_tokens=60)), source, tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in all_tensors(tmp_path / "new").values())
    with safe_open(tmp_path / "new" / index["weight_map"]["model.norm.bias"], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "model.norm.bias" in file.keys()  # noqa: SIM118


def test_other_files_are_copied_and_the_source_stays(tmp_path):
    model = tiny_model()
    source = save(model, tmp_path / "old")
    others = {"tokenizer.json": "{}", "ledger.json": "[1]", "training/state.json": "{}", "notes/a.txt": "b"}
    for name, text in others.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    output = tmp_path / "deeper" / "new"
    output.mkdir(parents=True)  # an empty folder may be there
    apply_to_checkpoint(plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)), source, output)
    assert {name: (output / name).read_text() for name in others} == others
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["new"]


def test_a_broken_promise_and_an_interruption_leave_nothing_behind(tmp_path, monkeypatch):
    model = tiny_model()
    source = save(model, tmp_path / "old")
    broken = Plan(
        method="x",
        promise="exact",
        edits=[
            SetConfig(values={"ffn_tokens": [20, 10]}),
            PadParameter(parameter="model.layers.*.mlp.*", size=30, fill=NormalFill(std=1.0)),
        ],
    )
    with pytest.raises(PromiseError):
        apply_to_checkpoint(broken, source, tmp_path / "new")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(auxin.edits.folder_store.SafetensorsWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_to_checkpoint(broken, source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_folders_that_can_not_be_used_are_refused(tmp_path):
    model = tiny_model()
    plan = plan_token_growth(model.config, TokenGrowth(ffn_tokens=30))
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        apply_to_checkpoint(plan, tmp_path / "nowhere", tmp_path / "new")
    source = save(model, tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"old exists and is not empty"):
        apply_to_checkpoint(plan, source, source)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        apply_to_checkpoint(plan, source, tmp_path / "new")
    weights.rename(source / "model.bin")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        apply_to_checkpoint(plan, source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_output_inside_the_source_is_refused_before_anything_is_written(tmp_path):
    model = tiny_model()
    source = save(model, tmp_path / "old")
    before = sorted(source.rglob("*"))
    (tmp_path / "link").symlink_to(source)
    for output in (source / "new", source / "deep" / "new", tmp_path / "link" / "new"):
        with pytest.raises(CheckpointError, match="lies in the folder that is read"):
            apply_to_checkpoint(plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)), source, output)
    assert sorted(source.rglob("*")) == before


def test_older_copies_of_the_weights_stay_behind(tmp_path):
    model = tiny_model()
    source = save(model, tmp_path / "old")
    (source / "notes").mkdir()
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.pth", "notes/kept.bin"):
        (source / name).write_text("old")
    apply_to_checkpoint(plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)), source, tmp_path / "new")
    copies = {
        path.name for path in (tmp_path / "new").rglob("*") if path.suffix in {".bin", ".pth"} or ".bin." in path.name
    }
    assert copies == {"kept.bin"}


def test_unsigned_tensors_pass_and_unknown_types_are_refused(tmp_path):
    model = tiny_model()
    source = save(model, tmp_path / "old", trained(model))
    path = source / "training" / "state.safetensors"
    extra = {f"counts.{n}": torch.arange(5).to(getattr(torch, f"uint{n}")) for n in (16, 32, 64)}
    save_file({**load_file(path), **extra}, path)
    plan = plan_token_growth(model.config, TokenGrowth(ffn_tokens=30))
    apply_to_checkpoint(plan, source, tmp_path / "new")
    written = load_file(tmp_path / "new" / "training" / "state.safetensors")
    assert_equal_tensors({name: written[name] for name in extra}, extra)
    save_file({**load_file(path), "scales": torch.ones(4, dtype=torch.float8_e8m0fnu)}, path)
    with pytest.raises(CheckpointError, match="scales has the data type F8_E8M0"):
        apply_to_checkpoint(plan, source, tmp_path / "newer")
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model.norm.weight": torch.full((32,), float("inf"))}, PlanError, r"model\.norm\.weight holds 32 value"),
        (
            {"model.layers.1.mlp.key_tokens": torch.zeros(21, 32)},
            CheckpointError,
            r"1\.mlp\.key_tokens has shape \[21, 32\]",
        ),
        (
            {"model.layers.1.mlp.key_tokens": None},
            CheckpointError,
            r"holds no tensor model\.layers\.1\.mlp\.key_tokens",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_a_byte_is_written(change, error, message, tmp_path):
    model = tiny_model()
    source = save(model, tmp_path / "old")
    tensors = {**load_file(source / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        apply_to_checkpoint(plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)), source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_checkpoint_of_the_training_engine_grows_with_its_optimizer(tmp_path):
    model = tiny_model()
    optimizer = trained(model)
    write_checkpoint_folder(
        tmp_path / "old", model, optimizer=optimizer, tensors={"rng.cpu": torch.get_rng_state()}, state={"step": 3}
    )
    plan = plan_token_growth(model.config, TokenGrowth(qkv_tokens=20, ffn_tokens=44))
    apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    apply(plan, model, optimizer)
    wanted = {name: tensor for name, tensor in optimizer_tensors(model, optimizer).items() if name != "rng.cpu"}
    read = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    reader = HuggingFaceStorageReader(str(tmp_path / "new" / "training"))
    torch.distributed.checkpoint.load(read, storage_reader=reader, no_dist=True)
    assert_equal_tensors(read, wanted)
    assert (tmp_path / "new" / "training" / "state.json").exists()


def test_training_state_in_pieces_is_refused(tmp_path):
    model = tiny_model()
    source = save(model, tmp_path / "old", trained(model))
    path = source / "training" / "state.safetensors"
    pieces = {"DCP_SHARDING_INFO": json.dumps({"optimizer.exp_avg.model.norm.weight": {"saved_offsets": [16]}})}
    save_file(load_file(path), path, pieces)
    with pytest.raises(CheckpointError, match="pieces of tensors"):
        apply_to_checkpoint(plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)), source, tmp_path / "new")


@pytest.mark.parametrize(
    "text", ['{"saved_offsets"', '["saved_offsets"]', '{"a": "saved_offsets", "saved_offsets": 3}']
)
def test_training_state_whose_notes_are_damaged_is_refused_by_name(tmp_path, text):
    model = tiny_model()
    source = save(model, tmp_path / "old", trained(model))
    path = source / "training" / "state.safetensors"
    save_file(load_file(path), path, {"DCP_SHARDING_INFO": text})
    with pytest.raises(CheckpointError, match=r"state\.safetensors: its metadata can't be read"):
        apply_to_checkpoint(plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)), source, tmp_path / "new")


def test_old_sums_are_not_taken_for_those_of_the_new_files_and_a_changed_source_is_told(tmp_path):
    model = tiny_model()
    source = write_checkpoint_folder(tmp_path / "old", model)
    plan = plan_token_growth(model.config, TokenGrowth(ffn_tokens=44))
    assert apply_to_checkpoint(plan, source, tmp_path / "new").notes == []
    assert not has_sums(tmp_path / "new")
    (source / "generation_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"not as it was written: generation_config\.json"):
        receipt = apply_to_checkpoint(plan, source, tmp_path / "newer")
    assert len(receipt.notes) == 1
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match=r"old is damaged: .*model\.safetensors differs"):
        apply_to_checkpoint(plan, source, tmp_path / "newest")
    assert not (tmp_path / "newest").exists()
