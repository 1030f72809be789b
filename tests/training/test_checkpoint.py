"""Checkpoint folders: whole or not at all, loadable by transformers, clear about what is wrong with them."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM

import auxin
from auxin.accounting.ledger import Ledger, StageRecord
from auxin.edits import Plan, WrapModule, apply
from auxin.errors import CheckpointError
from auxin.nn.bricks import Brick, brick
from auxin.sums import SUMS_FILE
from auxin.training import latest_checkpoint, load_model, load_optimizer, write_checkpoint_folder
from auxin.training.checkpoint import load_weights, read_state, read_training
from auxin.training.optimizer import optimizer_tensors
from auxin.training.run_folder import name_latest, prune_checkpoints
from training.tiny import MODELS, bits, stepped, tiny_llama, tiny_settings, weights


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_what_was_written(tmp_path, kind):
    model = MODELS[kind]()
    folder = write_checkpoint_folder(tmp_path / "c", model)
    ids = torch.arange(16)[None]
    expected = model.eval()(input_ids=ids).logits
    for loaded in (load_model(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert type(loaded) is type(model)
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_everything_comes_back(tmp_path):
    model, optimizer = stepped()
    ledger = Ledger(stages=[StageRecord(name="a", kind="build", parameters=5)])
    folder = write_checkpoint_folder(
        tmp_path / "c", model, ledger=ledger, optimizer=optimizer, tensors={"x": torch.arange(3)}, state={"step": 7}
    )
    assert Ledger.load(folder) == ledger
    assert read_state(folder) == {"step": 7}
    assert torch.equal(read_training(folder)["x"], torch.arange(3))
    restored = load_optimizer(folder, model, tiny_settings(steps=1))
    before, after = optimizer_tensors(model, optimizer), optimizer_tensors(model, restored)
    assert before.keys() == after.keys()
    assert all(bits(before[key]) == bits(after[key]) for key in before)
    # Named as documented, in safetensors and nothing else.
    (file,) = (folder / "training").glob("*.safetensors")
    assert "optimizer.exp_avg_sq.model.layers.0.mlp.up_proj.weight" in load_file(file)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_FILE]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    other = tiny_llama(1)
    load_weights(folder, other)
    assert bits(weights(other)) == bits(weights(model))


@pytest.fixture
def written_by_dcp(tmp_path) -> Path:
    """A checkpoint whose moments torch.distributed.checkpoint has written, as Auxin's once were; and those."""
    model, optimizer = stepped()
    folder = write_checkpoint_folder(tmp_path / "dcp", model, state={"step": 7})
    moments = optimizer_tensors(model, optimizer)
    dcp.save(moments, storage_writer=HuggingFaceStorageWriter(path=str(folder / "training")), no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_distributed_checkpoint_has_written_is_read_and_grown(written_by_dcp, tmp_path):
    model, optimizer = stepped()
    ours = write_checkpoint_folder(tmp_path / "ours", model, optimizer=optimizer)
    expected = optimizer_tensors(model, optimizer)
    plan = auxin.plan(ours, "hypercloning", factor=2)
    grown = []
    for folder in (written_by_dcp, ours):
        found = read_training(folder)
        assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in expected.items()}
        auxin.apply(plan, folder, output=tmp_path / f"grown-{folder.name}")
        tensors = read_training(tmp_path / f"grown-{folder.name}")
        grown.append({name: bits(tensor) for name, tensor in tensors.items()})
    assert grown[0] == grown[1]
    name = "optimizer.exp_avg.model.norm.weight"
    assert len(grown[0][name]) == 2 * len(bits(expected[name]))


def test_tensors_in_one_memory_and_transposed_ones_come_back(tmp_path):
    table = torch.arange(12.0).view(3, 4)
    tensors = {"a": table, "b": table[1:], "c": table.T, "d": table, "e": torch.zeros(0), "f": torch.tensor(3.0)}
    folder = write_checkpoint_folder(tmp_path / "c", tiny_llama(), tensors=tensors)
    found = read_training(folder)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_bricks_hear_of_buffers_that_were_overwritten(tmp_path):
    @brick("test_counts")
    class Counts(Brick):
        """Keeps in a plain number what a saved buffer says."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.number = inner, 0
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def reset_buffers(self) -> None:
            self.count = torch.zeros((), dtype=torch.long)

        def overwritten_with(self, other) -> None:
            self.number = int(self.count)

        def forward(self, x):
            return self.inner(x)

    def model():
        found = tiny_llama(0)
        edit = WrapModule(module="model.layers.0.mlp", brick="test_counts")
        apply(Plan(method="by hand", promise="exact", edits=[edit]), found)
        return found

    saved, other = model(), model()
    saved.get_submodule("model.layers.0.mlp").count.fill_(7)
    load_weights(write_checkpoint_folder(tmp_path / "c", saved), other)
    assert other.get_submodule("model.layers.0.mlp").number == 7


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_no_failure_harms_what_was_there(tmp_path, monkeypatch, operation):
    """Fail each call of a save in turn: the folder is the old one to the byte, or the new one."""
    target = write_checkpoint_folder(tmp_path / "run" / "c", tiny_llama(0), state={"old": True})
    old = contents(target)
    new = contents(write_checkpoint_folder(tmp_path / "new" / "c", tiny_llama(1), state={"old": False}))
    real = getattr(os, operation)
    for failing in range(1, 100):
        calls = 0

        def fail(*arguments, failing=failing, **options):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, operation, fail)
            try:
                write_checkpoint_folder(target, tiny_llama(1), state={"old": False})
                message = ""
            except CheckpointError as error:
                message = str(error)
        assert [path.name for path in target.parent.iterdir()] == ["c"]
        if calls < failing:
            break
        assert "No space left on device" in message
        assert "Free space" in message
        assert contents(target) in (old, new)
    # The loop ended because a save went through, after each of its calls had failed once.
    assert message == ""
    assert failing > {"fsync": 5, "rename": 2}[operation]
    assert contents(target) == new


def test_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    folder = write_checkpoint_folder(tmp_path / "checkpoints" / "step-00000001", tiny_llama())
    name_latest(tmp_path, folder)
    assert latest_checkpoint(tmp_path) == folder
    assert (tmp_path / "latest").read_text() == "checkpoints/step-00000001\n"
    (tmp_path / "latest").write_text("checkpoints/step-00000002\n")
    with pytest.raises(CheckpointError, match=r"step-00000002.*does not exist.*there are: step-00000001"):
        latest_checkpoint(tmp_path)


def test_prune_keeps_the_named_and_strangers_and_sweeps_the_half_written(tmp_path):
    folder = tmp_path / "checkpoints"
    ours = ["step-00000001", "step-00000002", f".step-00000003.{'0' * 32}.tmp"]
    strangers = ["step-00000002 (copy)", "best", ".cache", "step-1"]
    for name in ours + strangers:
        (folder / name).mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "step-00000004").write_text("a file")
    prune_checkpoints(tmp_path, {"step-00000002"})
    left = {path.name for path in folder.iterdir()}
    assert left == {"step-00000002", *strangers, "notes.txt", "step-00000004"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "read", "message"),
    [
        (lambda c: shutil.rmtree(c), load_model, "does not exist"),
        (lambda c: (c / "config.json").unlink(), load_model, "no config.json"),
        (lambda c: (c / "config.json").write_text("{"), load_model, "config.json can't be read"),
        (lambda c: (c / "model.safetensors").unlink(), load_model, "can't be loaded as LlamaForCausalLM"),
        (lambda c: cut(c / "model.safetensors"), load_model, "can't be loaded as LlamaForCausalLM"),
        (lambda c: shutil.rmtree(c / "training"), read_state, "a model without training state"),
        (lambda c: shutil.rmtree(c / "training"), read_training, "no optimizer state"),
        (lambda c: cut(c / "training/state.json"), read_state, "can't be read"),
        (lambda c: (c / "training/state.json").write_text("3"), read_state, "holds no mapping"),
        (lambda c: cut(next((c / "training").glob("*.safetensors"))), read_training, "is damaged"),
    ],
)
def test_a_damaged_folder_says_so(tmp_path, harm, read, message):
    model, optimizer = stepped()
    folder = write_checkpoint_folder(tmp_path / "c", model, optimizer=optimizer, state={"step": 1})
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_weights_of_another_structure_are_refused(tmp_path):
    folder = write_checkpoint_folder(tmp_path / "c", tiny_llama(intermediate_size=96))
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.weight has shape \(32, 96\) there and \(32, 64\)"):
        load_weights(folder, tiny_llama())
