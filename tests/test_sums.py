"""A folder that says what its files must be: everything else is named."""

import subprocess

import pytest

from auxin.sums import SUMS_FILE, damage, has_sums, write_sums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a file.bin").write_bytes(bytes(range(256)))
    (tmp_path / "below" / "b.json").write_text("{}")
    (tmp_path / "empty").touch()
    write_sums(tmp_path)
    return tmp_path


def test_what_is_as_it_was_is_whole_whatever_came_later(folder):
    assert has_sums(folder)
    assert damage(folder) is None
    (folder / "notes.txt").write_text("mine")
    assert damage(folder) is None
    write_sums(folder)
    (folder / "notes.txt").write_text("changed")
    assert "notes.txt" in damage(folder)


def test_a_folder_without_sums_is_not_accused(folder):
    (folder / SUMS_FILE).unlink()
    assert not has_sums(folder)
    assert damage(folder) is None


def test_any_change_of_any_byte_is_named(folder):
    path = folder / "a file.bin"
    content = path.read_bytes()
    for place in range(0, len(content), 17):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert damage(folder) == f"a file.bin differs from its sum in {SUMS_FILE}"
    path.write_bytes(content[:-1])
    (folder / "below/b.json").unlink()
    assert damage(folder) == (
        f"a file.bin differs from its sum in {SUMS_FILE}, below/b.json is missing (it is named in {SUMS_FILE})"
    )


@pytest.mark.parametrize("content", [b"", b"no sums\n", b"\xff\xfe\n", b"0" * 63 + b"  empty\n"])
def test_sums_that_are_none_are_damage(folder, content):
    (folder / SUMS_FILE).write_bytes(content)
    assert SUMS_FILE in damage(folder)


def test_the_common_tool_checks_them_too(folder):
    check = ["sha256sum", "--check", "--quiet", SUMS_FILE]
    assert subprocess.run(check, cwd=folder).returncode == 0
    (folder / "empty").write_text("x")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1
