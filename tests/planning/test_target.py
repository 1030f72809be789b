"""The least removal that meets a target, found on shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import auxin
from auxin.accounting import count_parameters, flops_per_token, serving_memory
from auxin.edits import ArrangeLayers, apply_to_checkpoint
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.planning.cutting import cut
from auxin.planning.target import Gauge, Target, least_removal, removal
from capabilities import built_in
from tiny_models import inputs, tiny

UNITS = 12
PER_UNIT = 2 * 3 * 16
"""Parameters of a feed-forward unit in both layers: gate, up and down, of a residual of 16."""


def narrower(model):
    """The family that leaves ever fewer of the first feed-forward units in all layers, and its largest amount."""
    return lambda amount: cut(model, {("ffn", ""): range(UNITS - amount)}).edits, UNITS - 1


@pytest.fixture(scope="module")
def model():
    return tiny("llama", mlp_bias=False)


@pytest.mark.parametrize("amount", [1, 2, 7, 11])
def test_a_number_of_parameters_is_met_to_the_unit(model, amount):
    family, most = narrower(model)
    total = count_parameters(model).total
    least = total - amount * PER_UNIT
    found = least_removal(Gauge(Target(parameters=least), model), family, most)
    assert found.amount == amount
    assert found.edits == family(amount)
    assert count_parameters(found.after).total == least
    assert least_removal(Gauge(Target(parameters=least + PER_UNIT - 1), model), family, most).amount == amount
    if amount > 1:
        assert least_removal(Gauge(Target(parameters=least + PER_UNIT), model), family, most).amount == amount - 1


@settings(max_examples=8, deadline=None)
@given(share=st.floats(0.65, 0.98))
def test_a_share_is_met_and_one_unit_more_would_miss_it(model, share):
    family, most = narrower(model)
    target = Target(parameters=share)
    try:
        found = least_removal(Gauge(target, model), family, most)
    except PlanError as error:
        assert "smallest" in str(error)  # noqa: PT017 - the share lies below what can be reached
        assert target.of(removal(model, family(most)).after) > share * target.of(model)
        return
    assert target.of(found.after) <= share * target.of(model)
    larger = removal(model, family(found.amount - 1)).after if found.amount > 1 else model
    assert target.of(larger) > share * target.of(model)


def test_flops_are_counted_at_the_length_that_is_said(model):
    family, most = narrower(model)
    short, long = (Target(flops=0.9, sequence_length=length) for length in (4, 30))
    assert short.of(model) == flops_per_token(model, 4).forward < long.of(model)
    # Where attention weighs more, more units have to go for the same share.
    few, many = (least_removal(Gauge(target, model), family, most) for target in (short, long))
    assert 1 < few.amount < many.amount
    assert long.of(many.after) <= 0.9 * long.of(model) < long.of(removal(model, family(many.amount - 1)).after)
    assert "at 30 tokens" in many.reached(long)


PRUNING = {name for name, method in built_in().items() if method.intent == "prune"}
WITHOUT_A_SIZE = {"axformer", "vocabulary-pruning"}
"""The one stops by itself; what the other reaches goes by a text (test_vocabulary_pruning.py)."""
OWN_WAYS = {"expert-dropping", "finercut", "optin", "random", "shortgpt", "slicegpt", "vtrans"}
"""Methods with code of their own behind a target; the others share that of random."""


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        pytest.param(method, asked, marks=[] if method in OWN_WAYS or asked == "parameters" else pytest.mark.whole)
        for method in sorted(PRUNING - WITHOUT_A_SIZE)
        for asked in ("parameters", "flops", "memory")
        if (method, asked) != ("expert-dropping", "flops")  # a token gets as many experts as before
    ],
)
def test_every_pruning_method_meets_a_target_and_says_what_it_reached(method, asked, tmp_path, monkeypatch):
    """Latencies are those of test_latency.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / "cache"))
    model = tiny("mixtral" if method == "expert-dropping" else "llama", num_hidden_layers=3, dtype=torch.float32)
    told = {asked: 0.8, **({} if asked == "parameters" else {"sequence_length": 9})}
    data = {} if built_in()[method].calibration is None else {"data": [inputs(model)["input_ids"]]}
    steps = {"steps": 2} if method == "vtrans" else {}
    target, plan = Target(**told), auxin.plan(model, method, target=told, **data, **steps)
    before = target.of(model)
    auxin.apply(plan, model)
    after = target.of(model)
    assert 0.3 * before < after <= 0.8 * before
    assert plan.findings[0].startswith("Reached: ")
    assert f"asked for: target.{asked} = 0.8" in plan.findings[0]
    assert f"{count_parameters(model).total:,}" in plan.findings[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("magnitude", {"heads": 0.5, "ffn": 0.5}),
        ("magnitude", {"ffn": 0.5, "uniform": False}),
        ("random", {"hidden": 0.5}),
        ("finercut", {"removed": 2}),
        ("slicegpt", {"hidden": 0.75}),  # whose head gets a table of its own
        ("vocabulary-pruning", {"ids": list(range(8)), "multiple_of": 1}),
    ],
)
def test_the_bytes_that_a_plan_predicts_are_those_of_the_file(method, settings, dtype, tmp_path):
    """Told from shapes alone, before anything is written; but for the file's header, which holds names and shapes."""
    old, new = tmp_path / "old", tmp_path / "new"
    tiny("llama", dtype=dtype, tie_word_embeddings=True).save_pretrained(old)
    data = {"data": [inputs(tiny("llama"))["input_ids"]]} if method in ("finercut", "slicegpt") else {}
    plan = auxin.plan(old, method, folder=tmp_path, **settings, **data)
    config = AutoConfig.from_pretrained(old)
    after = removal(edited_skeleton(config), plan.edits).after
    predicted = serving_memory(after, dtype=dtype).weights
    apply_to_checkpoint(plan, old, new)
    (file,) = new.glob("*.safetensors")
    with file.open("rb") as content:
        header = int.from_bytes(content.read(8), "little")
    assert file.stat().st_size == 8 + header + predicted
    assert predicted < serving_memory(tiny("llama", tie_word_embeddings=True), dtype=dtype).weights


def test_memory_is_that_of_weights_and_of_the_cache(model):
    family, most = narrower(model)
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    whole = count_parameters(model).total * model.dtype.itemsize + 3 * 20 * per_token
    target = Target(memory=whole - 5 * PER_UNIT * model.dtype.itemsize, sequence_length=20, batch_size=3)
    assert target.of(model) == whole
    found = least_removal(Gauge(target, model), family, most)
    assert found.amount == 5  # feed-forward units have no part in the cache
    assert target.of(found.after, model.dtype) == target.memory
    assert target.of(model, torch.bfloat16) == whole * torch.bfloat16.itemsize / model.dtype.itemsize


def test_what_was_reached_is_told(model):
    family, most = narrower(model)
    target = Target(parameters=0.9)
    found = least_removal(Gauge(target, model), family, most)
    before, after = count_parameters(found.before).total, count_parameters(found.after).total
    told = found.reached(target)
    assert f"parameters {before:,} -> {after:,} ({after / before:.1%})" in told
    assert "FLOPs per token at 32 tokens" in told
    assert "asked for: target.parameters = 0.9" in told
    assert "asked" not in removal(model, found.edits).reached()


def test_any_nested_family_serves():
    """Layers that go, one after the other."""
    model = tiny("llama", num_hidden_layers=5)

    def family(amount):
        return [ArrangeLayers(layers="model.layers", order=list(range(5 - amount)))]

    found = least_removal(Gauge(Target(parameters=0.5), model), family, 4)
    assert 1 <= found.amount <= 4
    assert count_parameters(found.after).total <= 0.5 * count_parameters(model).total
    assert count_parameters(removal(model, family(found.amount - 1)).after).total > 0.5 * count_parameters(model).total


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of parameters, flops, memory, latency and latency_ms, not none"),
        ({"parameters": 0.5, "flops": 0.5}, "not parameters and flops"),
        ({"parameters": 0}, "parameters"),
        ({"parameters": -0.5}, "parameters"),
        ({"parameters": float("nan")}, "parameters"),
        ({"parameters": float("inf")}, "parameters"),
        ({"parameters": 1.0}, "parameters = 1 as a share is the whole model, so that nothing has to go"),
        ({"memory": 1}, r"memory = 1 as a share is .* Give the share that stays \(0.7\), or how many"),
        ({"flops": 1.5}, "flops = 1.5 is neither a share below 1 nor a whole number"),
        ({"parameters": 0.5, "sequence_length": 8}, "sequence_length says at which length flops and memory are"),
        ({"flops": 0.5, "batch_size": 8}, "batch_size says for how many sequences memory is counted"),
        ({"memory": 0.5, "phase": "decoding"}, "phase says how latency is measured"),
        ({"flops": 0.5, "sequence_length": 0}, "sequence_length"),
        ({"speed": 0.5}, "speed"),
    ],
)
def test_a_target_that_says_nothing_clear_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Target.parse(values)


def test_a_target_out_of_reach_is_refused_with_the_nearest(model):
    family, most = narrower(model)
    total = count_parameters(model).total
    smallest = total - most * PER_UNIT
    with pytest.raises(PlanError, match=f"{smallest - 1:,} of {total:,}, and the smallest .* is {smallest:,}") as found:
        least_removal(Gauge(Target(parameters=smallest - 1), model), family, most, "magnitude")
    share = float(str(found.value).partition("(")[2].partition(")")[0])
    assert least_removal(Gauge(Target(parameters=share), model), family, most).amount == most
    with pytest.raises(PlanError, match="could remove"):
        least_removal(Gauge(Target(parameters=0.5), model), family, 0)


def test_a_target_that_asks_for_nothing_is_refused(model):
    family, most = narrower(model)
    with pytest.raises(PlanError, match="nothing has to go"):
        least_removal(Gauge(Target(parameters=count_parameters(model).total), model), family, most)
