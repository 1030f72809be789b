"""Folders that appear whole or not at all."""

import os

import pytest

from auxin.errors import CheckpointError
from auxin.files import new_folder


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
