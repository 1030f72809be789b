"""YAML that is broken, ambiguous or endless is refused at once, in one message that names the line and the column."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from auxin import yaml_files
from auxin.errors import ConfigError
from auxin.yaml_files import DEEPEST, SMALL, read_yaml, read_yaml_file, write_yaml_file

BOMB = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 13))
WRONG = [
    ("a: 1\nb: 2\na: 3", 3, 1, "the key 'a' stands in line 1 already"),
    ("{1: a, true: b}", 1, 8, "the key true stands in line 1 already"),
    ("a: {<<: {b: 1}, <<: {c: 1}}", 1, 17, "the key '<<' stands in line 1 already"),
    (BOMB, 6, 40, "aliases stand for more than 100,000 values"),
    ("a: &a [*a]", 1, 8, "the alias *a stands within what it stands for"),
    ("a: &a {b: {<<: *a}}", 1, 16, "the alias *a stands within"),
    ("a: &q 1\nb: *z", 2, 4, "the alias *z stands for nothing that is written above. Anchors (&name) before it: q"),
    ("[" * 5000, 1, DEEPEST + 1, "nested more than 64 deep"),
    ("{a: " * 5000, 1, 4 * DEEPEST + 1, "nested more than 64 deep"),
    ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, 2, 44, "nested more than 64 deep"),
    ("a: 2020-99-99", 1, 4, "2020-99-99 would be a date, and nothing takes one. Put it in quotes"),
    ("a:\n  b: 2020-01-01", 2, 6, "2020-01-01 would be a date"),
    ("a: 0x_", 1, 4, "'0x_' is no whole number that can be read"),
    ("a: " + "9" * 5000, 1, 4, "(5,002 characters) is no whole number"),
    ("a: " + "9" * 400, 1, 4, "is no whole number"),
    ("a: !!int x", 1, 4, "'x' is no whole number"),
    ("a: !!int ''", 1, 4, "'' is no whole number"),
    ("a: !!float x", 1, 4, "'x' is no number"),
    ("a: !!bool x", 1, 4, "'x' is no true or false"),
    ("a: !!timestamp x", 1, 4, "x would be a date"),
    ("a: !!binary '*'", 1, 4, "the tag !!binary can't stand here"),
    ("a: !!set {b}", 1, 4, "the tag !!set can't stand here"),
    ("a: !!python/object/apply:os.system [ls]", 1, 4, "the tag !!python/object/apply:os.system can't stand here"),
    ("a: !mine b", 1, 4, "the tag !mine can't stand here"),
    ("? [a]\n: b", 1, 3, "a key has to be a single value"),
    ("a: {<<: [1]}", 1, 9, "<< takes a mapping"),
    ("a: 1\n---\nb: 1", 2, 1, "a second document begins here"),
    ("a: 1\nb: \x07", 2, 4, r"the character '\x07' can't stand there"),
    ("a: \ud800", 1, 4, r"the character '\ud800' can't stand there"),
    ("a: `x`", 1, 4, "cannot start any token"),
    ("a: [1\nb: 2", 2, 2, "expected ',' or ']'"),
    ("a:\n  b: 1\n c: 2", 3, 2, "parsing a block mapping that begins in line 1"),
    ("%YAML 9.9\n---\na: 1", 1, 1, "incompatible YAML document"),
]


@pytest.mark.parametrize("reader", yaml_files.READERS)
@pytest.mark.parametrize(("text", "line", "column", "message"), WRONG)
def test_what_is_wrong_is_told_with_its_place(monkeypatch, reader, text, line, column, message):
    monkeypatch.setattr(yaml_files, "_Reading", reader)
    with pytest.raises(ConfigError) as raised:
        read_yaml(text, "x.yaml")
    told = str(raised.value)
    assert told.startswith(f"x.yaml is not valid YAML: line {line}, column {column}: ")
    assert message in told
    assert len(told) < 400
    assert told.isprintable()


def test_what_is_too_large_is_not_even_parsed(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^x\.yaml is too large: it has 262,147 characters, and 262,144 are the most"
    ):
        read_yaml("a: " + "b" * SMALL, "x.yaml")
    path = tmp_path / "large.yaml"
    path.write_bytes(b"a: " + b"\xff" * (4 * SMALL))
    with pytest.raises(ConfigError, match=r"large\.yaml is too large"):
        read_yaml_file(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "/dev/zero is no regular file"),
        ("/", "/ is a folder"),
        ("nowhere/x.yaml", "nowhere/x.yaml does not exist"),
        ("a\0b", r"'a\x00b' can't be read: "),
        ("y" * 5000, "can't be read: File name too long"),
    ],
)
def test_what_is_no_file_is_named(path, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        read_yaml_file(path)
    assert len(str(raised.value)) < 300


def test_other_encodings_are_told_by_the_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\nb: \xe4\n")
    with pytest.raises(ConfigError, match=r"x\.yaml can't be read: the byte 0xe4 in line 2 is no UTF-8 text"):
        read_yaml_file(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml_file(path) == {"a": 1}, "editors of Windows put a mark before the text"


def test_an_alias_is_a_copy():
    found = read_yaml("a: &x {b: [1]}\nc: *x\nd: {<<: *x, e: 2}", "x")
    found["a"]["b"].append(2)
    assert found == {"a": {"b": [1, 2]}, "c": {"b": [1]}, "d": {"b": [1], "e": 2}}
    assert read_yaml("a: &x {b: 1}\nc: &y {b: 2, d: 3}\ne: {<<: [*x, *y], d: 4}", "x")["e"] == {"b": 1, "d": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1E5", -1e5),
        (".5e3", 500.0),
        ("1.e3", 1000.0),
        ("'1e-3'", "1e-3"),
        ("e3", "e3"),
        ("1e", "1e"),
    ],
)
def test_exponents_need_no_dot(text, value):
    assert read_yaml(text, "x") == value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_what_is_written_is_read_again(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    write_yaml_file(path, values)
    assert read_yaml_file(path) == values


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"#%@`,? \n\t0x1e._<~=\\"), max_size=40))
def test_any_text_is_read_or_refused(text):
    told = ""
    try:
        assert yaml.safe_dump(read_yaml(text, "x.yaml"))
    except ConfigError as error:
        told = str(error)
    assert not told or re.match(r"x\.yaml is not valid YAML: line \d+, column \d+: \S", told)
