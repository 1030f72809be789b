"""Checkpoints in pieces: written by several processes while they train, read by any number of them, made whole."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import auxin
from auxin.accounting import Ledger
from auxin.cli.app import app
from auxin.edits.saved import save_configs, save_model, save_weights
from auxin.errors import CheckpointError
from auxin.models.pieces import StoredTensors, stored_pieces
from auxin.training import latest_checkpoint
from auxin.training.whole import whole_checkpoint
from edits.replaced_linear import REPLACED
from mixtures import mixture
from tiny_models import tiny
from training.servers import served
from training.tiny import checkpoint_bits, read_metrics

SETTINGS = {"steps": 24, "batch_size": 8, "warmup_steps": 5, "checkpoint_interval": 6, "evaluation_interval": 12}
SHARDED = {**SETTINGS, "strategy": "sharded"}
Run = Callable[..., dict]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Ask the server for a run, which must end well unless it is asked for its answer."""
    with served("ranks_server.py") as ask:

        def asked(folder: Path, size: int, answer: bool = False, **request: object) -> dict:
            found = ask({"model": "tied", **request, "folder": str(folder), "size": size, "scenario": "train"})
            assert answer or not any(found["codes"]), found["messages"]
            return found

        yield asked


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory) -> Path:
    """Three processes, stopped after step 20: the checkpoints of steps 6 to 20 are in pieces."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(folder, 3, settings={**SHARDED, "keep_checkpoints": 2}, stop_after=20)
    return folder


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> tuple[Path, Path]:
    """One process: stopped after step 20, and at its end."""
    folders = tmp_path_factory.mktemp("alone")
    run(folders / "stopped", 1, settings=SETTINGS, stop_after=20)
    run(folders / "ended", 1, settings=SETTINGS)
    return folders / "stopped", folders / "ended"


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    """A run to go on with, or to damage."""
    return shutil.copytree(stopped, tmp_path / "run")


def apart(one: Path, other: Path) -> float:
    """How far the tensors of two whole checkpoints lie apart at most."""
    worst = 0.0
    for name in ("model.safetensors", "training/state.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        worst = max(worst, *(float((a[key] - b[key]).abs().max()) for key in a if a[key].is_floating_point()))
    return worst


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_each_process_writes_what_lies_in_it(stopped):
    """Every element of every tensor stands in one file, once; about a third of them in each."""
    checkpoint = latest_checkpoint(stopped)
    assert not list(checkpoint.glob("*.safetensors"))
    files = sorted((checkpoint / "pieces").iterdir())
    assert [file.name for file in files] == [f"0000{rank}-of-00003.safetensors" for rank in range(3)]
    sizes = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    whole = stored_pieces(checkpoint)
    assert sum(sizes) == sum(torch.Size(shape).numel() for shape in whole.shapes.values())
    assert max(sizes) < 1.1 * sum(sizes) / 3


def test_made_whole_it_is_the_checkpoint_of_one_process(stopped, alone, tmp_path):
    """By `auxin export`, too: the same files, the same tensors but for rounding; other tools load it."""
    source, expected = latest_checkpoint(stopped), latest_checkpoint(alone[0])
    whole = whole_checkpoint(source, tmp_path / "whole")
    assert names(whole) == names(expected)
    assert apart(whole, expected) < 1e-10
    assert (whole / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    done = CliRunner().invoke(app, ["export", str(source), "-o", str(tmp_path / "exported")])
    assert done.exit_code == 0, done.output
    assert checkpoint_bits(tmp_path / "exported") == checkpoint_bits(whole)
    grown = auxin.apply(auxin.plan(whole, "stacking", layers=4), whole, output=tmp_path / "grown")
    assert grown.parameters_after > grown.parameters_before


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["sharded", "replicated"])
def test_any_number_of_processes_goes_on_from_it(run, copied, alone, size, strategy):
    """In pieces or as copies; the end is whole, and that of one process but for rounding."""
    run(copied, size, settings={**SETTINGS, "strategy": strategy})
    assert apart(latest_checkpoint(copied), latest_checkpoint(alone[1])) < 1e-10
    assert not (latest_checkpoint(copied) / "pieces").exists()


def test_equally_many_processes_end_in_the_bits_of_a_run_that_was_not_stopped(run, copied, tmp_path):
    run(copied, 3, settings=SHARDED)
    run(tmp_path / "whole", 3, settings=SHARDED)
    assert checkpoint_bits(latest_checkpoint(copied)) == checkpoint_bits(latest_checkpoint(tmp_path / "whole"))


def test_training_goes_on_while_a_process_still_writes(run, stopped, tmp_path):
    """The checkpoint gets its name when the last one is done, and nothing else changes."""
    slow = tmp_path / "run"
    # Its pieces of step 6 are written when step 9 has begun, or the run fails.
    run(slow, 3, settings={**SHARDED, "keep_checkpoints": 2}, stop_after=20, until=[1, 6, 9])
    assert read_metrics(slow) == read_metrics(stopped)
    assert names(latest_checkpoint(slow)) == names(latest_checkpoint(stopped))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_full_disk_of_one_process_ends_all_and_leaves_what_was_saved(run, tmp_path, alone, rank):
    """Told by the one that has it, and by the others with its number; the run goes on when there is room."""
    folder = tmp_path / "run"
    answer = run(folder, 3, answer=True, settings=SHARDED, full=[rank, 12])
    assert answer["codes"] == [1, 1, 1]
    own = answer["messages"].pop(rank)
    assert re.match(r"CheckpointError: .*step-00000012 could not be saved: .*No space left on device", own)
    for message in answer["messages"]:
        assert message == own.replace("CheckpointError: ", f"TrainingError: process {rank} of 3: ")
    assert latest_checkpoint(folder).name == "step-00000006"
    assert [path.name for path in (folder / "checkpoints").glob(".*")] == []
    run(folder, 3, settings=SHARDED)
    assert apart(latest_checkpoint(folder), latest_checkpoint(alone[1])) < 1e-10


def test_a_kill_while_pieces_are_written_leaves_what_was_saved(run, tmp_path):
    """The same command goes on from the checkpoint before, and ends in the same bits."""
    folder = tmp_path / "run"
    answer = run(folder, 3, answer=True, settings=SETTINGS | {"strategy": "sharded"}, slow=[1, 1.5], kill=[2, 13])
    assert answer["codes"][2] == -9
    assert latest_checkpoint(folder).name == "step-00000006"
    run(folder, 3, settings=SHARDED)
    run(tmp_path / "whole", 3, settings=SHARDED)
    assert checkpoint_bits(latest_checkpoint(folder)) == checkpoint_bits(latest_checkpoint(tmp_path / "whole"))
    assert not list((folder / "checkpoints").glob(".*.tmp"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
def test_a_damaged_piece_is_found_and_the_run_goes_back(run, copied, alone, harm):
    """The one before is whole; what was damaged is kept aside, and the books say it."""
    harm(latest_checkpoint(copied) / "pieces" / "00001-of-00003.safetensors")
    run(copied, 2, settings=SHARDED)
    assert apart(latest_checkpoint(copied), latest_checkpoint(alone[1])) < 1e-10
    assert (copied / "checkpoints" / "damaged-step-00000020").is_dir()
    notes = Ledger.load(latest_checkpoint(copied)).stages[-1].notes
    assert any("00001-of-00003.safetensors" in note and "gone back to step-00000018" in note for note in notes)


def without_sums(run_folder: Path) -> Path:
    """The newest checkpoint, of which nothing says any more what its files must be."""
    checkpoint = latest_checkpoint(run_folder)
    (checkpoint / "SHA256SUMS").unlink()
    state = json.loads((checkpoint / "training" / "state.json").read_text())
    state.pop("summed_files")
    (checkpoint / "training" / "state.json").write_text(json.dumps(state))
    return checkpoint


def other_model(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.transformer.another.weight"] = torch.zeros(2, 2)
    offsets = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [0] * t.dim()} for name, t in tensors.items()})}
    save_file(tensors, file, metadata=offsets)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "is damaged"),
        (Path.unlink, r"does not hold one file of each process, but 00001-of-00003.safetensors, 00002-of-"),
        (other_model, r"model.transformer.another.weight has shape \(2, 2\) there and None in the model given"),
    ],
)
def test_what_does_not_fit_is_named_where_no_sum_tells(copied, tmp_path, harm, message):
    checkpoint = without_sums(copied)
    harm(checkpoint / "pieces" / "00000-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=message):
        whole_checkpoint(checkpoint, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_who_can_not_read_pieces_says_what_makes_them_whole(stopped, alone, tmp_path):
    source = latest_checkpoint(stopped)
    plan = auxin.plan(latest_checkpoint(alone[0]), "stacking", layers=4)
    wanted = f"auxin export {re.escape(str(source))} -o FOLDER"
    with pytest.raises(CheckpointError, match=wanted):
        auxin.load(source)
    refused = CliRunner().invoke(app, ["export", str(source), "-o", str(tmp_path / "small.gguf")])
    assert re.search(wanted, str(refused.exception))
    with pytest.raises(CheckpointError, match=wanted):
        auxin.apply(plan, source, output=tmp_path / "grown")


def test_what_is_whole_is_not_made_whole(alone, tmp_path):
    with pytest.raises(CheckpointError, match="is whole already"):
        whole_checkpoint(latest_checkpoint(alone[0]), tmp_path / "whole")


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "tokenformer", "bert", "mixtral", "edited"])
def test_weights_written_one_by_one_are_those_of_a_folder_written_at_once(tmp_path, family):
    """Names, tied ones, experts that lie one by one, the names that replaced modules ask for."""
    model = mixture(family) if family == "mixtral" else tiny("llama" if family == "edited" else family)
    if family == "edited":
        auxin.apply(REPLACED, model)
    folders = [tmp_path / name for name in ("at-once", "one-by-one")]
    for folder in folders:
        folder.mkdir()
    save_model(model, folders[0])
    save_configs(model, folders[1])
    tensors = model.state_dict()
    save_weights(model, tensors.__getitem__, folders[1])
    assert names(folders[0]) == names(folders[1])
    found = [StoredTensors(folder) for folder in folders]
    assert found[0].shapes == found[1].shapes
    for name in found[0].shapes:
        assert torch.equal(found[0].read(name)[name], found[1].read(name)[name])
    for name in names(folders[0]):
        assert name.endswith(".safetensors") or (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert torch.equal(*(next(auxin.load(folder).parameters()) for folder in folders))
