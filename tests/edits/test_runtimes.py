"""What is said about who can load an edited checkpoint."""

import pytest

from auxin.edits import Plan, RemoveModule, apply
from auxin.edits.runtimes import about_runtimes, without_auxin
from auxin.methods import method
from auxin.planning.bench import Bench
from capabilities import probe
from cut_models import narrow_plan
from tiny_models import tiny


def test_what_the_config_can_say_needs_nothing():
    config = probe("hypercloning", "llama").model.config
    assert "loads without auxin" in about_runtimes(config)
    assert without_auxin(config) is None


def test_a_tokenformer_is_served_through_transformers():
    assert "Other runtimes have no TokenFormer" in about_runtimes(tiny("tokenformer").config)


@pytest.mark.parametrize(
    ("method", "words"), [("graft", "computes what this one does"), ("masked", "method masked with finish")]
)
def test_replayed_edits_are_refused_elsewhere_and_a_way_out_is_named(method, words):
    note = about_runtimes(probe(method, "llama").model.config)
    assert "vLLM and other runtimes refuse" in note
    assert words in note
    assert (
        "`import auxin` before from_pretrained. Without it loading fails, since the weights lie in edited_model" in note
    )
    assert "Don't rename the file" in note


def test_an_edited_tokenformer_is_no_type_that_transformers_knows():
    assert "it knows no TokenFormer without it" in about_runtimes(probe("masked", "tokenformer").model.config)


def test_a_removed_module_has_no_plain_form():
    model = tiny("llama")
    edit = RemoveModule(module="model.layers.1.mlp", leaves="zeros")
    apply(Plan(method="by hand", promise="none", edits=[edit]), model)
    assert "removed modules: none" in about_runtimes(model.config)


def test_layers_of_different_widths_have_a_plain_form_once_they_are_alike():
    model = tiny("llama")
    apply(narrow_plan("llama"), model)
    note = about_runtimes(model.config)
    assert "vLLM and other runtimes refuse" in note
    assert "bring all layers to one width, for example with net2net and the largest intermediate_size" in note
    net2net = method("net2net")
    apply(net2net.plan(Bench(model), net2net.settings.parse({"intermediate_size": 12})), model)
    assert "loads without auxin" in about_runtimes(model.config)
