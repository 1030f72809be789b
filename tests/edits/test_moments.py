"""The optimizer's state follows the parameters."""

import copy

import pytest
import torch

import auxin
from auxin.edits import NormalFill, PadParameter, Plan, SetConfig, ZeroFill, apply
from auxin.errors import PlanError
from edits.models import tiny_model, token_ids, trained, training_step

KEYS, VALUES = "model.layers.0.mlp.key_tokens", "model.layers.0.mlp.value_tokens"


def moments(model, optimizer, name):
    return optimizer.state[dict(model.named_parameters())[name]]


def test_old_rows_keep_their_moments_and_new_rows_start_from_the_mean():
    model = tiny_model()
    optimizer = trained(model, amsgrad=True)
    old = copy.deepcopy(moments(model, optimizer, KEYS))
    auxin.grow(model, ffn_tokens=30, optimizer=optimizer)
    new = moments(model, optimizer, KEYS)
    assert set(new) == set(old) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert torch.equal(new["step"], old["step"])
    for state in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(new[state][:20], old[state])
    assert not new["exp_avg"][20:].any()
    torch.testing.assert_close(new["exp_avg_sq"][20:], old["exp_avg_sq"].mean(0).expand(10, -1))
    training_step(model, optimizer, 9)


@pytest.mark.parametrize(
    ("make", "linear", "square"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer", None),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True), "grad_avg", "square_avg"),
        (lambda p: torch.optim.Adagrad(p, lr=1e-3), None, "sum"),
        (lambda p: torch.optim.Adadelta(p), None, "acc_delta"),
        (lambda p: torch.optim.NAdam(p), "exp_avg", "exp_avg_sq"),
        (lambda p: torch.optim.AdamW(p, fused=True), "exp_avg", "exp_avg_sq"),
    ],
)
def test_any_optimizer_whose_state_has_the_parameter_s_shape(make, linear, square):
    model = tiny_model()
    optimizer = make(model.parameters())
    training_step(model, optimizer, 0)
    old = copy.deepcopy(moments(model, optimizer, KEYS))
    auxin.grow(model, ffn_tokens=30, optimizer=optimizer)
    new = moments(model, optimizer, KEYS)
    if linear:
        assert not new[linear][20:].any()
        assert torch.equal(new[linear][:20], old[linear])
    if square:
        torch.testing.assert_close(new[square][20:], old[square].mean(0).expand(10, -1))
    training_step(model, optimizer, 1)


def test_an_optimizer_without_state_and_frozen_parameters_are_no_obstacle():
    model = tiny_model()
    auxin.grow(model, ffn_tokens=30, optimizer=torch.optim.AdamW(model.parameters()))
    optimizer = torch.optim.AdamW([model.model.norm.weight])
    auxin.grow(model, ffn_tokens=40, optimizer=optimizer)


def test_an_optimizer_that_can_not_follow_is_refused_before_anything_changes():
    model = tiny_model()
    other = tiny_model()
    with pytest.raises(PlanError, match="holds no parameter of this model"):
        auxin.grow(model, ffn_tokens=30, optimizer=trained(other))
    optimizer = trained(model)
    state = moments(model, optimizer, VALUES)
    state["curvature"] = torch.zeros(20, 32)
    with pytest.raises(PlanError, match=r"state 'curvature' for model\.layers\.0\.mlp\.value_tokens"):
        auxin.grow(model, ffn_tokens=30, optimizer=optimizer)
    del state["curvature"]
    state["row_var"] = torch.zeros(20, 1)
    with pytest.raises(PlanError, match=r"'row_var' of .* has shape \[20, 1\]"):
        auxin.grow(model, ffn_tokens=30, optimizer=optimizer)
    assert model.config.ffn_tokens == [20]


def make_old(optimizer, steps, beta2):
    """The state that the optimizer would have after very many steps like the ones it did."""
    for state in optimizer.state.values():
        state["exp_avg_sq"] /= 1 - beta2**steps
        state["step"] += 1_000_000


def first_updates(seeded: bool, gradient, steps: int = 20, beta2: float = 0.999) -> list[float]:
    """Largest update of a new value row, in learning rates, over the first steps after a growth of a model whose
    optimizer has long seen gradients of size 1."""
    torch.manual_seed(0)
    model = tiny_model()
    values = model.model.layers[0].mlp.value_tokens
    optimizer = torch.optim.AdamW([values], lr=1e-4, betas=(0.9, beta2), weight_decay=0.0)
    for _ in range(100):
        values.grad = torch.randn_like(values)
        optimizer.step()
    make_old(optimizer, 100, beta2)
    auxin.grow(model, ffn_tokens=30, optimizer=optimizer)
    if not seeded:
        optimizer.state[values]["exp_avg_sq"][20:] = 0
    sizes = []
    for step in range(steps):
        before = values.detach().clone()
        values.grad = gradient(step, values)
        optimizer.step()
        sizes.append(((values.detach() - before)[20:].abs().max() / 1e-4).item())
    return sizes


def test_new_rows_make_no_outlying_update():
    def steady(step, values):
        return torch.ones_like(values)

    seeded, unseeded = first_updates(True, steady), first_updates(False, steady)
    assert max(seeded) <= 1.0
    # What goes wrong without the mean of the old second moment: 0.1 / sqrt(0.001) at once, twice that soon after.
    assert unseeded[0] == pytest.approx(3.16, abs=0.05)
    assert max(unseeded) == pytest.approx(6.6, abs=0.2)
    assert 8 <= unseeded.index(max(unseeded)) <= 14


def test_new_rows_make_no_outlying_update_in_training():
    def updates(seeded):
        model = tiny_model()
        optimizer = trained(model, 30, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
        make_old(optimizer, 30, 0.999)
        auxin.grow(model, ffn_tokens=40, optimizer=optimizer)
        values = model.model.layers[0].mlp.value_tokens
        if not seeded:
            optimizer.state[values]["exp_avg_sq"][20:] = 0
        sizes = []
        for step in range(20):
            before = values.detach().clone()
            training_step(model, optimizer, 200 + step)
            sizes.append(((values.detach() - before)[20:].pow(2).mean().sqrt() / 1e-3).item())
        return sizes

    assert max(updates(True)) < 1.0
    assert max(updates(False)) > 3.0


def test_moments_of_copies_are_those_of_the_gradients_that_copies_get():
    """exp_avg maps as the gradient does and exp_avg_sq as its square: after the duplication, the first moment of every
    parameter is the gradient that the grown model gets (float64, betas 0)."""
    model = tiny_model(dtype=torch.float64, pattention_eps=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    ids = token_ids(5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    auxin.grow(model, qkv_tokens=36, proj_tokens=24, ffn_tokens=60, regime="duplicate", optimizer=optimizer)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for moment, gradient in ((state["exp_avg"], parameter.grad), (state["exp_avg_sq"], parameter.grad**2)):
            assert (moment - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name


def test_moments_along_either_axis():
    model = tiny_model(tie_word_embeddings=False)
    optimizer = trained(model)
    name = "model.embed_tokens.weight"
    edits = [SetConfig(values={"vocab_size": 100})]
    edits += [
        PadParameter(parameter=n, size=100, fill=f) for n, f in ((name, NormalFill()), ("lm_head.weight", ZeroFill()))
    ]
    old = copy.deepcopy(moments(model, optimizer, name))
    apply(Plan(method="x", promise="none", edits=edits), model, optimizer)
    pad = PadParameter(parameter=name, axis=1, size=40, fill=ZeroFill())
    across = pad.map_moment(old["exp_avg_sq"], 2)
    torch.testing.assert_close(across[:, 32:], old["exp_avg_sq"].mean(1, keepdim=True).expand(-1, 8))
    assert moments(model, optimizer, name)["exp_avg"].shape == (100, 32)
