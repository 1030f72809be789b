"""Fields that hold one of several settings classes: every way to write one, and messages that name the inner field."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from auxin.errors import ConfigError
from auxin.settings import Settings
from auxin.words.one_of import OneOf, parse_one
from auxin.words.registry import Registry

GARMENTS: Registry[type[Settings]] = Registry("garment", "auxin.words")
ANY = OneOf(GARMENTS)


class Coat(Settings):
    kind: Literal["coat"] = "coat"
    warmth: int = Field(default=3, ge=0)


class Belt(Settings):
    kind: Literal["belt"] = "belt"
    length: float
    shop: Path | None = None


class Case(Settings):
    kind: Literal["case"] = "case"
    inside: list[Annotated[Settings, ANY]] = []


for cls in (Coat, Belt, Case):
    GARMENTS.add(cls.model_fields["kind"].default, cls)


class Person(Settings):
    wears: Annotated[Settings, ANY]
    below: Annotated[Settings, OneOf(GARMENTS, default="coat")] = Coat()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"kind": "coat"}, Coat()),
        ({"kind": "coat", "warmth": 5}, Coat(warmth=5)),
        ("coat", Coat()),
        (Belt(length=2), Belt(length=2)),
        ({"kind": "case", "inside": ["coat", {"kind": "belt", "length": 1}]}, Case(inside=[Coat(), Belt(length=1)])),
    ],
)
def test_it_is_written_as_a_mapping_as_a_name_or_as_settings(written, meant):
    found = Person.parse({"wears": written}).wears
    assert (type(found), found) == (type(meant), meant)


def test_a_mapping_without_a_kind_is_of_the_default_one_where_there_is_one():
    assert Person.parse({"wears": "coat", "below": {"warmth": 9}}).below == Coat(warmth=9)
    assert Person.parse({"wears": "coat", "below": {"kind": "belt", "length": 1}}).below == Belt(length=1)
    with pytest.raises(ConfigError, match=r"^below\.length: unknown field"):
        Person.parse({"wears": "coat", "below": {"length": 1}})


@pytest.mark.parametrize(
    ("wears", "message"),
    [
        ({"kind": "coat", "warmht": 4}, "x.yaml: wears.warmht: unknown field. Did you mean 'warmth'?"),
        ({"kind": "coat", "warmth": -1}, "x.yaml: wears.warmth: must be 0 or more (received -1)"),
        ({"kind": "cot"}, "x.yaml: wears.kind: Unknown garment 'cot'. Did you mean 'coat'"),
        ({"warmth": 3}, "x.yaml: wears.kind: required, but not given. There are: belt, case, coat."),
        ({"kind": None}, "x.yaml: wears.kind: required, but not given."),
        ("belt", "x.yaml: wears.length: required, but not given."),
        (5, "x.yaml: wears: 5 is neither a mapping with `kind` nor the name of a garment."),
        (None, "x.yaml: wears: null is neither"),
        ({"kind": "case", "inside": ["coat", {"kind": "belt"}]}, "x.yaml: wears.inside.1.length: required"),
        ({"kind": "case", "inside": [{"kind": "case", "inside": ["hat"]}]}, "x.yaml: wears.inside.0.inside.0.kind: "),
    ],
)
def test_the_message_names_the_field_within(wears, message):
    with pytest.raises(ConfigError) as raised:
        Person.parse({"wears": wears}, source="x.yaml")
    assert str(raised.value).startswith(message)


def test_every_wrong_field_is_named():
    with pytest.raises(ConfigError) as raised:
        Person.parse({"wears": {"kind": "belt", "size": 1}, "below": "hat", "above": 1})
    for place in ("wears.length: required", "wears.size: unknown field", "below.kind: Unknown garment", "above: unk"):
        assert place in str(raised.value)


@pytest.mark.parametrize(
    ("person", "yaml"),
    [
        (Person(wears=Coat()), "wears:\n  kind: coat\n"),
        (Person(wears=Coat(warmth=1), below=Belt(length=1.5)), None),
        (Person(wears=Belt(length=2, shop=Path("a/b"))), "wears:\n  kind: belt\n  length: 2.0\n  shop: a/b\n"),
        (Person(wears=Case(inside=[Coat(), Case()])), None),
    ],
)
def test_yaml_keeps_the_kind_and_leaves_out_defaults(tmp_path, person, yaml):
    path = tmp_path / "person.yaml"
    person.to_yaml(path)
    assert Person.from_yaml(path) == person
    assert Person.parse(person.model_dump(mode="json")) == person
    if yaml is not None:
        assert path.read_text() == yaml


def test_a_registry_may_hold_something_that_has_settings():
    shops: Registry[tuple[str, type[Settings]]] = Registry("shop", "auxin.words")
    shops.add("coat", ("sells coats", Coat))
    one_of = OneOf(shops, default="coat", settings=lambda shop: shop[1])
    assert parse_one(one_of, {"warmth": 2}, "shop") == parse_one(one_of, {"kind": "coat", "warmth": 2}, "shop")
    assert parse_one(one_of, "coat", "shop") == Coat()


def test_the_schema_for_editors_has_the_kinds():
    fields = Person.model_json_schema()["properties"]
    kinds = {"enum": ["belt", "case", "coat"]}
    mapping = {"type": "object", "properties": {"kind": kinds}}
    assert fields["wears"]["anyOf"] == [kinds, {**mapping, "required": ["kind"]}]
    assert fields["below"]["anyOf"] == [kinds, mapping]


def test_outside_of_a_field_the_message_begins_with_the_place():
    assert parse_one(ANY, "coat", "--wear") == Coat()
    with pytest.raises(ConfigError, match=r"^--wear\.length: required, but not given; --wear\.size: unknown field"):
        parse_one(ANY, {"kind": "belt", "size": 1}, "--wear")
    with pytest.raises(ConfigError, match=r"^--wear: 3 is neither"):
        parse_one(ANY, 3, "--wear")
