"""Messages about wrong settings: the field as it was written, and the nearest right name."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from auxin.errors import ConfigError
from auxin.settings import Settings


class Root(Settings):
    kind: Literal["root"] = "root"
    depth: int = 1


class Shoot(Settings):
    kind: Literal["shoot"] = "shoot"
    regime: Literal["straight", "bent"] = "straight"
    leaves: int
    petals: Literal[1, 3] = 3


class Plant(Settings):
    parts: list[Annotated[Root | Shoot, Field(discriminator="kind")]] = []
    height: int | float = 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"kind": "shoot", "leaves": 1, "leafs": 2}, "parts.0.leafs: unknown field. Did you mean 'leaves'?"),
        ({"kind": "shoot", "leaves": "x"}, "parts.0.leaves: must be a whole number (received 'x')"),
        ({"kind": "shoot"}, "parts.0.leaves: required, but not given."),
        ({"kind": "shot"}, "parts.0.kind: 'shot' is none of root, shoot. Did you mean 'shoot'?"),
        ({"leaves": 1}, "parts.0.kind: required, but not given."),
        ({"kind": "shoot", "leaves": 1, "regime": "strait"}, "(received 'strait'). Did you mean 'straight'?"),
        ({"kind": "shoot", "leaves": 1, "petals": "3"}, "parts.0.petals: must be 1 or 3 (received '3')"),
        (5, "parts.0: must be a mapping, {field: value} (received 5)"),
    ],
)
def test_the_message_names_what_was_written(part, message):
    with pytest.raises(ConfigError) as raised:
        Plant.parse({"parts": [part]}, source="plant.yaml")
    assert message in str(raised.value)
    assert str(raised.value).startswith("plant.yaml: parts.0")
    assert "mean '3'" not in str(raised.value)


def test_a_field_like_no_other_comes_with_those_there_are():
    with pytest.raises(ConfigError, match=r"^colour: unknown field\. Known: parts, height\.$"):
        Plant.parse({"colour": "green"})


class Bed(Settings):
    rows: int | None = None
    width: float = 1.0
    gaps: list[int] | Literal["even"] = "even"
    covered: bool = False
    label: str = ""
    any_of: list[bool] | float = 1.0
    edges: list[Annotated[int, Field(ge=0)]] | None = None
    corner: tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]] = (0, 1.0)
    plots: list[list[int]] = []
    seeds: dict[Annotated[int, Field(ge=0)], float] = {}
    notes: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"rows": True}, "rows"),
        ({"width": False}, "width"),
        ({"label": True}, "label"),
        ({"gaps": [1, True]}, "gaps.1"),
        ({"edges": [True]}, "edges.0"),
        ({"corner": (1, True)}, "corner.1"),
        ({"plots": [[1], [2, False]]}, "plots.1.1"),
        ({"seeds": {True: 1.0}}, "seeds"),
        ({"seeds": {1: True}}, "seeds.1"),
    ],
)
def test_true_is_no_number(values, place):
    with pytest.raises(ConfigError, match=f"^{re.escape(place)}: must be .*received (True|False|true|false)"):
        Bed.parse(values)


def test_true_is_what_it_says_elsewhere():
    assert Bed.parse({"covered": True, "any_of": [True]}).any_of == [True]
    assert Bed.parse({"notes": {"true": True}, "corner": [1, 1], "edges": [0, 1]}).edges == [0, 1]


def test_a_list_is_asked_for_as_one_writes_it():
    with pytest.raises(ConfigError, match=r"^parts: must be a list, \[a, b\] \(received 'root'\)$"):
        Plant.parse({"parts": "root"})


class Pot(Settings):
    size: int
    colour: str


def test_another_file_is_told_by_what_it_lacks(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("shape: round\nplants: 3\n")
    with pytest.raises(ConfigError, match=r"other\.yaml is no pot: it has none of size, colour\.$"):
        Pot.from_yaml(path)
    path.write_text("shape: round\nsize: 3\n")
    with pytest.raises(ConfigError, match=r"colour: required, but not given.*shape: unknown field"):
        Pot.from_yaml(path)


def test_members_of_plain_unions_are_no_fields():
    with pytest.raises(ConfigError, match=r"^height: must be a whole number or a finite number \(received 'tall'\)$"):
        Plant.parse({"height": "tall"})


@pytest.mark.parametrize("text", ["height: 2026-99-99\n", "[" * 5000, "height: [\n", "height: 0b\n"])
def test_broken_yaml_is_a_wrong_setting(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plant.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"plant\.yaml"):
        Plant.from_yaml(path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    class Part(Settings):
        size: int = 1

    with pytest.raises(ConfigError, match=r"is a folder\. Give the path of a YAML file"):
        Part.from_yaml(tmp_path)
