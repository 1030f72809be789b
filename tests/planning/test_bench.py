"""A bench: what is looked at is counted by the bench, the seed reaches the plan, estimates say that they are some."""

import dataclasses

import pytest
import torch

from auxin.accounting import flops_per_token
from auxin.edits import Plan, apply, apply_to_checkpoint
from auxin.edits.structure import edited_skeleton
from auxin.errors import ConfigError, PlanError
from auxin.methods import methods
from auxin.methods.grow.ligo import METHOD as LIGO
from auxin.methods.grow.stacking import METHOD as STACKING
from auxin.objectives.calibration import Calibration, CalibrationSettings, CorpusCalibration
from auxin.planning.bench import Bench, Meter
from auxin.planning.method import asked_data, estimate_plan, make_plan, plan_for
from tiny_models import inputs, tiny


def bench(model, batches=2):
    ids = [inputs(model, seed)["input_ids"] for seed in range(batches)]
    return Bench(model, Calibration.of_batches(model, ids))


def with_plan(plan, **values):
    return dataclasses.replace(STACKING, plan=plan, **values)


def looks(passes, backward=False):
    """A method that goes over its data `passes` times, and declares nothing."""

    def plan(bench, settings):
        for _ in range(passes):
            for batch in bench.data.batches():
                loss = bench.model(**batch).loss
                if backward:
                    loss.backward()
        return STACKING.plan(bench, settings)

    return with_plan(plan, needs_weights=True, outline=STACKING.plan)


@pytest.mark.parametrize(("passes", "backward"), [(1, False), (3, False), (2, True)])
def test_what_a_method_looks_at_is_counted_and_not_declared(passes, backward):
    model = tiny("llama")
    at = bench(model)
    plan = make_plan(looks(passes, backward), at, STACKING.settings(factor=2))
    per_token = flops_per_token(model, 7)
    tokens = passes * 2 * 2 * 7
    assert (at.spent.samples, at.spent.units) == (passes * 4, tokens)
    assert at.spent.flops == tokens * (per_token.training if backward else per_token.forward)
    assert at.spent.seconds > 0
    assert plan.cost == at.spent.cost(at.data)
    assert plan.cost.data == at.data.fingerprint
    assert f"Planning took {passes * 4} samples, {tokens} tokens" in str(plan)
    assert Plan.parse(plan.model_dump(mode="json")).cost == plan.cost


def test_only_what_is_drawn_counts():
    model = tiny("llama")
    at = bench(model, batches=5)
    batches = at.data.batches()
    assert at.spent.samples == 0
    next(batches)
    assert at.spent.samples == 2


def test_a_copy_of_a_bench_counts_once():
    at = bench(tiny("llama"), batches=1)
    for copy in (dataclasses.replace(at, seed=1), dataclasses.replace(dataclasses.replace(at, seed=2), seed=3)):
        list(copy.data.batches())
    assert at.spent.samples == 2 * 2
    other = dataclasses.replace(at, spent=Meter())
    list(other.data.batches())
    assert (at.spent.samples, other.spent.samples) == (4, 2)


def test_a_plan_that_looks_at_nothing_costs_nothing():
    model = edited_skeleton(tiny("llama").config)
    plan = make_plan(STACKING, Bench(model), STACKING.settings(factor=2))
    assert plan.cost is None
    assert plan == make_plan(STACKING, Bench(model), STACKING.settings(factor=2))


MEASURING = [name for name, method in methods().items() if method.calibration is not None and method.intent == "prune"]


@pytest.mark.parametrize("name", MEASURING)
def test_a_plan_costs_the_same_when_what_it_looks_at_is_known(name, tmp_path, monkeypatch):
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where plans write files that belong to them
    model, method = tiny("mixtral" if name == "expert-dropping" else "llama", dtype=torch.float32), methods()[name]
    cold, warm = (make_plan(method, bench(model), method.settings(**method.examples(model))).cost for _ in range(2))
    assert cold.samples
    assert cold.flops
    assert warm == cold.model_copy(update={"seconds": warm.seconds})


def test_products_of_weights_cost_flops_without_a_sample():
    def plan(bench, settings):
        weight = bench.model.model.layers[0].self_attn.q_proj.weight
        _ = weight @ weight
        return STACKING.plan(bench, settings)

    plan = make_plan(with_plan(plan), Bench(tiny("llama")), STACKING.settings(factor=2))
    assert (plan.cost.samples, plan.cost.flops, plan.cost.data) == (0, 2 * 16**3, None)


def seeded_methods():
    return [method for method in methods().values() if "seed" in method.settings.model_fields]


@pytest.mark.parametrize("method", seeded_methods(), ids=lambda method: method.name)
def test_a_bench_seeds_what_a_method_draws_unless_its_settings_do(method, tmp_path):
    model = tiny("tokenformer" if method.name == "tokenformer" else "gpt2")
    values = method.examples(model)
    plain, own = method.settings.parse(values), method.settings.parse({**values, "seed": 7})
    at = dataclasses.replace(bench(model) if method.intent == "prune" else Bench(model), seed=5, folder=tmp_path)
    assert method.plan(at, plain).seed == 5
    assert method.plan(at, own).seed == 7
    assert method.plan(at, method.settings.parse({**values, "seed": 0})).seed == 0
    assert method.plan(dataclasses.replace(at, seed=0), plain).seed == 0


def test_there_are_seeded_methods():
    assert len(seeded_methods()) >= 8


def test_an_estimate_says_so_and_is_not_applied(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    method = looks(1)
    plan = estimate_plan(method, Bench(edited_skeleton(model.config)), STACKING.settings(factor=2))
    assert plan.estimate
    assert "(an estimate: made without the model's weights" in str(plan)
    assert Plan.parse(plan.model_dump(mode="json")).estimate
    with pytest.raises(PlanError, match=r"stacking is an estimate.*Plan again with the model's weights"):
        apply(plan, model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match="is an estimate"):
        apply_to_checkpoint(plan, tmp_path / "model", tmp_path / "larger")
    assert not (tmp_path / "larger").exists()
    # What needs no weights is no estimate.
    plan = estimate_plan(STACKING, Bench(edited_skeleton(model.config)), STACKING.settings(factor=2))
    assert not plan.estimate
    assert "estimate" not in str(plan)


def test_a_method_asks_for_data_and_the_user_may_say_otherwise():
    asked = asked_data(LIGO, LIGO.settings(layers=3, steps=5), CalibrationSettings(length=16))
    assert (asked.samples, asked.batch_size, asked.length) == (40, 8, 16)
    asked = asked_data(LIGO, LIGO.settings(layers=3, steps=5), CorpusCalibration(samples=128, batch_size=2))
    assert (asked.samples, asked.batch_size) == (128, 2), "a value that is set to the default is set"
    assert isinstance(asked, CorpusCalibration)
    assert asked_data(LIGO, LIGO.settings(layers=3, steps=0), CalibrationSettings()) is None
    with pytest.raises(ConfigError, match=r"stacking looks at no data.*length, samples"):
        asked_data(STACKING, STACKING.settings(factor=2), CalibrationSettings(samples=3, length=8))


def test_a_method_that_looks_at_data_looks_at_weights():
    with pytest.raises(TypeError, match=r"'stacking' looks at data.*set needs_weights"):
        with_plan(STACKING.plan, calibration=lambda settings: CalibrationSettings())


def test_data_for_a_method_that_looks_at_none_is_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(ConfigError, match="stacking looks at no data"):
        plan_for(STACKING, tmp_path, {"factor": 2}, {"samples": 3})
    with pytest.raises(ConfigError, match=r"data: sampels: unknown field\. Did you mean 'samples'"):
        plan_for(LIGO, tmp_path, {"layers": 3}, {"sampels": 3})


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode]
)
def test_a_plan_is_made_without_the_callers_contexts(context):
    seen = []

    def plan(bench, settings):
        product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
        seen.append((product.dtype, product.requires_grad, product.is_inference()))
        return STACKING.plan(bench, settings)

    at = bench(tiny("llama"))
    with context():
        make_plan(with_plan(plan), at, STACKING.settings(factor=2))
        assert torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled()
    assert seen == [(torch.float32, True, False)]


def test_a_method_that_looks_at_weights_refuses_those_of_inference_mode():
    with torch.inference_mode():
        model = tiny("llama")
    with pytest.raises(PlanError, match=r"within torch\.inference_mode.*deepcopy"):
        make_plan(LIGO, bench(model), LIGO.settings(layers=4, steps=0))
