"""What a run goes on from when its checkpoints are damaged, gone, or have strangers among them."""

import shutil
from pathlib import Path

import pytest
import torch

from auxin.accounting import Ledger
from auxin.errors import CheckpointError
from auxin.objectives.objective import Reference
from auxin.sums import SUMS_FILE, remove_sums
from auxin.training import GuardSettings, latest_checkpoint, train
from auxin.training.run_folder import SINCE_FILE, write_since
from training.tiny import TinyData, checkpoint_bits, poisoned_llama, stepped, tiny_llama, tiny_settings

SETTINGS = {"steps": 6, "checkpoint_interval": 2, "keep_checkpoints": 9}


def go(folder: Path, stop_after: int | None = None, **changes):
    return train(
        tiny_llama(), TinyData(), tiny_settings(**SETTINGS, **changes), folder, stop_after=stop_after, progress=False
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return go(tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run that has saved steps 0, 2, 4 and 5."""
    go(tmp_path / "run", stop_after=5)
    return tmp_path / "run"


def kill_at_the_start(run: Path, monkeypatch) -> None:
    """Kill the run after it has chosen its checkpoint, and before it goes on."""

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("auxin.training.keeper.MetricsLog", killed)
        with pytest.raises(KeyboardInterrupt):
            go(run)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def harm(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def notes(result) -> list[str]:
    return Ledger.load(result.checkpoint).stages[-1].notes


@pytest.mark.parametrize("file", ["model.safetensors", "training/state.json", "ledger.json"])
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_taken(stopped, alone, file):
    harm(stopped / "checkpoints/step-00000005" / file)
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    (note,) = [note for note in notes(result) if note.startswith("gone back")]
    assert note == (
        f"gone back to step-00000004: step-00000005 is damaged: {file} differs from its sum in {SUMS_FILE} (kept as "
        "checkpoints/damaged-step-00000005)"
    )
    assert "damaged-step-00000005" in names(stopped)


def test_several_damaged_ones_are_passed_over(stopped, alone):
    for step in (2, 4, 5):
        (stopped / f"checkpoints/step-0000000{step}/config.json").unlink()
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    assert {f"damaged-step-0000000{step}" for step in (2, 4, 5)} < names(stopped)
    assert any(note.startswith("gone back to step-00000000") for note in notes(result))


def test_what_is_said_of_the_damage_outlives_a_kill(stopped, monkeypatch):
    harm(stopped / "checkpoints/step-00000005/model.safetensors")

    kill_at_the_start(stopped, monkeypatch)
    result = go(stopped)
    assert sum(note.startswith("gone back to step-00000004") for note in notes(result)) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"checkpoints\n", b"checkpoints/step-00000009\n"])
def test_a_name_that_leads_nowhere_is_no_end(stopped, alone, content):
    (stopped / "latest").write_bytes(content)
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    assert any("latest names" in note for note in notes(result))


def test_without_a_whole_one_the_error_names_every_file_and_nothing_is_moved(stopped):
    for step in (0, 2, 4, 5):
        harm(stopped / f"checkpoints/step-0000000{step}/config.json")
    before = names(stopped)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*step-00000000 is damaged: config\.json") as raised:
        go(stopped)
    assert f"delete {stopped / 'latest'} to start the stage over" in str(raised.value)
    assert names(stopped) == before
    # As it says:
    (stopped / "latest").unlink()
    assert go(stopped).steps == 6


def test_who_goes_back_loses_nothing_that_was_later(stopped, alone):
    saved = {step: checkpoint_bits(stopped / f"checkpoints/step-0000000{step}") for step in (4, 5)}
    (stopped / "latest").write_text("checkpoints/step-00000002\n")
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    note = (
        "gone back to step-00000002, which latest names (kept as checkpoints/former-step-00000004, "
        "checkpoints/former-step-00000005)"
    )
    assert notes(result).count(note) == 1
    assert {step: checkpoint_bits(stopped / f"checkpoints/former-step-0000000{step}") for step in saved} == saved
    assert go(stopped).steps == 6, "a finished run says nothing of it"
    assert not (stopped / ".saving").exists()


def test_who_goes_back_and_is_killed_or_refused_loses_nothing_either(stopped, monkeypatch):
    (stopped / "latest").write_text("checkpoints/step-00000002\n")
    before = names(stopped)
    with pytest.raises(CheckpointError, match="learning_rate"):
        go(stopped, learning_rate=1.0)
    assert names(stopped) == before

    kill_at_the_start(stopped, monkeypatch)
    assert {"former-step-00000004", "former-step-00000005"} < names(stopped)
    assert sum(note.startswith("gone back to step-00000002") for note in notes(go(stopped))) == 1


def test_who_begins_anew_finds_the_former_checkpoints(stopped, alone):
    (stopped / "latest").unlink()
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    assert {f"former-step-0000000{step}" for step in (0, 2, 4, 5)} < names(stopped)
    assert any(note.startswith("begun anew, since there is no latest (kept as ") for note in notes(result))


def test_what_was_saved_and_not_yet_named_is_no_former_checkpoint(stopped, alone, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("auxin.training.keeper.name_latest", killed)
        with pytest.raises(KeyboardInterrupt):
            go(stopped)
    assert (stopped / "latest").read_text() == "checkpoints/step-00000005\n"
    assert "step-00000006" in names(stopped)
    result = go(stopped)
    assert names(stopped) == {f"step-0000000{step}" for step in (0, 2, 4, 5, 6)}
    assert not any(note.startswith("gone back") for note in notes(result))


def without_sums(path: Path) -> str:
    path.unlink()
    return f"{SUMS_FILE} is missing"


def cut_sums(path: Path) -> str:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    return f"{SUMS_FILE} is cut: it has {len(lines) - 2} lines, and had {len(lines)}"


@pytest.mark.parametrize("harm_sums", [without_sums, cut_sums])
def test_sums_that_are_gone_or_cut_are_damage(stopped, alone, harm_sums):
    checkpoint = stopped / "checkpoints/step-00000005"
    said = harm_sums(checkpoint / SUMS_FILE)
    harm(checkpoint / "model.safetensors")
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    assert any(note.startswith("gone back to step-00000004") and said in note for note in notes(result))


def test_a_checkpoint_of_an_earlier_version_without_sums_is_taken(stopped, alone):
    remove_sums(stopped / "checkpoints/step-00000005")
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    assert notes(result) == []


def test_what_happened_to_a_forgotten_run_is_no_part_of_the_next_one(tmp_path):
    first = tmp_path / "run"
    go(first, stop_after=1)
    write_since(first, first / "checkpoints/step-00000000", 999.0, ["a note of the forgotten run"])
    (first / "latest").unlink()
    go(first, stop_after=1)
    (first / "latest").write_text("checkpoints/step-00000000\n")
    result = go(first)
    assert "a note of the forgotten run" not in notes(result)
    assert result.seconds < 999


def test_strangers_are_neither_removed_nor_taken_for_checkpoints(stopped, alone):
    folder = stopped / "checkpoints"
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(folder / "step-00000002", folder / "step-00000002 copy")
    shutil.copytree(folder / "step-00000002", folder / "z-best")
    (folder / ".cache").mkdir()
    result = go(stopped)
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(alone.checkpoint)
    assert {"notes.txt", "step-00000002 copy", "z-best", ".cache"} < names(stopped)


def test_a_damaged_way_back_is_found_by_the_rewind_and_mended_by_running_again(tmp_path):
    settings = tiny_settings(steps=16, checkpoint_interval=4, keep_checkpoints=9, guard=GuardSettings(action="rewind"))

    def rewinding(folder, stop_after=None, hooks=()):
        data = TinyData(poisoned_rows=(5,))
        return train(poisoned_llama(), data, settings, folder, stop_after=stop_after, hooks=hooks, progress=False)

    whole = rewinding(tmp_path / "whole")
    event = next(note for note in notes(whole) if note.startswith("guard:"))
    target = f"step-{int(event.rpartition(' ')[2]):08d}"

    class Harm:
        """Damages what the rewind will go to, just before it."""

        def attach(self, model, optimizer): ...

        def before_step(self, step):
            path = tmp_path / "run/checkpoints" / target / "model.safetensors"
            if path.exists() and f"step {step}, " in event and not (tmp_path / "done").exists():
                harm(path)
                (tmp_path / "done").touch()

        def after_step(self, step): ...

        def state_dict(self):
            return {}

        def load_state_dict(self, state): ...

    with pytest.raises(CheckpointError, match=rf"{target} is damaged: model\.safetensors.*Run again"):
        rewinding(tmp_path / "run", hooks=[Harm()])
    result = rewinding(tmp_path / "run", hooks=[Harm()])
    assert checkpoint_bits(result.checkpoint) == checkpoint_bits(whole.checkpoint)
    assert any(f"{target} is damaged" in note for note in notes(result))


def test_a_checkpoint_is_never_changed(stopped):
    def stamps():
        paths = [path for path in (stopped / "checkpoints/step-00000004").rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in paths}

    (stopped / "latest").write_text("checkpoints/step-00000004\n")
    before = stamps()
    result = go(stopped)
    assert stamps() == before
    assert any("lost and done again" in note for note in notes(result))
    assert (stopped / SINCE_FILE).exists()


# What is not finite.


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_before_anything_is_saved(tmp_path, value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(CheckpointError, match=r"1 of 2,048 values of model\.layers\.1\.mlp\.up_proj\.weight are NaN"):
        train(model, TinyData(), tiny_settings(steps=2), tmp_path, progress=False)
    assert latest_checkpoint(tmp_path) is None


def test_so_are_moments_and_the_models_that_are_learnt_from(tmp_path):
    from auxin.training import write_checkpoint_folder

    model, optimizer = stepped()
    next(iter(optimizer.state.values()))["exp_avg_sq"][0] = torch.nan
    source = write_checkpoint_folder(tmp_path / "source", model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match=r"optimizer\.exp_avg_sq\..*are NaN or infinite"):
        train(tiny_llama(), TinyData(), tiny_settings(steps=2), tmp_path / "a", optimizer_from=source, progress=False)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    references = {"teacher": Reference(model, fingerprint="")}
    with pytest.raises(CheckpointError, match=r"teacher: 1 of .* lm_head\.weight"):
        train(tiny_llama(), TinyData(), tiny_settings(steps=2), tmp_path / "b", references=references, progress=False)


def test_a_mask_of_infinities_is_no_fault(tmp_path):
    model = tiny_llama()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
    assert train(model, TinyData(), tiny_settings(steps=1, warmup_steps=0), tmp_path, progress=False).steps == 1
    model.mask[0] = torch.nan
    with pytest.raises(CheckpointError, match="1 of 2 values of mask"):
        train(model, TinyData(), tiny_settings(steps=1, warmup_steps=0), tmp_path / "again", progress=False)
