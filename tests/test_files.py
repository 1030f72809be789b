"""Folders that appear whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from auxin.errors import CheckpointError
from auxin.files import new_folder, remove_folder, sweep, temporary_folder


def fill(path):
    with new_folder(path) as folder:
        (folder / "a.txt").write_text("a")


def test_the_current_folder_and_a_link_to_an_empty_one_can_be_filled(tmp_path, monkeypatch):
    for name in ("here", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    monkeypatch.chdir(tmp_path / "here")
    fill(tmp_path.__class__("."))
    fill(tmp_path / "link")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "linked", "link"}
    assert os.listdir(tmp_path / "here") == os.listdir(tmp_path / "link") == ["a.txt"]
    with pytest.raises(CheckpointError, match="not an empty folder"):
        fill(tmp_path / "link")


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "new") as folder:
        (folder / "missing" / "a.txt").write_text("a")
    assert os.listdir(tmp_path) == []


DIES_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from auxin.files import new_folder

with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half.bin").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_dead_process_left_goes_when_the_same_is_written_again(tmp_path):
    done = subprocess.run([sys.executable, "-c", DIES_WHILE_WRITING, str(tmp_path / "new")])
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert os.listdir(left) == ["half.bin"]
    fill(tmp_path / "other")
    assert left.exists(), "it is another's leftover: nobody asked for it"
    fill(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "other"]


def test_nothing_is_swept_that_is_held_or_somebodys(tmp_path):
    strangers = [".new.tmp", f".new.{'x' * 32}.tmp", "new.tmp", f"new.{'0' * 32}.tmp"]
    for name in strangers:
        (tmp_path / name).mkdir()
    (tmp_path / f".new.{'1' * 32}.tmp").write_text("a file")
    with temporary_folder(tmp_path / "new") as first:
        sweep(tmp_path)
        with temporary_folder(tmp_path / "new") as second:
            assert first.is_dir()
            assert second.is_dir()
        assert not second.exists()
        assert first.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {*strangers, f".new.{'1' * 32}.tmp"}


def test_of_a_link_the_link_is_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove_folder(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere"]
    assert (tmp_path / "elsewhere/file").exists()
