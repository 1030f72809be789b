"""Feed-forward parts split into experts: the same function with all on, the formula with some, and the way back."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from auxin.accounting.flops import flops_per_token
from auxin.edits import ReplaceModule
from auxin.edits.structure import with_structural_edits
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import find_brick
from auxin.nn.experts import Router, Split, SplitFeedForward, SplitFeedForwardConv1D
from auxin.nn.low_rank import LowRankLinear
from auxin.nn.splitting import Division
from tiny_models import InDouble, change, inputs, labels, tiny

GATED_T5 = {"feed_forward_proj": "gated-gelu"}
# The feed-forward part of each architecture, of 12 hidden units.
PARTS = {
    "llama": ("llama", {}, "model.layers.{}.mlp"),
    "qwen3": ("qwen3", {}, "model.layers.{}.mlp"),
    "gpt2": ("gpt2", {}, "transformer.h.{}.mlp"),
    "gpt_neox": ("gpt_neox", {}, "gpt_neox.layers.{}.mlp"),
    "vit": ("vit", {}, "vit.layers.{}.mlp"),
    "t5": ("t5", {}, "encoder.block.{}.layer.1.DenseReluDense"),
    "gated t5": ("t5", GATED_T5, "decoder.block.{}.layer.2.DenseReluDense"),
}
ROUTED = {"experts_per_token": 1, "shared_experts": 1}
SOME_OF_SIX = {"num_experts": 6, "experts_per_token": 2, "shared_experts": 1}


def model_of(part: str) -> tuple[nn.Module, str]:
    family, config, path = PARTS[part]
    return tiny(family, **config), path


def dense_part(part: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model, path = model_of(part)
    return model.get_submodule(path.format(0)).to(dtype)


def brick_of(module: nn.Module) -> type[Split]:
    return SplitFeedForwardConv1D if hasattr(module, "c_fc") else SplitFeedForward


def split(module: nn.Module, **settings) -> Split:
    return brick_of(module).replacing(module, **settings)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def only(module: nn.Module, units: list[int]) -> nn.Module:
    """The dense part with all hidden units but `units` silenced: nothing goes out of them."""
    new = copy.deepcopy(module)
    names = ("down_proj", "c_proj", "dense_4h_to_h", "wo", "fc2")
    weight = next(getattr(new, name) for name in names if hasattr(new, name)).weight
    kept = torch.zeros(12, 1)
    kept[units] = 1
    with torch.no_grad():
        weight.mul_(kept if hasattr(new, "c_proj") else kept.T)
    return new


def dense_width(module: nn.Module) -> int:
    """The hidden size."""
    return 32 if hasattr(module, "dense_h_to_4h") else 16


@pytest.mark.parametrize("part", PARTS)
@given(data=st.data())
def test_with_all_experts_on_it_is_the_same_function(part, data):
    dense = dense_part(part, data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
    before = copy.deepcopy(dense.state_dict())
    count = data.draw(st.sampled_from([2, 3, 4, 6, 12]))
    units = data.draw(st.none() | st.permutations(range(12)))
    new = split(dense, num_experts=count, units=units)
    dtype = next(new.parameters()).dtype
    x = numbers(2, 3, dense_width(dense), dtype=dtype)
    allowed = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    assert change(dense(x).double(), new(x).double()) < allowed
    if units is None:
        assert change(dense(x).double(), new(x).double()) < allowed / 4
    # Nothing is lost, added, or shared with the dense part.
    assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in dense.parameters())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("part", PARTS)
def test_an_expert_is_the_dense_part_with_its_units_alone(part):
    dense = dense_part(part)
    units = numbers(12, seed=5).argsort().tolist()
    new = split(dense, num_experts=3, units=units)
    x = numbers(4, dense_width(dense), seed=2)
    bias = only(dense, [])(x)
    for expert in range(3):
        alone = copy.deepcopy(new)
        with torch.no_grad():
            for other in {0, 1, 2} - {expert}:
                getattr(alone, new.projections.down)[other] = 0
        wanted = only(dense, units[4 * expert : 4 * expert + 4])(x)
        torch.testing.assert_close(alone(x), wanted, rtol=1e-12, atol=1e-12)
        assert change(bias, wanted) > 1e-3 or not bias.any()


@pytest.mark.parametrize("part", PARTS)
@given(data=st.data())
def test_tensors_and_moments_go_there_and_back_unchanged(part, data):
    dense = dense_part(part)
    making, old = brick_of(dense).making, dense.state_dict()
    settings = {
        "num_experts": data.draw(st.sampled_from([2, 4, 6])),
        "units": data.draw(st.none() | st.permutations(range(12))),
        "experts_per_token": data.draw(st.sampled_from([None, 1])),
    }
    new = making.values(old, torch.Generator().manual_seed(0), **settings)
    assert shapes(new) == dict(making.shapes(shapes(old), **settings))
    assert ("router.weight" in new) == (settings["experts_per_token"] is not None)
    back = making.back(new, **settings)
    assert set(back) == set(old)
    places = {tensor.untyped_storage().data_ptr() for tensor in (*old.values(), *new.values(), *back.values())}
    assert len(places) == len(old) + len(new) + len(back)  # nobody's training reaches the others
    for name, tensor in back.items():
        assert torch.equal(tensor, old[name])
        assert tensor.is_contiguous()
    seen = {name: numbers(*tensor.shape, seed=place) for place, (name, tensor) in enumerate(old.items())}
    seen.pop(data.draw(st.sampled_from(sorted(seen))))  # one that the optimizer has not
    for order in (1, 2):
        moments = making.moments(old, seen, order, **settings)
        assert all(moment.shape == new[name].shape for name, moment in moments.items())
        again = making.moments_back(new, moments, order, **settings)
        assert set(again) == set(seen)
        assert all(torch.equal(moment, seen[name]) for name, moment in again.items())


@pytest.mark.parametrize("part", PARTS)
def test_moments_lie_where_the_gradients_do(part):
    dense = dense_part(part)
    new = split(dense, num_experts=3, units=numbers(12, seed=5).argsort().tolist())
    x, target = numbers(5, dense_width(dense), seed=2), numbers(5, dense_width(dense), seed=3)
    for module in (dense, new):
        (module(x) * target).sum().backward()
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    units = numbers(12, seed=5).argsort().tolist()
    made = new.making.moments(dense.state_dict(), gradients, 1, num_experts=3, units=units)
    assert set(made) == {name for name, _ in new.named_parameters()}
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, rtol=1e-11, atol=1e-11)


def by_hand(dense: nn.Module, new: Split, x: Tensor, gates: str, scale: float) -> Tensor:
    """The formula, token by token, with the dense part's units."""
    experts, always, k = new.num_experts, new.shared_experts, new.experts_per_token
    each = 12 // experts
    rows = []
    bias = only(dense, [])(x[:1] * 0 + 1)[0]
    for token in x:
        scores = new.router.weight @ token
        chosen = sorted(range(experts - always), key=lambda e: -scores[e].item())[:k]
        total = only(dense, list(range(always * each)))(token)
        for expert in chosen:
            others = scores if gates == "softmax" else scores[chosen]
            gate = 1 if gates == "none" else scale * scores[expert].exp() / others.exp().sum()
            first = (always + expert) * each
            total = total + gate * (only(dense, list(range(first, first + each)))(token) - bias)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("part", ["llama", "gpt2", "gated t5", "vit"])
@pytest.mark.parametrize(
    ("gates", "gate_scale", "scale"),
    [
        ("softmax", None, 5.0),
        ("selected", None, 2.0),
        ("none", None, 1.0),
        ("softmax", 3.0, 3.0),
        ("selected", 4.0, 4.0),
    ],
)
def test_routed_it_is_the_formula(part, gates, gate_scale, scale):
    dense = dense_part(part)
    new = split(dense, **SOME_OF_SIX, gates=gates, gate_scale=gate_scale)
    nn.init.normal_(new.router.weight, generator=torch.Generator().manual_seed(1))
    x = numbers(2, 4, 16, seed=3)
    with torch.no_grad():
        wanted = by_hand(dense, new, x.flatten(0, 1), gates, scale).view(2, 4, 16)
        torch.testing.assert_close(new(x), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gates", ["softmax", "selected", "none"])
@pytest.mark.parametrize("shared", [0, 2])
def test_a_router_without_preferences_gives_each_expert_a_gate_of_one(gates, shared):
    """So that all experts but one are the dense part without that one, and all are the dense part."""
    dense = dense_part("llama")
    count = 6 - shared
    new = split(dense, num_experts=6, experts_per_token=count - 1, shared_experts=shared, gates=gates)
    nn.init.zeros_(new.router.weight)
    x = numbers(7, 16)
    _, weights, chosen = new.router(x)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-12, atol=1e-12)
    left_out = [({*range(count)} - set(token)).pop() + shared for token in chosen.tolist()]
    for row, expert in enumerate(left_out):
        units = [unit for unit in range(12) if unit // 2 != expert]
        torch.testing.assert_close(new(x[row]), only(dense, units)(x[row]), rtol=1e-11, atol=1e-11)


def test_a_fresh_router_is_random_from_its_own_numbers_and_has_gates_near_one():
    old = {
        "gate_proj.weight": torch.zeros(64, 512),
        "up_proj.weight": torch.zeros(64, 512),
        "down_proj.weight": torch.zeros(512, 64),
    }
    settings = {"num_experts": 16, "experts_per_token": 4}
    first, second, other = (
        SplitFeedForward.making.values(old, torch.Generator().manual_seed(seed), **settings)["router.weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    router = Router(512, 16, 4, "softmax", 16.0, first)
    router.weight.data.copy_(first)
    x = numbers(4000, 512, dtype=torch.float32)
    shares, gates, chosen = router(x)
    assert (x @ first.T).std().item() == pytest.approx(0.1, rel=0.1)
    assert 0.9 < gates.mean() < 1.3
    assert (torch.bincount(chosen.flatten()) > 500).all()  # of 1000
    assert shares.dtype == torch.float32
    half = router.to(torch.bfloat16)
    assert half(x.to(torch.bfloat16))[1].dtype == torch.float32


def test_gradients_reach_the_chosen_experts_and_the_router():
    dense = dense_part("llama")
    new = split(dense, num_experts=6, experts_per_token=1, shared_experts=2)
    nn.init.normal_(new.router.weight, generator=torch.Generator().manual_seed(1))
    x = numbers(3, 16, seed=3).requires_grad_()
    chosen = set((new.router(x)[2] + 2).flatten().tolist())
    new(x).square().sum().backward()
    reached = {expert for expert in range(6) if new.up_proj.grad[expert].any()}
    assert reached == {0, 1} | chosen
    assert new.router.weight.grad.any()
    assert torch.autograd.gradcheck(lambda y: new(y), x.detach().requires_grad_())
    free = split(dense, num_experts=6, experts_per_token=1, gates="none")
    free(x).square().sum().backward()
    assert free.router.weight.grad is None or not free.router.weight.grad.any()


@pytest.mark.parametrize("part", ["llama", "gpt2", "gated t5", "vit"])
def test_whole_models_compute_the_same_and_cost_what_is_on(part):
    model, path = model_of(part)
    batch = inputs(model)
    with torch.no_grad(), InDouble():
        logits = model(**batch).logits
    before = flops_per_token(model, 8).forward
    places = [path.format(layer) for layer in range(2)]
    one = model.get_submodule(places[0])
    projections = 3 if part in ("llama", "gated t5") else 2
    per_unit = 2 * 16 * projections  # FLOPs of one hidden unit and token
    tokens = 5 if part == "vit" else 1  # per image, of which the FLOPs are told
    for path in places:
        model.set_submodule(path, split(model.get_submodule(path), num_experts=6))
    with torch.no_grad(), InDouble():
        assert change(logits, model(**batch).logits) < 1e-12
    assert flops_per_token(model, 8).forward == before
    for path in places:
        model.set_submodule(path, split(model.get_submodule(path), **SOME_OF_SIX))
    off = 12 - 3 * 2
    router = 2 * 16 * 5
    assert flops_per_token(model, 8).forward == before + 2 * tokens * (router - off * per_unit)
    loss = model(**batch, labels=labels(model)).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert type(model.get_submodule(places[0])) is brick_of(one)


def test_dropout_stays_where_it_was():
    for part, place in (("gpt2", "output"), ("t5", "hidden")):
        dense = dense_part(part).train()
        dense.dropout.p = 0.5
        new = split(dense, num_experts=3)
        assert new.training
        x = numbers(6, 16)
        results = []
        for module in (dense, new):
            torch.manual_seed(0)
            results.append(module(x))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        assert new.projections.dropout == place
        new.eval()
        torch.testing.assert_close(new(x), dense.eval()(x), rtol=1e-12, atol=1e-12)


def test_t5_may_keep_its_last_projection_in_float32():
    dense = dense_part("t5", torch.bfloat16)
    dense.wo.float()
    new = split(dense, num_experts=3)
    x = numbers(4, 16, dtype=torch.bfloat16)
    assert new.wo.dtype == torch.float32
    assert new(x).dtype == dense(x).dtype == torch.float32
    torch.testing.assert_close(new(x), dense(x), rtol=1e-2, atol=1e-2)


def test_routing_changes_and_the_experts_stay():
    """As the stages of Dense2MoE: shared experts alone, then two beside them, then three, then all."""
    dense = dense_part("llama")
    alone = split(dense, num_experts=12, experts_per_token=0, shared_experts=4)
    x = numbers(5, 16)
    torch.testing.assert_close(alone(x), only(dense, [0, 1, 2, 3])(x), rtol=1e-12, atol=1e-12)
    assert not hasattr(alone, "router")
    two = SplitFeedForward.replacing(alone, num_experts=12, experts_per_token=2, shared_experts=4)
    assert two.up_proj is alone.up_proj
    assert two.router.weight.shape == (8, 16)
    assert two.router.weight.any()
    three = SplitFeedForward.replacing(two, num_experts=12, experts_per_token=3, shared_experts=4)
    assert three.router.weight is two.router.weight
    everything = SplitFeedForward.replacing(three, num_experts=12)
    torch.testing.assert_close(everything(x), dense(x), rtol=1e-12, atol=1e-12)
    making, state = two.making, two.state_dict()
    same = {"num_experts": 12, "experts_per_token": 3, "shared_experts": 4}
    assert making.shapes(shapes(state), **same) == {}
    assert making.values(state, torch.Generator(), **same) == {}
    assert making.moments(state, state, 1, **same) == {}
    fewer = {"num_experts": 12, "experts_per_token": 3, "shared_experts": 6}
    assert making.shapes(shapes(state), **fewer) == {"router.weight": (6, 16)}
    with pytest.raises(PlanError, match="has 12 experts already and can't get 6; merge it back first"):
        making.shapes(shapes(state), num_experts=6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 1}, "num_experts 1 divides nothing"),
        ({"num_experts": 5}, "num_experts 5 does not divide the 12 hidden units"),
        ({"num_experts": 4, "shared_experts": 4}, "shared_experts 4 is none of 0 to 3"),
        ({"num_experts": 4, "shared_experts": 1}, "no effect without a router"),
        ({"num_experts": 4, "gates": "none"}, "no effect without a router"),
        ({"num_experts": 4, "experts_per_token": 4}, "experts_per_token 4 is none of 1 to 3"),
        ({"num_experts": 4, "experts_per_token": 0}, "experts_per_token 0 is none of 1 to 3"),
        ({"num_experts": 4, "experts_per_token": 3, "shared_experts": 1}, "experts_per_token 3 is none of 0 to 2"),
        (
            {"num_experts": 4, "experts_per_token": 2, "gates": "hard"},
            "gates 'hard' is none of softmax",
        ),
        ({"num_experts": 4, "gate_scale": 2.0}, "gate_scale has no effect"),
        ({"num_experts": 4, "experts_per_token": 2, "gates": "none", "gate_scale": 2.0}, "gate_scale has no effect"),
        ({"num_experts": 4, "experts_per_token": 2, "gate_scale": 0.0}, "gate_scale 0.0 must be more than 0"),
        ({"num_experts": 4, "units": [0, 1, 1, 3]}, "units must name each of the hidden units once, 0 to 3"),
        ({"num_experts": 4, "units": list(range(8))}, "units names 8 hidden units of 12"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        split(dense_part("llama"), **settings)


class LlamaWith(nn.Module):
    """A Llama's part with something of its own."""

    def __init__(self, dense, **more):
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            setattr(self, name, more.get(name, getattr(dense, name)))
        for name in more.keys() - {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            setattr(self, name, more[name])

    def forward(self, x):
        raise AssertionError


class Residual(LlamaWith):
    def forward(self, x, residual):
        raise AssertionError


def test_modules_that_are_not_known_are_refused():
    bert = tiny("bert").bert.encoder.layer[0]
    for module in (bert.intermediate, bert.output, bert, nn.Linear(3, 3), tiny("llama").model.layers[0].self_attn):
        with pytest.raises(PlanError, match=r"no feed-forward part that is known .* several modules \(BERT\)"):
            split(module, num_experts=2)
    llama = dense_part("llama")
    with pytest.raises(PlanError, match=r"c_fc of the GPT2MLP is a Conv1D and no plain Linear .*_conv1d"):
        SplitFeedForward.replacing(dense_part("gpt2"), num_experts=2)
    with pytest.raises(PlanError, match="no feed-forward part that is known has the tensors"):
        split(LlamaWith(llama, up_proj=LowRankLinear.replacing(llama.up_proj, rank=2)), num_experts=2)

    class Other(nn.Linear):
        pass

    odd = Other(16, 12).double()
    with pytest.raises(PlanError, match="up_proj of the LlamaWith is a Other and no plain Linear; take off"):
        split(LlamaWith(llama, up_proj=odd), num_experts=2)
    with pytest.raises(PlanError, match=r"LlamaWith is more than .* has \['norm'\] beside them"):
        split(LlamaWith(llama, norm=nn.Identity()), num_experts=2)
    with pytest.raises(PlanError, match=r"Residual is more than .* takes \('x', 'residual'\)"):
        split(Residual(llama), num_experts=2)
    gpt2 = dense_part("gpt2")
    del gpt2.dropout
    with pytest.raises(PlanError, match=r"it lacks \['dropout'\]"):
        split(gpt2, num_experts=2)
    with pytest.raises(PlanError, match="different hidden units or hidden sizes"):
        SplitFeedForward.making.shapes({"fc1.weight": (12, 16), "fc2.weight": (16, 10)}, num_experts=2)


def test_an_activation_with_parameters_keeps_them():
    dense = dense_part("llama")
    dense.act_fn = nn.PReLU(num_parameters=1, init=0.3).double()
    new = split(dense, num_experts=3)
    assert new.act_fn.weight is dense.act_fn.weight
    x = numbers(3, 16)
    torch.testing.assert_close(new(x), dense(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["llama", "gpt2"])
def test_on_the_meta_device_it_has_shapes(part):
    new = split(dense_part(part).to("meta"), num_experts=4, experts_per_token=2)
    assert {parameter.device.type for parameter in new.parameters()} == {"meta"}
    assert getattr(new, new.projections.down).shape == (4, 3, 16)
    assert find_brick("split_feed_forward") is SplitFeedForward
    assert find_brick("split_feed_forward_conv1d") is SplitFeedForwardConv1D
    assert "16 -> 4 x 3 -> 16, 2 per token" in repr(new)


@pytest.mark.parametrize("settings", [{"num_experts": 3}, SOME_OF_SIX])
def test_it_compiles_in_one_graph(settings):
    new = split(dense_part("llama"), **settings)
    x = numbers(2, 3, 16)
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), new(x), rtol=1e-12, atol=1e-12)


def test_a_checkpoint_is_saved_and_loaded(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    settings = {"num_experts": 4, "experts_per_token": 2, "shared_experts": 1, "units": list(range(12))[::-1]}
    for layer in model.model.layers:
        layer.mlp = split(layer.mlp, **settings)
    with_structural_edits(
        model.config, [ReplaceModule(module="model.layers.*.mlp", brick="split_feed_forward", settings=settings)]
    )
    model.save_pretrained(tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded.model.layers[1].mlp) is SplitFeedForward
    assert torch.equal(loaded(**inputs(model)).logits, model(**inputs(model)).logits)


@pytest.mark.parametrize("part", ["llama", "gpt2", "gated t5", "vit"])
def test_parameters_read_and_write_what_the_dense_ones_did(part):
    model, path = model_of(part)
    path = path.format(1)
    told, old = anatomy(model), model.get_submodule(path)
    new = split(old, num_experts=4, **ROUTED)
    replaced = {name: told.role(f"{path}.{name}") for name, _ in old.named_parameters()}
    roles = new.roles(replaced)
    assert set(roles) == {name for name, _ in new.named_parameters()}
    for name, role in roles.items():
        assert role.matches(f"{path}.{name}")
        shape = new.get_parameter(name).shape
        for segments, access, size in zip(role.axes, role.access, shape, strict=True):
            assert sum(segment.size for segment in segments) == (size if access else 0)
            assert {segment.stream for segment in segments} <= {"residual"}
    down = new.projections.down
    assert roles[down].access == (None, None, "writes")
    assert {roles[name].access for name in new.projections.all[:-1]} == {(None, None, "reads")}
    assert roles["router.weight"].access == (None, "reads")
    assert new.roles({}) == {}


@pytest.mark.parametrize("part", PARTS)
def test_the_result_is_scaled_by_the_factors_it_names(part):
    new = split(dense_part(part), num_experts=4, **ROUTED)
    x = numbers(4, dense_width(new))
    before = new(x)
    with torch.no_grad():
        for name, factor in new.scaled(0.25, {"down": 0.25}).items():
            new.get_parameter(name).mul_(factor)
    torch.testing.assert_close(new(x), 0.25 * before, rtol=1e-12, atol=1e-12)


def test_the_settings_tell_how_many_experts_there_are_to_choose_from():
    division = Division(num_experts=16, experts_per_token=2, shared_experts=4)  # 1S12E2A of Dense2MoE
    assert (division.routed, division.scale) == (12, 12.0)
    assert Division(num_experts=16, experts_per_token=4, gates="selected").scale == 4.0
    assert (division.shared_experts + division.experts_per_token) / division.num_experts == 0.375
