"""Clipped attention weights: the paper's equation, in every architecture that hands its attention to a function."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, BertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

import auxin
from auxin.edits import MergeModule, Plan, ReplaceModule
from auxin.errors import PlanError
from auxin.nn.attention_functions import calls_a_function
from auxin.nn.clipped_softmax import ClippedSoftmax, clipped
from covering import families
from nn.attentions import CASE, attention, called, projected
from oracles import quiet_heads as oracle
from outputs import output
from tiny_models import FAMILIES, inputs, tiny

MORE = ("opt", "gemma2", "gpt_oss", "deepseek_v3", "modernbert", "bart", "whisper", "beit", "segformer")
GAMMA = -0.15


def plan(model: Any, **settings: Any) -> Plan:
    paths = [name for name, module in model.named_modules() if calls_a_function(module)]
    edits: Any = [ReplaceModule(module=path, brick="clipped_softmax", settings=settings) for path in paths]
    return Plan(method="by hand", promise="none", edits=edits)


def clipped_copy(model: Any, **settings: Any) -> Any:
    new = copy.deepcopy(model)
    auxin.apply(plan(model, **settings), new)
    return new


@pytest.mark.parametrize(
    ("gamma", "zeta", "expected"),
    [
        (0.0, 1.0, [0.7, 0.2, 0.1]),
        (-0.1, 1.0, [0.67, 0.12, 0.01]),
        (-0.2, 1.0, [0.64, 0.04, 0.0]),
        (0.0, 1.5, [1.0, 0.3, 0.15]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_three_probabilities(gamma, zeta, expected, dtype):
    found = clipped(torch.tensor([0.7, 0.2, 0.1], dtype=dtype), gamma, zeta)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=torch.finfo(dtype).eps
    )
    if gamma == 0 and zeta == 1:
        assert torch.equal(found, torch.tensor([0.7, 0.2, 0.1], dtype=dtype))


@given(
    scores=st.lists(st.floats(-6, 6), min_size=1, max_size=12),
    gamma=st.floats(-1, 0),
    zeta=st.floats(1, 2),
)
def test_rows_are_those_of_the_equation_and_sum_up_to_what_is_left(scores, gamma, zeta):
    row = torch.tensor(scores, dtype=torch.float64).softmax(0)
    found = clipped(row, gamma, zeta)
    assert found.tolist() == pytest.approx(oracle.clipped(row.tolist(), gamma, zeta), abs=1e-12)
    left = clipped(row, gamma) > 0
    mass = (1 - gamma) * row[left].sum().item() + gamma * int(left.sum())
    assert clipped(row, gamma).sum().item() == pytest.approx(mass, abs=1e-12), "not renormalised"


@given(alpha=st.floats(0.1, 12), length=st.integers(16, 256), count=st.integers(1, 256))
def test_a_row_of_equal_weights_is_nothing_from_so_many_on(alpha, length, count):
    row = clipped(torch.full((count,), 1 / count, dtype=torch.float64), -alpha / length)
    if abs(count - (length + alpha) / alpha) < 1e-6:
        return
    assert bool((row == 0).all()) == (count > (length + alpha) / alpha)
    if count < (length + alpha) / alpha:
        assert row.sum().item() == pytest.approx(1 - (count - 1) * alpha / length)


class ClippedSoftmaxes(TorchFunctionMode):
    """Within it, what a softmax over four axes gives is clipped; some models have theirs in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "softmax" or result.dim() != 4:
            return result
        return ((1 - GAMMA) * result.double() + GAMMA).clamp(0, 1)


@pytest.mark.parametrize("family", families(dict.fromkeys([*FAMILIES, *MORE]), "llama", "t5", "gpt_oss", "bart", "vit"))
def test_a_model_reads_what_its_clipped_maps_say(family):
    """Against the model's eager attention, whose softmax is clipped where it is made."""
    model = tiny(family)
    if family == "tokenformer":
        assert not any(map(calls_a_function, model.modules()))
        return
    given_inputs = inputs(model)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        with ClippedSoftmaxes():
            expected = output(eager(**given_inputs))
        plain = output(model(**given_inputs))
        for implementation in ("sdpa", "eager") if model._supports_sdpa else ("eager",):
            new = clipped_copy(model, gamma=GAMMA)
            new.set_attn_implementation(implementation)
            torch.testing.assert_close(output(new(**given_inputs)), expected, rtol=0, atol=1e-10)
        begun = clipped_copy(model, gamma=GAMMA, zeta=1.2, begin=0.0)
        assert torch.equal(output(begun(**given_inputs)), plain), "nothing is clipped yet, to the last bit"
    assert not torch.equal(plain, expected)


@settings(max_examples=25)
@given(gamma=st.sampled_from([0.0, -0.05, -0.3, -0.6]), **CASE)
def test_an_attention_reads_what_was_worked_out_by_hand(heads, tokens, samples, implementation, padding, seed, gamma):
    module = ClippedSoftmax.replacing(attention(*heads, implementation, torch.float64, seed), gamma)
    hidden = torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        got, _, visible = called(module, hidden, padding, implementation)
        rows = projected(module, hidden)
        expected = torch.zeros(samples, tokens, heads[0] * 4, dtype=torch.float64)
        for sample in range(samples):
            for head in range(heads[0]):
                of_head = {
                    name: [token[head if name == "q" else head * heads[1] // heads[0]] for token in found[sample]]
                    for name, found in rows.items()
                }
                read = oracle.head(*of_head.values(), 0.5, visible.tolist(), gamma)
                expected[sample, :, head * 4 : head * 4 + 4] = torch.tensor(read, dtype=torch.float64)
        expected = torch.nn.functional.linear(expected, module.o_proj.weight)
    # The eager function of transformers makes probabilities in float32, whatever the type.
    rounding = 1e-5 if implementation == "eager" or gamma else 1e-9
    torch.testing.assert_close(got, expected, rtol=rounding, atol=10 * rounding)


def test_a_row_that_is_nothing_has_no_gradient_and_one_that_is_left_has():
    config = BertConfig(hidden_size=8, num_attention_heads=1, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    hidden = torch.randn(1, 16, 8)
    for alpha, dead in ((0.5, False), (4.0, True)):
        module = ClippedSoftmax.replacing(BertSelfAttention(config), -alpha / 16)
        for projection in (module.query, module.key):
            projection.weight.data.mul_(1e-3)  # nearly uniform, as in a new model
        result, weights = module(hidden)
        result.square().sum().backward()
        assert bool((weights == 0).all()) == dead
        assert bool((result == 0).all()) == dead
        gradients = [module.get_parameter(f"{name}.weight").grad.abs().max() for name in ("query", "key", "value")]
        assert all((gradient == 0) == dead for gradient in gradients)


def test_dropout_comes_behind_the_clipping():
    config = BertConfig(hidden_size=8, num_attention_heads=2, attention_probs_dropout_prob=0.5)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    module, hidden = ClippedSoftmax.replacing(BertSelfAttention(config), -0.1), torch.randn(2, 6, 8)
    with torch.no_grad():
        whole = module.eval()(hidden)[1]
        dropped = module.train()(hidden)[1]
    left = dropped != 0
    assert 0 < left.sum() < (whole != 0).sum()
    torch.testing.assert_close(dropped[left], 2 * whole[left])


def test_a_saved_model_is_clipped_again_and_reads_padded_texts_as_alone_with_and_without_a_cache(tmp_path):
    soft = tiny("llama", dtype=torch.float32, max_position_embeddings=64)
    model = clipped_copy(soft, gamma=GAMMA)
    auxin.save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    attentions = [module for module in loaded.modules() if isinstance(module, ClippedSoftmax)]
    assert [(module.gamma, module.strength.item()) for module in attentions] == [(GAMMA, 1.0)] * 2
    ids = inputs(model, batch=2, length=9)["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            step = loaded(token, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), loaded(ids).logits, rtol=0, atol=1e-5)
        padded = torch.cat([torch.full((2, 3), 3), ids[:, :6]], dim=1)
        mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        beside = loaded(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
        torch.testing.assert_close(beside, loaded(ids[:, :6]).logits, rtol=0, atol=1e-5)
        assert (soft(ids).logits - model(ids).logits).abs().max() > 1e-3
    # In the middle of a ramp, too.
    for module in model.modules():
        if isinstance(module, ClippedSoftmax):
            module.set_strength(0.25)
    auxin.save(model, tmp_path / "between")
    between = AutoModelForCausalLM.from_pretrained(tmp_path / "between").eval()
    with torch.no_grad():
        assert torch.equal(between(ids).logits, model(ids).logits)
        assert torch.equal(between(ids).logits, clipped_copy(soft, gamma=GAMMA / 4)(ids).logits)


def test_it_compiles_in_one_graph_and_follows_the_strength():
    model = clipped_copy(tiny("llama", max_position_embeddings=64), gamma=GAMMA)
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled, told = torch.compile(model, backend=counted, fullgraph=True), set()
    for strength in (1.0, 0.5, 0.25, 0.0):
        for module in model.modules():
            if isinstance(module, ClippedSoftmax):
                module.set_strength(strength)
        with torch.no_grad():
            expected = output(model(**inputs(model)))
            # Without clipping the model's own kernel is compared with the architecture's, whose softmax is in float32.
            exact = 1e-12 if strength else 1e-5
            torch.testing.assert_close(output(compiled(**inputs(model))), expected, rtol=0, atol=exact)
        told.add(counted.frame_count)
    assert len(told) == 1


def test_it_is_taken_back_and_changed_by_a_second_one():
    plain = tiny("bert")
    model = clipped_copy(clipped_copy(plain, gamma=-0.4), gamma=GAMMA)
    expected = output(clipped_copy(plain, gamma=GAMMA)(**inputs(plain)))
    assert torch.equal(output(model(**inputs(model))), expected)
    paths = [name for name, module in model.named_modules() if isinstance(module, ClippedSoftmax)]
    auxin.apply(Plan(method="x", promise="none", edits=[MergeModule(module=path) for path in paths]), model)
    assert torch.equal(output(model(**inputs(model))), output(plain(**inputs(plain))))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_what_can_t_be_clipped_is_refused():
    with pytest.raises(
        PlanError, match="a FalconAttention does not hand its queries and keys to an attention function"
    ):
        ClippedSoftmax.replacing(tiny("falcon").transformer.h[0].self_attention, -0.1)
    for wrong in ({"gamma": 0.1}, {"gamma": -0.1, "zeta": 0.9}, {"gamma": -0.1, "begin": 2}, {"gamma": float("nan")}):
        with pytest.raises(PlanError, match=r"Give a gamma of 0 or less, a zeta of 1 or more"):
            ClippedSoftmax.replacing(attention(1, 1, "sdpa", torch.float32, 0), **wrong)
    model = clipped_copy(tiny("llama"), gamma=GAMMA)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PlanError, match=r"attention is 'flex_attention'.*Call model.set_attn_implementation\('sdpa'\)"):
        model.model.layers[0].self_attn(torch.zeros(1, 4, 16, dtype=torch.float64), None, None)
    edits: Any = [ReplaceModule(module="model.layers.0.self_attn", brick="hard_attention", settings={"keep": 2})]
    hard, new = Plan(method="x", promise="none", edits=edits), clipped_copy(tiny("llama"), gamma=GAMMA)
    with pytest.raises(PlanError, match="another brick already"):
        auxin.apply(hard, new)
