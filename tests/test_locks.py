"""Locks: who holds what is told, and file systems that keep none are no end."""

import errno
import fcntl
import os
import socket
import warnings

import pytest

from auxin import locks
from auxin.errors import TrainingError
from auxin.files import new_folder
from auxin.locks import exclusive, in_turn
from auxin.recipes import Recipe, run_recipe
from corpora import small_corpus, write_documents

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


@pytest.fixture
def no_locks(monkeypatch, request):
    def flock(descriptor, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_without_locks", set())


def run(corpus, output):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "qkv_tokens": 2, "proj_tokens": 2}
    build = {"kind": "build", "model_type": "tokenformer", "config": {**config, "ffn_tokens": 8}}
    train = {"kind": "train", "name": "train", "settings": {"steps": 2, "batch_size": 2}}
    branch = {"name": "main", "title": "main", "stages": [build, train]}
    values = {"name": "tiny", "title": "Tiny", "data": small_corpus(corpus), "training": {"tensorboard": False}}
    return run_recipe(Recipe.parse({**values, "branches": [branch]}), output, "", announce=lambda line: None)


@pytest.mark.parametrize("no_locks", NO_LOCKS, indirect=True)
def test_a_file_system_without_locks_is_no_end_and_is_said_once(tmp_path, no_locks):
    corpus = write_documents(tmp_path / "corpus", documents=30)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(corpus, tmp_path / "run")
        run(corpus, tmp_path / "run")
    about = [str(warning.message) for warning in said if "locks" in str(warning.message)]
    assert len(about) == 1
    assert f"{tmp_path}/run keeps no locks" in about[0]
    assert "nothing keeps a second process out" in about[0]
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize("no_locks", NO_LOCKS[:1], indirect=True)
def test_there_folders_are_written_side_by_side_and_nothing_is_swept(tmp_path, no_locks):
    with new_folder(tmp_path / "a") as first:
        with new_folder(tmp_path / "b"):
            pass
        assert first.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_only_one_holds_a_folder_though_it_is_renamed(tmp_path):
    folder, renamed = tmp_path / "folder", tmp_path / "renamed"
    folder.mkdir()
    with exclusive(folder):
        folder.rename(renamed)
        with pytest.raises(TrainingError, match=rf"renamed is in use: process {os.getpid()} on "), exclusive(renamed):
            pass
    with exclusive(renamed), in_turn(renamed / "other"):
        pass


def test_a_forked_process_holds_nothing_and_closes_nothing_that_is_not_its_own(tmp_path):
    """Its parent's lock is free when the parent lets go, and the number of the descriptor is somebody else's there."""
    ours, its = socket.socketpair()
    with exclusive(tmp_path):
        opened = max(locks._opened)
        pid = os.fork()
        if pid == 0:
            os.dup2(its.fileno(), opened)
            locks.release(opened)
            os.write(opened, b"up")  # an error where it was closed
            its.recv(1)
            os._exit(0)
        assert ours.recv(2) == b"up"
    with exclusive(tmp_path):
        pass
    ours.send(b".")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
