"""Pattention against its equations, its algebra, and what a dense layer costs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from auxin.errors import ConfigError
from auxin.nn.pattention import Pattention, pattention
from oracles import pattention as oracle

SCORE_FUNCTIONS = ["l2_norm_gelu", "gelu_l2_norm", "gelu", "linear", "softmax"]
NORMS = SCORE_FUNCTIONS[:2]
GELUS = ["erf", "tanh"]
every_score_function = pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)


def random(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


def layer(group_sizes, d_in=6, d_out=5, dtype=torch.float64, seed=0, **options):
    module = Pattention(d_in, d_out, group_sizes, dtype=dtype, **options)
    module.reset_parameters(torch.Generator().manual_seed(seed))
    return module


def roots(group_sizes):
    return torch.tensor([math.sqrt(size) for size in group_sizes], dtype=torch.float64)


# --- the equations -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    group_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rows=st.integers(0, 4),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    score_function=st.sampled_from(SCORE_FUNCTIONS),
    gelu=st.sampled_from(GELUS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    trained=st.booleans(),
    zero_row=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_equals_the_oracle(group_sizes, rows, widths, score_function, gelu, dtype, trained, zero_row, seed):
    n, tau = sum(group_sizes), [0.5 + 0.7 * size for size in group_sizes]
    x, keys = random(rows, widths[0], seed=seed, dtype=dtype), random(n, widths[0], seed=seed + 1, dtype=dtype)
    values = random(n, widths[1], seed=seed + 2, dtype=dtype)
    if zero_row:
        x[:1] = 0
    x.requires_grad_(trained)
    tau32 = torch.tensor(tau)
    ours = pattention(x, keys, values, tau32, group_sizes, score_function, gelu).detach()
    expected = oracle.pattention(
        *(tensor.detach().double().numpy() for tensor in (x, keys, values)),
        tau32.tolist(),
        group_sizes,
        score_function,
        gelu,
    )
    assert ours.dtype == dtype
    # 16-bit scores and weights are rounded: relative to the size of what is summed, not of the sum.
    scale = max(tau) ** (2 if score_function == "softmax" else 1) * float(values.double().norm()) + 1
    unit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    lost = lost_digits(x, keys, group_sizes) if score_function == "gelu_l2_norm" else np.ones((rows, 1))
    assert (np.abs(ours.double().numpy() - expected) <= unit * scale * lost).all()


def lost_digits(x, keys, group_sizes):
    """(rows, 1): how much larger than its relative error that of a normalised GELU is.

    1 + erf(a) cancels for a very negative score a, so that GELU(a) is off by a rounding of a, not of itself; where a
    group has no other scores, the norm then divides by what is left.
    """
    blocks = (x.detach().double() @ keys.double().T).split(list(group_sizes), dim=-1)
    ratios = [block.norm(dim=-1) / F.gelu(block).norm(dim=-1).clamp_min(1e-300) for block in blocks]
    return torch.stack(ratios).nan_to_num(1.0).max(dim=0).values.clamp_min(1.0)[:, None].numpy()


def test_one_group_is_the_published_layer():
    module, x = layer([32], d_in=16), random(8, 16)
    scores = x @ module.key_tokens.T
    published = F.gelu(scores / scores.norm(p=2, dim=-1, keepdim=True) * math.sqrt(32)) @ module.value_tokens
    torch.testing.assert_close(module(x), published, rtol=1e-5, atol=1e-6)


def test_groups_are_the_sum_of_layers_of_one_group():
    module, x = layer([5, 1, 12]), random(2, 3, 6)
    parts = [
        pattention(x, keys, values, tau, [len(keys)])
        for keys, values, tau in zip(
            module.key_tokens.split([5, 1, 12]), module.value_tokens.split([5, 1, 12]), module.tau.split(1), strict=True
        )
    ]
    torch.testing.assert_close(module(x), sum(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
@pytest.mark.parametrize("sizes", [[3, 5], [4, 4], [16, 32]])
def test_every_group_may_have_an_epsilon_of_its_own(score_function, sizes):
    eps, tau = [0.5, 0.01], roots(sizes)
    x, keys = random(7, 6, scale=0.3), random(sum(sizes), 6, seed=1)
    values = random(sum(sizes), 5, seed=2)
    parts = [
        oracle.pattention(x.numpy(), k.numpy(), v.numpy(), [t], [size], score_function, eps=number)
        for k, v, t, size, number in zip(keys.split(sizes), values.split(sizes), tau.tolist(), sizes, eps, strict=True)
    ]
    arguments = (x, keys, values)
    for trained in (False, True):
        for as_compiled in (False, True):
            tensors = [tensor.clone().requires_grad_(trained) for tensor in arguments]
            scales = tau.clone().requires_grad_(as_compiled)  # then it takes the way compilers take
            ours = pattention(*tensors, scales, sizes, score_function, eps=eps)
            np.testing.assert_allclose(ours.detach().numpy(), sum(parts), rtol=0, atol=1e-12)
    tensors = [tensor.clone().requires_grad_() for tensor in arguments]
    check = torch.autograd.gradcheck
    assert check(lambda *t: pattention(*t, tau, sizes, score_function, eps=eps), tensors)


def test_jacobian_is_equation_25():
    n = 7
    scores, identity = random(n, seed=3), torch.eye(n, dtype=torch.float64)

    def weights(row):  # keys and values that show the weights of given scores
        return pattention(row, identity, identity, torch.tensor([math.sqrt(n)], dtype=torch.float64), [n], eps=1e-300)

    ours = torch.autograd.functional.jacobian(weights, scores)
    np.testing.assert_allclose(ours.numpy(), oracle.score_jacobian(scores.tolist()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gelu", GELUS)
@pytest.mark.parametrize("group_sizes", [[5], [3, 1, 4]])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@every_score_function
def test_gradients_are_those_of_the_formula(score_function, group_sizes, eps, gelu):
    n = sum(group_sizes)
    inputs = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(2, 2, 4), (n, 4), (n, 3)])]
    tau = roots(group_sizes)
    assert torch.autograd.gradcheck(lambda *t: pattention(*t, tau, group_sizes, score_function, gelu, eps), inputs)
    # A scale that asks for a gradient gets it, along the way compilers take.
    tau = tau.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: pattention(*t, group_sizes, score_function, gelu, eps), [*inputs, tau])


@pytest.mark.parametrize("score_function", NORMS)
def test_gradient_at_zero_scores_is_that_of_the_formula(score_function):
    inputs = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(3, 4), (5, 4), (5, 3)])]
    inputs[0].data[1] = 0
    tau = torch.tensor([1.5, 1.0])
    check = torch.autograd.gradcheck
    assert check(lambda *t: pattention(*t, tau, [3, 2], score_function, eps=0.5), inputs, eps=1e-7, atol=1e-5)


@settings(max_examples=30)
@given(
    # Of a single token's score only the sign gets through: its gradient is a difference of equal numbers.
    group_sizes=st.lists(st.integers(4, 40), min_size=1, max_size=4),
    rows=st.integers(1, 6),
    score_function=st.sampled_from(SCORE_FUNCTIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    seed=st.integers(0, 2**20),
)
def test_gradients_respect_what_is_frozen(group_sizes, rows, score_function, dtype, wanted, seed):
    n, tau = sum(group_sizes), roots(group_sizes)
    tensors = [random(*shape, seed=seed + i) for i, shape in enumerate([(rows, 8), (n, 8), (n, 4)])]
    # GELU of a very negative score has few right digits in float32, and a group of one such score consists of them.
    tensors[0] *= 0.3
    ours = [t.to(dtype).requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    exact = [t.detach().double().requires_grad_() for t in ours]
    pattention(*ours, tau, group_sizes, score_function).square().sum().backward()
    pattention(*exact, tau, group_sizes, score_function).square().sum().backward()
    # A row of one or two scores hardly depends on its keys: the error is relative to all gradients together.
    scale = math.hypot(*(t.grad.norm().item() for t in exact))
    for one, other, want in zip(ours, exact, wanted, strict=True):
        assert (one.grad is not None) == want
        if want:
            error = (one.grad.double() - other.grad).norm() / scale
            limit = 1e-3 if score_function == "gelu_l2_norm" else 1e-5
            assert error < (limit if dtype == torch.float32 else 0.1)


# --- the algebra -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**20), factor=st.floats(1e-2, 1e3), groups=st.lists(st.integers(1, 9), min_size=1))
def test_scale_of_the_input_and_of_each_groups_keys_does_not_matter(seed, factor, groups):
    x, keys, values = random(3, 6, seed=seed), random(sum(groups), 6, seed=seed + 1), random(sum(groups), 4, seed=2)
    args = (values, roots(groups), groups, "l2_norm_gelu", "erf", 1e-14)
    output = pattention(x, keys, *args)
    torch.testing.assert_close(pattention(x * factor, keys, *args), output, rtol=0, atol=1e-8)
    rescaled = keys.clone()
    rescaled[: groups[0]] *= factor
    torch.testing.assert_close(pattention(x, rescaled, *args), output, rtol=0, atol=1e-8)


@given(seed=st.integers(0, 2**20), score_function=st.sampled_from(SCORE_FUNCTIONS))
def test_order_of_tokens_within_a_group_does_not_matter(seed, score_function):
    module, x = layer([7, 4], seed=seed, score_function=score_function), random(3, 6, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(7, generator=generator), 7 + torch.randperm(4, generator=generator)])
    shuffled = pattention(x, module.key_tokens[order], module.value_tokens[order], module.tau, [7, 4], score_function)
    torch.testing.assert_close(shuffled, module(x), rtol=0, atol=1e-12)


def test_norm_of_the_normalised_scores_is_tau():
    # Scores far above zero, where GELU(Z) is Z: the weights' norm is then tau.
    keys, identity = random(6, 4).abs() + 0.5, torch.eye(6, dtype=torch.float64)
    weights = pattention(torch.ones(1, 4, dtype=torch.float64), keys, identity, torch.tensor([300.0]), [6])
    torch.testing.assert_close(weights.norm(), torch.tensor(300.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gelu", GELUS)
def test_duplicated_tokens_under_the_root_rule_are_exact(gelu):
    module, x = layer([6], gelu=gelu), random(4, 6)
    for times in (2, 3):
        keys, values = module.key_tokens.repeat(times, 1), module.value_tokens.repeat(times, 1) / times
        eps = 0.1 * math.sqrt(times)
        grown = pattention(x, keys, values, roots([6 * times]), [6 * times], gelu=gelu, eps=eps)
        before = pattention(x, module.key_tokens, module.value_tokens, module.tau, [6], gelu=gelu, eps=0.1)
        torch.testing.assert_close(grown, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("score_function", NORMS)
def test_zero_keys_under_the_kept_tau_are_exact(score_function):
    module, x = layer([24], d_in=16, score_function=score_function, dtype=torch.float32), random(5, 16).float()
    keys = torch.cat([module.key_tokens, torch.zeros(40, 16)])
    values = torch.cat([module.value_tokens, random(40, 5).float()])
    grown = pattention(x, keys, values, module.tau, [64], score_function)
    torch.testing.assert_close(grown, module(x), rtol=0, atol=1e-6)


def test_growth_under_the_recomputed_tau_changes_the_function_as_measured():
    """1024 -> 1792 tokens, hidden size 768, the reference's initialisation: zero keys 37.5 %, random ones 87 %."""
    d, old, new = 768, 1024, 1792
    x = F.layer_norm(random(64, d, dtype=torch.float32), (d,))
    keys = random(new, d, seed=1, dtype=torch.float32, scale=0.02)
    values = random(new, d, seed=2, dtype=torch.float32, scale=2 / (12 * math.sqrt(d)))
    before = pattention(x, keys[:old], values[:old], roots([old]), [old])
    zeros = torch.cat([keys[:old], torch.zeros(new - old, d)])

    def change(new_keys, tau):
        after = pattention(x, new_keys, values, tau, [new])
        return ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()

    assert change(zeros, roots([new])) == pytest.approx(0.375, abs=0.01)
    assert change(keys, roots([new])) == pytest.approx(0.871, abs=0.02)
    assert change(zeros, roots([old])) < 1e-6


def test_new_tokens_without_keys_and_values_are_dead():
    keys, values = random(8, 6), random(8, 5)
    keys[5:], values[5:] = 0, 0
    keys.requires_grad_(), values.requires_grad_()
    pattention(random(4, 6), keys, values, roots([8]), [8]).square().sum().backward()
    assert keys.grad[5:].count_nonzero() == 0
    assert values.grad[5:].count_nonzero() == 0
    assert keys.grad[:5].count_nonzero() > 0


# --- numerics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", ["input", "keys"])
@pytest.mark.parametrize("groups", [[5, 3], [4, 4], [32, 16]])
@pytest.mark.parametrize("as_compiled", [False, True])
@pytest.mark.parametrize("score_function", NORMS)
def test_zero_scores_give_zeros_and_finite_gradients(score_function, as_compiled, groups, zero, dtype):
    module, x = layer(groups, dtype=dtype, score_function=score_function), random(4, 6, dtype=dtype)
    module.tau.requires_grad_(as_compiled)  # then it takes the way compilers take
    if zero == "keys":
        module.key_tokens.data.zero_()
    else:
        x[1] = 0
    x.requires_grad_()
    output = module(x)
    assert output[slice(None) if zero == "keys" else 1].count_nonzero() == 0
    output.backward(random(*output.shape, seed=5, dtype=dtype))
    for tensor in (x, module.key_tokens, module.value_tokens):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "score", "tokens"), [(torch.bfloat16, 1.0, 4096), (torch.float16, 300.0, 64)])
@pytest.mark.parametrize("trained", [True, False])
def test_norm_of_16_bit_scores_is_taken_in_float32(dtype, score, tokens, trained):
    """A bfloat16 sum of 4096 ones stops at 256; a float16 square of 300 overflows. In float32 every Z is 1."""
    x = torch.tensor([[score]], dtype=dtype, requires_grad=trained)
    values = torch.full((tokens, 1), 1 / tokens, dtype=dtype)
    output = pattention(x, torch.ones(tokens, 1, dtype=dtype), values, roots([tokens]), [tokens])
    assert output.item() == pytest.approx(oracle.gelu(1.0, "erf"), rel=1e-2)


@every_score_function
def test_large_scores_do_not_overflow(score_function):
    module = layer([4, 4], score_function=score_function, dtype=torch.float32)
    x = (random(3, 6) * 1e4).float().requires_grad_()
    module(x).sum().backward()
    assert x.grad.isfinite().all()
    assert module.value_tokens.grad.isfinite().all()


@every_score_function
def test_autocast_runs_the_gemms_in_bfloat16_and_the_norm_in_float32(score_function):
    module, x = layer([40, 24], d_in=32, dtype=torch.float32, score_function=score_function), random(9, 32).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
        with torch.no_grad():
            silent = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, silent, rtol=0, atol=0)
    exact = module(x).detach()
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    output.float().square().sum().backward()
    assert module.key_tokens.grad.dtype == torch.float32


@every_score_function
def test_inference_gives_the_bits_of_training(score_function):
    module, x = layer([40, 24], dtype=torch.float32, score_function=score_function), random(2, 7, 6).float()
    trained = module(x)
    with torch.inference_mode():
        assert torch.equal(module(x), trained)


# --- what it costs -----------------------------------------------------------------------------------------------


def saved_bytes(function, own):
    """Bytes of the distinct storages autograd keeps, without the tensors in `own`."""
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in own}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_sizes", [[96], [32, 16, 40, 8]])
@every_score_function
def test_keeps_what_a_dense_layer_keeps_plus_one_float_per_row_and_group(score_function, group_sizes, dtype):
    module = layer(group_sizes, d_in=32, d_out=24, dtype=dtype, score_function=score_function)
    x = random(50, 32, dtype=dtype).requires_grad_()
    down = module.value_tokens.detach().T.contiguous().requires_grad_()
    own = [x, module.key_tokens, module.value_tokens, module.tau, down]
    dense = saved_bytes(lambda: F.linear(F.gelu(F.linear(x, module.key_tokens)), down), own)
    assert dense == 2 * 50 * 96 * x.element_size()
    assert saved_bytes(lambda: module(x), own) <= dense + 4 * 50 * len(group_sizes)


@pytest.mark.parametrize("groups", [[64], [16, 16, 16, 16]])
def test_runs_one_gemm_for_the_scores_and_one_for_the_values(groups):
    module, x = layer(groups, d_in=32, d_out=24, dtype=torch.float32), random(10, 32).float()
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts == {torch.ops.aten.mm: 2 * 10 * 64 * (32 + 24) * 3 - 2 * 10 * 64 * 32}  # x wants no gradient


# --- in the company of the rest of torch -------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [[12], [6, 6], [7, 5], [32, 16]])
@every_score_function
def test_compiles_whole_and_sees_a_new_tau_without_recompiling(score_function, groups):
    torch.compiler.reset()
    eps = [0.3, 0.1][: len(groups)] if groups[0] > groups[-1] else 1e-6
    module, x = layer(groups, score_function=score_function, eps=eps), random(3, 6)
    x[1] = 0
    x.requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tau in ([1.0, 2.0], [3.0, 0.5]):
        module.set_tau(tau[: len(groups)])
        expected, got = module(x), compiled(x)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(got.square().sum(), [x, *module.parameters()]),
            torch.autograd.grad(expected.square().sum(), [x, *module.parameters()]),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    module, x = layer([7, 5]), random(3, 6).requires_grad_()
    module(x).square().sum().backward()
    plain = [x.grad.clone(), module.key_tokens.grad.clone()]
    x.grad = module.key_tokens.grad = None
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(module.key_tokens.grad, plain[1])


def test_backward_twice_over_one_graph_and_refuses_second_derivatives():
    module, x = layer([7, 5]), random(3, 6).requires_grad_()
    loss = module(x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


def test_a_changed_tau_between_forward_and_backward_is_an_error():
    module, x = layer([7, 5], dtype=torch.float32), random(3, 6, dtype=torch.float32).requires_grad_()
    output = module(x)
    module.set_tau([1.0, 1.0])
    with pytest.raises(RuntimeError, match="inplace"):
        output.sum().backward()


def test_parameters_can_be_swapped_as_sharding_does():
    module, x = layer([7, 5]), random(3, 6)
    other = layer([7, 5], seed=9)
    swapped = torch.func.functional_call(module, dict(other.named_parameters()), (x,))
    assert torch.equal(swapped, other(x))


def test_scales_survive_casts_and_the_meta_device():
    module = layer([576, 1564], d_in=4, tau=[24.0, 39.547], dtype=torch.float32)
    assert "tau" not in module.state_dict()
    exact = torch.tensor([24.0, 39.547])
    for cast in (torch.bfloat16, torch.float16, torch.float64, torch.float16, torch.float32):
        tau = module.to(cast).tau
        assert tau.dtype == (torch.float64 if cast == torch.float64 else torch.float32)
        assert tau.tolist() == ([24.0, 39.547] if cast == torch.float64 else exact.tolist())
    empty = Pattention(4, 5, [576, 1564], tau=[24.0, 39.547], device="meta")
    assert empty(torch.empty(2, 3, 4, device="meta")).shape == (2, 3, 5)
    assert torch.equal(empty.to_empty(device="cpu").tau, exact)
    empty = Pattention(4, 5, [576, 1564], tau=[24.0, 39.547], device="meta").double()
    assert empty.to_empty(device="cpu").tau.tolist() == [24.0, 39.547]
    module.tau.zero_()
    module.reset_tau()
    assert torch.equal(module.tau, exact)


@every_score_function
def test_layers_with_different_epsilons_compile_in_one_process(score_function):
    """The compiler makes a variable of a number that it has seen with two values."""
    torch.compiler.reset()
    x = random(3, 6)
    for eps in (1e-6, 1e-3, 0.5, [1e-6, 0.1], 1e-5):
        module = layer([16, 16], score_function=score_function, eps=eps)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-12)


@every_score_function
def test_a_layer_in_float64_has_scales_in_float64(score_function):
    module, x = layer([7, 5, 3], score_function=score_function), random(4, 6)
    inputs = (tensor.detach().numpy() for tensor in (x, module.key_tokens, module.value_tokens))
    exact = oracle.pattention(*inputs, [math.sqrt(size) for size in (7, 5, 3)], [7, 5, 3], score_function)
    np.testing.assert_allclose(module(x).detach().numpy(), exact, rtol=0, atol=1e-14 * np.abs(exact).max())


def test_default_scales_and_initialisation():
    module = layer([576, 1564], d_in=64, d_out=256, dtype=torch.float32)
    assert module.initial_tau == (24.0, math.sqrt(1564))
    assert torch.equal(module.key_tokens, layer([576, 1564], d_in=64, d_out=256, dtype=torch.float32).key_tokens)
    output = layer([2048], d_in=64, d_out=256, dtype=torch.float32)(random(64, 64).float())
    assert output.std().item() == pytest.approx(math.sqrt(0.426), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_sizes": []}, "group_sizes"),
        ({"group_sizes": [4, 0]}, "group_sizes"),
        ({"group_sizes": [4, 2.0]}, "group_sizes"),
        ({"group_sizes": [4], "tau": [1.0, 2.0]}, "1 groups"),
        ({"group_sizes": [4], "tau": [0.0]}, "positive"),
        ({"group_sizes": [4], "tau": [math.nan]}, "positive"),
        ({"group_sizes": [4], "eps": 0.0}, "eps"),
        ({"group_sizes": [4, 2], "eps": [1e-6, math.nan]}, "eps must be a positive number, got nan"),
        ({"group_sizes": [4, 2], "eps": [1e-6]}, r"eps has 1 values .* for 2 groups"),
        ({"group_sizes": [4], "score_function": "softmix"}, "softmax"),
        ({"group_sizes": [4], "gelu": "relu"}, "tanh"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Pattention(3, 3, **options)


@pytest.mark.parametrize("tau", [[1.0], [1.0, -1.0]])
def test_a_refused_tau_changes_nothing(tau):
    module = layer([4, 4])
    with pytest.raises(ConfigError):
        module.set_tau(tau)
    assert torch.equal(module.tau, roots([4, 4]))


def test_tensors_that_do_not_fit_the_groups_are_named():
    module, x = layer([4, 4]), random(2, 6)
    for keys, values, tau in [
        (module.key_tokens[:7], module.value_tokens, module.tau),
        (module.key_tokens, module.value_tokens[:7], module.tau),
        (module.key_tokens, module.value_tokens, module.tau[:1]),
    ]:
        with pytest.raises(ConfigError, match="one row per token"):
            pattention(x, keys, values, tau, [4, 4])
