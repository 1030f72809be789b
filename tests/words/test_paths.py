"""Dotted paths."""

from auxin.words.paths import dotted


def test_a_place_without_a_name_is_the_one_around_it():
    assert dotted("model.layers", "*", "mlp") == "model.layers.*.mlp"
    assert dotted("model.layers.3", "") == "model.layers.3"
    assert dotted("", "weight") == "weight"
    assert dotted("", "") == ""
