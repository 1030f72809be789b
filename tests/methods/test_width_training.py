"""Training after a widening: moments follow the gradient, the derived rates make the next steps the old ones."""

import copy

import pytest
import torch

from auxin.edits import apply, continue_exactly
from auxin.errors import PlanError
from auxin.methods.grow.hypercloning import METHOD as HYPERCLONING
from auxin.methods.grow.lemon import METHOD as LEMON
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from tiny_models import FAMILIES, InDouble, change, inputs, labels, logits, tiny

CLONES = [
    *((family, HYPERCLONING, {"factor": 2}) for family in FAMILIES),
    *((family, HYPERCLONING, {"factor": 3, "variant": "diagonal"}) for family in ("llama", "gpt2", "gpt_neox", "t5")),
    ("gpt2", HYPERCLONING, {"hidden_size": 48}),
    ("qwen3", HYPERCLONING, {"hidden_size": 48, "num_attention_heads": 8}),
]
UNEVEN = [
    ("llama", LEMON, {"hidden_size": 32, "intermediate_size": 20, "split_noise": 0.0}),
    ("gpt2", LEMON, {"intermediate_size": 20, "split_noise": 0.0}),
    ("qwen3", LEMON, {"num_attention_heads": 6, "num_key_value_heads": 3, "split_noise": 0.0}),
]


def named(value):
    return getattr(value, "name", str(value))


def backward(model, seed):
    with InDouble():
        loss = model(**inputs(model, seed), labels=labels(model, seed)).loss
        loss.backward()


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def adamw(model, **settings):
    return torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-3, **settings})


def widened_twin(family, method, settings, optimizer=adamw, **model_config):
    """A model after three steps, and its widened copy; both with their optimizers."""
    make = optimizer
    small = tiny(family, **model_config)
    optimizer = make(small)
    train(small, optimizer, range(3))
    wide = copy.deepcopy(small)
    wide_optimizer = make(wide)
    wide_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan = method.plan(Bench(wide), method.settings.parse(settings))
    receipt = apply(plan, wide, wide_optimizer, probe=inputs(wide))
    return small, optimizer, wide, wide_optimizer, receipt


@pytest.mark.parametrize(("family", "method", "settings"), CLONES + UNEVEN, ids=named)
def test_moments_are_those_of_the_new_gradients(family, method, settings):
    model = tiny(family)
    backward(model, 5)
    optimizer = adamw(model)
    for parameter in model.parameters():
        gradient = parameter.grad.clone()
        optimizer.state[parameter] = {"step": torch.tensor(7.0), "exp_avg": gradient, "exp_avg_sq": gradient**2}
    apply(method.plan(Bench(model), method.settings.parse(settings)), model, optimizer, probe=inputs(model))
    model.zero_grad()
    backward(model, 5)
    scale = max(parameter.grad.abs().max() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert (state["exp_avg"] - parameter.grad).abs().max() < 1e-12 * scale, name
        assert (state["exp_avg_sq"] - parameter.grad**2).abs().max() < 1e-12 * scale**2, name


@pytest.mark.parametrize(("family", "method", "settings"), CLONES, ids=named)
def test_the_next_six_steps_are_those_of_the_small_model(family, method, settings):
    small, optimizer, wide, wide_optimizer, receipt = widened_twin(family, method, settings)
    assert receipt.continues_exactly
    assert receipt.overshoot == pytest.approx(settings.get("factor", 3))
    continue_exactly(wide_optimizer, wide, receipt)
    before = logits(small)
    train(small, optimizer, range(10, 16))
    train(wide, wide_optimizer, range(10, 16))
    assert change(logits(small), logits(wide)) < 1e-10
    assert change(before, logits(small)) > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_six_steps_tied_and_untied(tied):
    for family in ("llama", "gpt2"):
        small, optimizer, wide, wide_optimizer, receipt = widened_twin(
            family, HYPERCLONING, {"factor": 3}, tie_word_embeddings=tied
        )
        continue_exactly(wide_optimizer, wide, receipt)
        train(small, optimizer, range(10, 16))
        train(wide, wide_optimizer, range(10, 16))
        assert change(logits(small), logits(wide)) < 1e-10


def of(kind, **settings):
    """What makes an optimizer of a model, by its class."""
    return lambda model: kind(model.parameters(), **settings)


class Unsteady(torch.optim.AdamW):
    """May do anything."""


@pytest.mark.parametrize(
    "make",
    [
        of(torch.optim.AdamW, lr=3e-3, weight_decay=0.1, eps=1e-3, amsgrad=True),
        of(torch.optim.AdamW, lr=3e-3, weight_decay=0.1, eps=1e-3, maximize=True, foreach=True),
        of(torch.optim.AdamW, lr=3e-3, weight_decay=0.1, eps=1e-3, fused=True),
        of(torch.optim.Adam, lr=3e-3, eps=1e-3, amsgrad=True),
        of(torch.optim.Adam, lr=3e-3, eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    ],
    ids=["amsgrad", "maximize", "fused", "adam", "adam decoupled"],
)
def test_six_steps_of_all_that_step_as_adamw_does(make):
    small, optimizer, wide, wide_optimizer, receipt = widened_twin("llama", HYPERCLONING, {"factor": 2}, make)
    continue_exactly(wide_optimizer, wide, receipt)
    before = logits(small)
    train(small, optimizer, range(10, 16))
    train(wide, wide_optimizer, range(10, 16))
    assert change(logits(small), logits(wide)) < 1e-10
    assert change(before, logits(small)) > 1e-3


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (of(torch.optim.SGD, lr=1e-2, momentum=0.9), r"optimizer: SGD has no exact .* torch\.optim\.AdamW"),
        (of(torch.optim.RMSprop, lr=1e-3), r"optimizer: RMSprop"),
        (of(torch.optim.NAdam, lr=1e-3), r"optimizer: NAdam"),
        (of(Unsteady, lr=1e-3), r"optimizer: Unsteady"),
        (of(torch.optim.Adam, lr=3e-3, weight_decay=0.1), r"optimizer: Adam adds weight_decay = 0\.1 \(group 0\)"),
    ],
    ids=["sgd", "rmsprop", "nadam", "a subclass", "adam with decay"],
)
def test_optimizers_with_other_steps_are_refused_before_anything_changes(make, named):
    *_, wide, wide_optimizer, receipt = widened_twin("llama", HYPERCLONING, {"factor": 2}, make)
    groups = [dict(group) for group in wide_optimizer.param_groups]
    with pytest.raises(PlanError, match=named):
        continue_exactly(wide_optimizer, wide, receipt)
    assert wide_optimizer.param_groups == groups


@pytest.mark.parametrize(
    "make",
    [of(torch.optim.SGD, lr=1e-2, momentum=0.9), of(torch.optim.Adam, lr=3e-3, weight_decay=0.1)],
    ids=["sgd", "adam with decay"],
)
def test_the_rates_of_adamw_would_lead_others_elsewhere(make, monkeypatch):
    """Why they are refused: with the same factors their next steps are not those of the small model."""
    monkeypatch.setattr("auxin.edits.continuation._refuse_other_rules", lambda optimizer: None)
    small, optimizer, wide, wide_optimizer, receipt = widened_twin("llama", HYPERCLONING, {"factor": 2}, make)
    for group in wide_optimizer.param_groups:
        group.setdefault("eps", 1.0)
    continue_exactly(wide_optimizer, wide, receipt)
    train(small, optimizer, range(10, 16))
    train(wide, wide_optimizer, range(10, 16))
    assert change(logits(small), logits(wide)) > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_rates_go_elsewhere(family):
    small, optimizer, wide, wide_optimizer, _ = widened_twin(family, HYPERCLONING, {"factor": 2})
    train(small, optimizer, range(10, 16))
    train(wide, wide_optimizer, range(10, 16))
    assert change(logits(small), logits(wide)) > 0.01


@pytest.mark.parametrize(
    ("method", "settings", "overshoot"),
    [
        (HYPERCLONING, {"factor": 2, "variant": "noisy"}, 2),
        (LEMON, {"intermediate_size": 20, "split_noise": 0.0}, 2),
        (LEMON, {"hidden_size": 24}, 1),
    ],
    ids=["noisy", "uneven", "padded"],
)
def test_where_nothing_goes_on_exactly_it_is_said(method, settings, overshoot):
    *_, wide, wide_optimizer, receipt = widened_twin("llama", method, settings)
    assert not receipt.continues_exactly
    assert receipt.overshoot >= overshoot
    with pytest.raises(PlanError, match="no exact continuation"):
        continue_exactly(wide_optimizer, wide, receipt)


def copies_apart(model):
    embedding = model.get_input_embeddings().weight
    first, second = embedding.chunk(2, dim=1)
    return ((first - second).abs().max() / first.abs().max()).item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_copies_part_with_noise_only(family):
    apart = {}
    for variant in ("symmetric", "diagonal", "noisy"):
        *_, wide, optimizer, _ = widened_twin(family, HYPERCLONING, {"factor": 2, "variant": variant})
        assert copies_apart(wide) == 0
        train(wide, optimizer, range(20, 26))
        apart[variant] = copies_apart(wide)
    assert apart["symmetric"] < 1e-12
    assert apart["diagonal"] < 1e-12
    assert apart["noisy"] > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_every_padded_entry_wakes(family):
    """Nothing that LEMON adds stays without a gradient: behind zeros the readers are random."""
    model = tiny(family)
    before = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    settings = {"hidden_size": 24, "num_attention_heads": 6} if family != "t5" else {"hidden_size": 24}
    if family == "llama":
        settings["num_key_value_heads"] = 3
    apply(LEMON.plan(Bench(model), LEMON.settings.parse(settings)), model, probe=inputs(model))
    optimizer = adamw(model, weight_decay=0.0)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, range(4))
    for name, parameter in model.named_parameters():
        moved = (parameter - start[name]).abs()
        for axis, (old, new) in enumerate(zip(before[name], parameter.shape, strict=True)):
            if new > old:
                assert moved.narrow(axis, old, new - old).amax(dim=axis).max() > 0, name
    assert anatomy(model).sizes.residual == 24
