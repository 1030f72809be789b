"""Noisy gates: their divergence and their draws are those of the equations, and learning touches nothing else."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from auxin.analysis.gates import TINY, Gates, GateSettings, Goal, learn, losses_of
from auxin.analysis.unit_masks import maskable
from auxin.analysis.units import Group, Rows, units_of, with_sublayers
from auxin.errors import DataError, PlanError
from auxin.models.sublayers import sublayers
from auxin.objectives.calibration import Calibration
from auxin.planning.trained_weights import trainable_copy
from edits.models import everything
from oracles import gates as oracle
from tiny_models import InDouble, inputs, labels, logits, tiny

CPU = torch.device("cpu")


def gates_on(model: Any, groups: list[Group] | None = None, kappas: dict[Group, float] | None = None) -> Gates:
    """Gates on heads, feed-forward units and the residual."""
    units = units_of(model)
    groups = groups or [*maskable(units, ["heads", "ffn"]), ("residual", "")]
    return Gates(units, groups, kappas or dict.fromkeys(groups, 1.0), 0, CPU)


def set_to(gates: Gates, mu: float, log_variance: float) -> None:
    with torch.no_grad():
        gates.mu.fill_(mu)
        gates.log_variance.fill_(log_variance)


def no_task() -> Tensor:
    return torch.zeros(())


def texts(model: Any) -> Calibration:
    return Calibration.of_batches(model, [{**inputs(model, batch=4), "labels": labels(model, batch=4)}])


@given(h=st.floats(0.1, 5), mu=st.floats(-2, 2), sigma=st.floats(0.05, 2))
def test_the_divergence_is_the_least_over_all_priors_whatever_passes(h, mu, sigma):
    gates = gates_on(tiny("llama"), [("ffn", "model.layers.0")])
    set_to(gates, mu, 2 * torch.tensor(sigma).log().item())
    least = oracle.least_divergence(h, mu, sigma)
    # A variance counts TINY more, which the slope of the divergence, at most 1 / (2 sigma^2), makes this; and rounding.
    assert gates.kl().item() == pytest.approx(least, abs=TINY / (2 * sigma**2) + 1e-6 * (1 + least))


def test_divergences_count_by_their_kappas():
    model = tiny("llama")
    ffn, residual = ("ffn", "model.layers.0"), ("residual", "")
    gates = gates_on(model, [ffn, residual], {ffn: 1.0, residual: 5.0})
    set_to(gates, 1.0, 0.0)
    with torch.no_grad():
        gates.by_group(gates.log_variance)[residual].fill_(-4.0)
    counts = {group: len(values) for group, values in gates.by_group(gates.mu).items()}
    one, other = (0.5 * torch.log1p(torch.tensor(1.0) / torch.tensor(x).exp()) for x in (0.0, -4.0))
    whole = counts[ffn] + 5 * counts[residual]
    assert gates.kl().item() == pytest.approx((counts[ffn] * one + 5 * counts[residual] * other).item() / whole)


def passed(model: Any, gates: Gates, group: Group, tokens: int, value: float) -> Tensor:
    """What comes of the same value for every entry, (tokens, entries)."""
    place = next(place for place in units_of(model).places if place.group == group)
    width = gates.counts[gates._gated_by[group]] * place.entries
    width *= 1 if group[0] != "query" else model.config.num_attention_heads // model.config.num_key_value_heads
    with gates.on():
        return gates(place, Rows(torch.full((tokens, width), value), tokens)).detach()


def test_draws_have_the_mean_and_the_variance_of_the_gate():
    model = tiny("llama")
    gates = gates_on(model, [("ffn", "model.layers.0")])
    set_to(gates, 0.7, 2 * torch.tensor(0.3).log().item())
    found = passed(model, gates, ("ffn", "model.layers.0"), 20_000, 2.0)
    assert found.mean().item() == pytest.approx(2.0 * 0.7, rel=0.01)
    assert found.var().item() == pytest.approx(4.0 * 0.09, rel=0.01)
    assert found.std(dim=0).min() > 0.5  # every token another draw,
    assert found.std(dim=1).min() > 0  # and every unit


def test_query_heads_of_a_group_share_draws_and_dimensions_do_not():
    model = tiny("llama")
    gates = gates_on(model, [("key_value", "model.layers.0")])
    set_to(gates, 1.0, 0.0)
    found = passed(model, gates, ("query", "model.layers.0"), 50, 1.0).unflatten(
        -1, (model.config.num_key_value_heads, -1, model.config.head_dim)
    )
    assert found.shape[2] > 1
    assert torch.equal(found[:, :, 0], found[:, :, 1])
    assert found.std(dim=-1).min() > 0
    assert (found[:, 0] != found[:, 1]).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "mixtral"])
def test_gates_of_one_without_noise_change_no_bit(family):
    model = tiny(family, dtype=torch.float32)
    gates = gates_on(model)
    set_to(gates, 1.0, -1e9)
    before = logits(model)
    with gates.on():
        assert torch.equal(logits(model), before)
    set_to(gates, 1.0, 0.0)
    with gates.on(noisy=False):
        assert torch.equal(logits(model), before)
    with gates.on():
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)  # and no hook stays


def test_without_a_task_all_gates_become_noise():
    gates = gates_on(tiny("llama"))
    assert (gates.log_alpha() < -8).all()
    before = gates.kl().item()
    learn(gates, no_task, GateSettings(steps=60, learning_rate=0.5, beta=1.0), [])
    assert (gates.log_alpha() > 0).all()
    assert gates.kl().item() < 0.1 * before


def half(gates: Gates) -> Goal:
    return Goal(lambda shares: torch.cat(list(shares.values())).mean(), 0.5)


def test_with_the_published_slope_a_goal_alone_moves_nothing_and_with_that_of_one_it_does():
    """At log alpha = -9 a sigmoid of slope 10 is flat in float32: units go by the divergence alone."""
    for slope, still in ((10.0, True), (1.0, False)):
        gates = gates_on(tiny("llama"))
        start = gates.log_alpha().detach()
        learn(gates, no_task, GateSettings(steps=40, slope=slope, beta=0.0), [half(gates)])
        assert torch.equal(gates.log_alpha(), start) == still
        assert (gates.log_alpha() < 0).all() == still


def test_with_a_task_alone_nothing_goes():
    model = tiny("llama", dtype=torch.float32)
    gates = gates_on(model)
    with losses_of(model, texts(model), "the test") as task:
        learn(gates, task, GateSettings(steps=20, beta=0.0), [])
    assert (gates.log_alpha() < 0).all()


def test_gates_are_learned_under_noise():
    """The model's loss is that of draws, at every step of others; means alone would know nothing of the variances."""
    model = tiny("llama", dtype=torch.float32)
    gates, seen = gates_on(model), list[Tensor]()
    set_to(gates, 1.0, -2.0)
    whole = logits(model)
    variances = gates.log_variance.detach().clone()

    def task() -> Tensor:
        seen.append(model(**inputs(model)).logits)
        return seen[-1].square().mean()

    learn(gates, task, GateSettings(steps=2, learning_rate=1e-9, beta=0.0), [])
    assert all(not torch.allclose(found, whole, rtol=0.1) for found in seen)
    assert not torch.allclose(*seen, rtol=0.1)
    learn(gates, task, GateSettings(steps=1, learning_rate=0.1, beta=0.0), [])
    assert (gates.log_variance != variances).float().mean() > 0.9, "the loss says something of the variances"


def test_learning_changes_neither_model_nor_random_numbers_and_repeats_itself():
    model = tiny("llama", dtype=torch.float32)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    before, state = copy.deepcopy(everything(model)), torch.random.get_rng_state()
    asking = [parameter.requires_grad for parameter in model.parameters()]
    found = []
    for _ in range(2):
        gates = gates_on(model)
        with losses_of(model, texts(model), "the test") as task:
            losses = learn(gates, task, GateSettings(steps=3), [half(gates)])
        found.append((gates.mu.detach(), gates.log_variance.detach(), losses))
        torch.rand(1)  # elsewhere other numbers
    assert all(map(torch.equal, found[0][:2], found[1][:2]))
    assert found[0][2] == found[1][2]
    torch.random.set_rng_state(state)
    with losses_of(model, texts(model), "the test") as task:
        learn(gates_on(model), task, GateSettings(steps=1), [])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert str(before) == str(everything(model))
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_are_float32_whatever_the_model_is(dtype):
    model = tiny("llama", dtype=dtype)
    gates = gates_on(model)
    with losses_of(model, texts(model), "the test") as task:
        learn(gates, task, GateSettings(steps=2), [half(gates)])
    assert gates.mu.dtype == gates.kl().dtype == torch.float32
    place = next(place for place in units_of(model).places if place.group[0] == "ffn")
    with gates.on():
        assert gates(place, Rows(torch.ones(2, gates.counts[place.group], dtype=dtype), 2)).dtype == dtype


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gates_learn_what_their_means_do_to_the_loss_wherever_they_lie(family):
    """Oracle: by differences, with gates on every kind of place at once, so that most lie behind others."""
    model = tiny(family)
    whole = sublayers(model)
    units = with_sublayers(model, units_of(model), whole)
    groups = [*maskable(units, ["heads", "ffn"]), ("residual", ""), *(("sublayer", one.path) for one in whole)]
    gates = Gates(units, groups, dict.fromkeys(groups, 1.0), 0, CPU).double()
    given = {**inputs(model), "labels": labels(model)}

    def loss() -> Tensor:
        with gates.on(noisy=False), InDouble():
            return model(**given).loss

    loss().backward()
    assert gates.mu.grad is not None
    slopes, means = gates.by_group(gates.mu.grad), gates.by_group(gates.mu.data)
    for group in groups:
        found = []
        for step in (1e-5, -1e-5):
            means[group][0] += step
            found.append(loss().item())
            means[group][0] -= step
        assert slopes[group][0].item() == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_a_sublayer_has_one_draw_for_a_token():
    model = tiny("llama")
    (part,) = [one for one in sublayers(model) if one.path == "model.layers.1.mlp"]
    units = with_sublayers(model, units_of(model), [part])
    group: Group = ("sublayer", part.path)
    gates = Gates(units, [group], {group: 1.0}, 0, CPU)
    set_to(gates, 0.7, 2 * torch.tensor(0.3).log().item())
    (place,) = [place for place in units.places if place.group == group]
    with gates.on():
        found = gates(place, Rows(torch.full((20_000, 3), 2.0), 20_000)).detach()
    assert torch.equal(found[:, :1].expand(-1, 3), found)
    assert found.mean().item() == pytest.approx(2.0 * 0.7, rel=0.01)
    assert found.var().item() == pytest.approx(4.0 * 0.09, rel=0.03)


def test_weights_learn_with_gates_from_labels_and_from_a_teacher():
    """Where labels say nothing new, the divergence from the teacher alone falls."""
    model = tiny("llama", dtype=torch.float32)
    student, weights = trainable_copy(model, "the test")
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(0.8)
    gates = gates_on(student)
    settings = GateSettings(steps=30, weight_learning_rate=0.01, beta=0.0)
    found = {}
    for weight in (0.0, 10.0):
        with losses_of(student, texts(model), "the test", list(weights.values()), model, weight) as task:
            found[weight] = task().item()
    with losses_of(student, texts(model), "the test", list(weights.values()), model, 10.0) as task:
        losses = learn(gates, task, settings, [], list(weights.values()))
    assert found[10.0] > found[0.0] + 0.1
    assert losses[-1] < 0.5 * losses[0]
    assert gates.mu.grad is not None


@pytest.mark.parametrize("case", ["llama", "bert", "BertForSequenceClassification", "t5"])
def test_the_divergence_from_a_teacher_is_that_of_the_labelled_places(case):
    """Oracle: sums over classes by hand, at the places whose label counts; a causal model's are one place earlier."""
    head = case if case.startswith("Bert") else ""
    model, teacher = (tiny("bert" if head else case, seed=seed, head=head) for seed in (0, 1))
    given = {**inputs(model), "labels": labels(model)}
    if head:
        given["labels"] = torch.tensor([0, 1])
    else:
        given["labels"][0, :3] = -100
    data = Calibration.of_batches(model, [given])
    found = []
    for weight in (0.0, 1.0):
        with losses_of(model, data, "the test", [], teacher, weight) as task, torch.no_grad():
            found.append(task().item())
    with torch.no_grad():
        ours, told = (each(**given).logits.double().softmax(-1) for each in (model, teacher))
    counts = given["labels"] != -100
    if case == "llama":
        ours, told, counts = ours[:, :-1], told[:, :-1], counts[:, 1:]
    each = (told * (told / ours).log()).sum(-1)[counts]
    assert found[1] - found[0] == pytest.approx(each.mean().item(), rel=1e-5)


def test_what_has_no_loss_is_refused():
    model = tiny("llama_without_head", dtype=torch.float32)
    data = Calibration.of_batches(model, [{**inputs(model), "labels": torch.zeros(2, 7, dtype=torch.long)}])
    gates = gates_on(model)
    with (
        pytest.raises(DataError, match=r"gives no loss for .*by which the test learns"),
        losses_of(model, data, "the test") as task,
    ):
        learn(gates, task, GateSettings(steps=1), [])
    answers = tiny("llama_for_answers")
    start = torch.zeros(2, dtype=torch.long)
    data = Calibration.of_batches(answers, [{**inputs(answers), "start_positions": start, "end_positions": start}])
    with (
        pytest.raises(
            PlanError, match=r"gives start_logits and end_logits, and logits of one kind are.*\. Set distillation = 0\."
        ),
        losses_of(answers, data, "the test", teacher=answers) as task,
    ):
        task()
    with pytest.raises(PlanError, match=r"loss with gates is nan at step 0\. Lower learning_rate"):
        learn(gates_on(tiny("llama")), lambda: torch.tensor(torch.nan), GateSettings(steps=1), [])
