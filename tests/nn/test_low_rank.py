"""Linear layers of low rank: the best of their rank, moments by the chain rule, and the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from auxin.accounting.flops import flops_per_token
from auxin.edits import ReplaceModule
from auxin.edits.structure import with_structural_edits
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.nn.bricks import find_brick
from auxin.nn.low_rank import LowRank, LowRankConv1D, LowRankLinear
from auxin.nn.low_rank_embedding import LowRankEmbedding
from auxin.nn.unmultiplied import Unmultiplied
from tiny_models import InDouble, change, inputs, labels, tiny

KINDS = {"linear": LowRankLinear, "conv1d": LowRankConv1D}
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(kind: str, outputs: int = 7, inputs: int = 12, bias: bool = True, seed: int = 0) -> nn.Module:
    module = nn.Linear(inputs, outputs, bias) if kind == "linear" else Conv1D(outputs, inputs)
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed + place))
    return module.double()


def matrix(kind: str, weight: Tensor) -> Tensor:
    """(out, in) of a layer's weight."""
    return weight.detach() if kind == "linear" else weight.detach().T


@given(sizes=SIZES, kind=st.sampled_from(list(KINDS)), data=st.data())
def test_the_product_is_the_best_matrix_of_its_rank(sizes, kind, data):
    old = dense(kind, *sizes)
    rank = data.draw(st.integers(1, min(sizes)))
    made = KINDS[kind].making.values(old.state_dict(), torch.default_generator, rank=rank)
    whole = matrix(kind, old.weight).numpy()
    left, singular, right = np.linalg.svd(whole, full_matrices=False)
    best = (left[:, :rank] * singular[:rank]) @ right[:rank]
    np.testing.assert_allclose((made["output_factor"] @ made["input_factor"]).numpy(), best, atol=1e-12)
    error = np.linalg.norm(whole - (made["output_factor"] @ made["input_factor"]).numpy())
    np.testing.assert_allclose(error, np.sqrt((singular[rank:] ** 2).sum()), atol=1e-12)
    # Both factors have the singular values' roots for norms, and directions at right angles.
    for factor in (made["output_factor"].T, made["input_factor"]):
        np.testing.assert_allclose((factor @ factor.T).numpy(), np.diag(singular[:rank]), atol=1e-12)
    assert {name: tuple(value.shape) for name, value in made.items()} == KINDS[kind].making.shapes(
        {name: tuple(value.shape) for name, value in old.state_dict().items()}, rank=rank
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_layer_computes_with_the_product(kind, rank, dtype):
    old = dense(kind).to(dtype).eval()
    new = KINDS[kind].replacing(old, rank=rank)
    x = numbers(2, 3, 12, seed=5).to(dtype)
    left, singular, right = torch.linalg.svd(matrix(kind, old.weight).double(), full_matrices=False)
    best = (left[:, :rank] * singular[:rank]) @ right[:rank]
    wanted = x.double() @ best.T + old.bias.double()
    allowed = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    assert change(wanted, new(x).double()) < allowed
    if rank == 7:
        assert change(old(x).double(), new(x).double()) < allowed
    else:
        assert change(old(x).double(), new(x).double()) > 0.1
    assert new.bias is old.bias
    assert {parameter.dtype for parameter in new.parameters()} == {dtype}
    assert [name for name, _ in new.named_parameters()] == ["input_factor", "output_factor", "bias"]
    assert sum(parameter.numel() for parameter in new.parameters()) == rank * (12 + 7) + 7
    assert not new.training


def test_signs_do_not_depend_on_the_machine():
    old = dense("linear").state_dict()
    made = LowRankLinear.making.values(old, torch.default_generator, rank=5)
    largest = made["output_factor"].gather(0, made["output_factor"].abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    # A weight whose rows are turned around has its singular vectors turned around, signs included.
    flipped = LowRankLinear.making.values({"weight": old["weight"].flip(1)}, torch.default_generator, rank=5)
    torch.testing.assert_close(flipped["output_factor"], made["output_factor"], rtol=0, atol=1e-12)
    torch.testing.assert_close(flipped["input_factor"], made["input_factor"].flip(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_moment_is_the_factors_gradient(kind):
    """At full rank the layer is the same function, so that its gradients must come by the same rule from autograd."""
    old = dense(kind, 7, 5)
    new = KINDS[kind].replacing(old, rank=5)
    x, target = numbers(4, 5, seed=3), numbers(4, 7, seed=4)
    for layer in (old, new):
        (layer(x) * target).sum().backward()
    moments = {"weight": old.weight.grad, "bias": old.bias.grad}
    made = new.making.moments(old.state_dict(), moments, 1, rank=5)
    assert set(made) == {"output_factor", "input_factor"}
    torch.testing.assert_close(made["output_factor"], new.output_factor.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(made["input_factor"], new.input_factor.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 5])
def test_the_second_moment_takes_the_squares(kind, rank):
    """Gradients that are independent from entry to entry, with the variances of the moment: the mean square of what the
    chain rule makes of them is the second moment of the factors."""
    old = dense(kind, 6, 5).state_dict()
    making = KINDS[kind].making
    second = numbers(*old["weight"].shape, seed=8).square()
    made = making.moments(old, {"weight": second}, 2, rank=rank)
    factors = making.values(old, torch.default_generator, rank=rank)
    variance = matrix(kind, second)
    for row, column in ((0, 0), (5, 1)):
        wanted = sum(variance[row, j] * factors["input_factor"][column, j] ** 2 for j in range(5))
        torch.testing.assert_close(made["output_factor"][row, column], wanted)
        wanted = sum(factors["output_factor"][i, column] ** 2 * variance[i, row % 5] for i in range(6))
        torch.testing.assert_close(made["input_factor"][column, row % 5], wanted)
    noise = numbers(40000, 6, 5, seed=9) * variance.sqrt()
    sampled = (noise @ factors["input_factor"].T).square().mean(0)
    torch.testing.assert_close(made["output_factor"], sampled, rtol=0.05, atol=1e-3)


def test_moments_that_the_optimizer_has_not_are_not_made():
    old = dense("linear").state_dict()
    making = LowRankLinear.making
    assert making.moments(old, {"bias": old["bias"]}, 1, rank=3) is None
    new = making.values(old, torch.default_generator, rank=3)
    assert making.moments_back(new, {"output_factor": new["output_factor"]}, 1, rank=3) is None
    single = making.moments(old, {"weight": old["weight"].float()}, 2, rank=3)
    assert {moment.dtype for moment in single.values()} == {torch.float32}


@given(sizes=SIZES, kind=st.sampled_from(list(KINDS)), data=st.data())
def test_the_way_back_is_the_product(sizes, kind, data):
    old = dense(kind, *sizes)
    rank = data.draw(st.integers(1, min(sizes)))
    new = KINDS[kind].replacing(old, rank=rank)
    with torch.no_grad():
        for parameter in (new.input_factor, new.output_factor):  # as after training
            parameter += 0.1 * numbers(*parameter.shape, seed=11)
    back = new.making.back(new.state_dict(), rank=rank)
    assert list(back) == ["weight"]
    assert back["weight"].shape == old.weight.shape
    assert back["weight"].is_contiguous()
    merged = dense(kind, *sizes)
    merged.load_state_dict({**back, "bias": new.bias})
    x = numbers(3, sizes[1], seed=2)
    torch.testing.assert_close(merged(x), new(x), rtol=1e-11, atol=1e-11)


@given(sizes=SIZES, kind=st.sampled_from(list(KINDS)))
def test_at_full_rank_there_and_back_is_nothing(sizes, kind):
    old, rank = dense(kind, *sizes).state_dict(), min(sizes)
    making = KINDS[kind].making
    new = making.values(old, torch.default_generator, rank=rank)
    torch.testing.assert_close(making.back(new, rank=rank)["weight"], old["weight"], rtol=1e-12, atol=1e-12)
    shape = old["weight"].shape
    first = {"weight": numbers(*shape, seed=3)}
    back = making.moments_back(new, making.moments(old, first, 1, rank=rank), 1, rank=rank)["weight"]
    torch.testing.assert_close(back, first["weight"], rtol=1e-5, atol=1e-5)
    # A second moment is known from sums over rows and columns: exactly where it is a product of such.
    second = {"weight": torch.outer(numbers(shape[0], seed=4).square(), numbers(shape[1], seed=5).square())}
    back = making.moments_back(new, making.moments(old, second, 2, rank=rank), 2, rank=rank)["weight"]
    torch.testing.assert_close(back, second["weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_moment_of_the_way_back_is_the_smallest_with_these_gradients(kind):
    old = dense(kind, 8, 6).state_dict()
    making = KINDS[kind].making
    new = making.values(old, torch.default_generator, rank=3)
    gradient = numbers(*old["weight"].shape, seed=3)
    moments = making.moments(old, {"weight": gradient}, 1, rank=3)
    back = making.moments_back(new, moments, 1, rank=3)["weight"]
    again = making.moments(old, {"weight": back}, 1, rank=3)
    for name, moment in moments.items():
        torch.testing.assert_close(again[name], moment, rtol=1e-9, atol=1e-9)
    # What is left over lies in neither factor's directions, hence at a right angle to it.
    rest = matrix(kind, gradient - back)
    assert (new["output_factor"].T @ rest).abs().max() < 1e-9
    assert (rest @ new["input_factor"].T).abs().max() < 1e-9
    assert abs((rest * matrix(kind, back)).sum()) < 1e-9
    assert rest.abs().max() > 0.1


def test_second_moments_of_the_way_back_are_positive_and_of_the_right_size():
    old = dense("linear", 8, 6).state_dict()
    making = LowRankLinear.making
    new = making.values(old, torch.default_generator, rank=3)
    second = numbers(8, 6, seed=4).square()
    back = making.moments_back(new, making.moments(old, {"weight": second}, 2, rank=3), 2, rank=3)["weight"]
    assert (back > 0).all()
    assert 0.5 < back.mean() / second.mean() < 2
    unseen = {name: torch.zeros_like(value) for name, value in new.items()}
    assert not making.moments_back(new, unseen, 2, rank=3)["weight"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_another_rank_is_taken_from_the_product(kind):
    old = dense(kind)
    five = KINDS[kind].replacing(old, rank=5)
    three, straight = KINDS[kind].replacing(five, rank=3), KINDS[kind].replacing(old, rank=3)
    for name, parameter in three.named_parameters():
        torch.testing.assert_close(parameter, straight.get_parameter(name), rtol=1e-10, atol=1e-10)
    assert three.bias is old.bias
    same = KINDS[kind].replacing(five, rank=5)
    assert same.input_factor is five.input_factor
    making, state = three.making, five.state_dict()
    assert making.shapes({name: tuple(value.shape) for name, value in state.items()}, rank=5) == {}
    moments = making.moments(old.state_dict(), {"weight": numbers(*old.weight.shape, seed=3)}, 1, rank=5)
    made = making.moments(state, moments, 1, rank=3)
    assert made["output_factor"].shape == (7, 3)
    wanted = making.moments(old.state_dict(), making.moments_back(state, moments, 1), 1, rank=3)
    torch.testing.assert_close(made["input_factor"], wanted["input_factor"], rtol=1e-8, atol=1e-8)
    assert making.moments(state, moments, 1, rank=5) == {}


def test_what_has_no_such_factors_is_refused():
    shapes = {"weight": (7, 12), "bias": (7,)}
    for rank in (0, -1, 8):
        with pytest.raises(PlanError, match=rf"rank {rank} is none of a matrix of 7 x 12; give 1 to 7. Below 5 it has"):
            LowRankLinear.making.shapes(shapes, rank=rank)
    with pytest.raises(PlanError, match="7 x 12"):
        LowRankConv1D.making.shapes({"weight": (12, 7)}, rank=9)
    with pytest.raises(PlanError, match=r"whose weight is a matrix; this module has the tensors \{'weight': \[3\]\}"):
        LowRankLinear.making.shapes({"weight": (3,)}, rank=1)
    with pytest.raises(PlanError, match=r"a weight \(torch.int8\) that holds other than finite"):
        LowRankLinear.making.values({"weight": torch.ones(3, 3, dtype=torch.int8)}, torch.default_generator, rank=1)
    with pytest.raises(PlanError, match="finite"):
        LowRankLinear.making.values({"weight": torch.full((3, 3), torch.nan)}, torch.default_generator, rank=1)
    for module in (Conv1D(3, 3), nn.Conv1d(3, 3, 1), find_brick("grafted_linear")(3, 3, [2])):
        with pytest.raises(PlanError, match=f"LowRankLinear replaces a Linear, received a {type(module).__name__}"):
            LowRankLinear.replacing(module, rank=1)


def test_on_the_meta_device_it_has_shapes():
    new = LowRankConv1D.replacing(dense("conv1d").to("meta"), rank=3)
    assert {parameter.device.type for parameter in new.parameters()} == {"meta"}
    assert (new.nf, new.nx) == (7, 12)
    assert repr(new) == "LowRankConv1D(in_features=12, out_features=7, rank=3, bias=True)"
    without = LowRankLinear.replacing(dense("linear", bias=False), rank=3)
    assert without.bias is None
    assert without(numbers(2, 12)).shape == (2, 7)
    assert find_brick("low_rank_linear") is LowRankLinear
    assert find_brick("low_rank_conv1d") is LowRankConv1D


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_reads_the_weight_finds_the_product(kind):
    new = KINDS[kind].replacing(dense(kind), rank=3)
    weight, product = new.weight, new.output_factor @ new.input_factor
    wanted = product if kind == "linear" else product.T
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert (weight.dim(), weight.size(0), weight.is_floating_point()) == (2, wanted.shape[0], True)
    assert torch.equal(weight + 0, wanted)
    assert torch.equal(weight[0], wanted[0])
    x = numbers(4, wanted.shape[1], seed=7)
    gradients = []
    for used in (new.weight, wanted):
        new.zero_grad()
        torch.nn.functional.linear(x, used).square().sum().backward()
        gradients.append([new.input_factor.grad, new.output_factor.grad])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_models_run_train_and_cost_what_they_must(family):
    model = tiny(family)
    linear = {path: module for path, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    inner = {path: module for path, module in linear.items() if path != "lm_head"}
    before, whole, batch = flops_per_token(model, 8).forward, {}, inputs(model)
    with torch.no_grad(), InDouble():
        logits = model(**batch).logits
    saved = 0
    for path, module in inner.items():
        cls = LowRankLinear if type(module) is nn.Linear else LowRankConv1D
        outputs, given = matrix("linear" if cls is LowRankLinear else "conv1d", module.weight).shape
        whole[path] = cls.replacing(module, rank=min(outputs, given))
        model.set_submodule(path, whole[path])
    with torch.no_grad(), InDouble():
        assert change(logits, model(**batch).logits) < 1e-10
    for path, module in inner.items():
        low = type(whole[path]).replacing(module, rank=2)
        model.set_submodule(path, low)
        saved += 2 * (low.in_features * low.out_features - 2 * (low.in_features + low.out_features))
    # To ask for the type of a weight, as T5 does on every call, costs no product.
    assert flops_per_token(model, 8).forward == before - saved
    loss = model(**batch, labels=labels(model)).loss
    loss.backward()
    for low in modules(model):
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in low.parameters())
    half = model.to(torch.bfloat16)
    assert torch.isfinite(half(**batch).logits).all()


def modules(model: nn.Module) -> list[LowRank]:
    return [module for module in model.modules() if isinstance(module, LowRank)]


def test_t5_compiles_in_one_graph():
    model = tiny("t5")
    part = model.encoder.block[0].layer[1].DenseReluDense
    part.wo = LowRankLinear.replacing(part.wo, rank=3)
    x = numbers(2, 3, 16)
    compiled = torch.compile(part, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), part(x))
    assert type(part.wo.weight) is Unmultiplied


def test_a_checkpoint_is_saved_and_loaded(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj = LowRankLinear.replacing(layer.mlp.down_proj, rank=3)
        layer.self_attn.q_proj = LowRankLinear.replacing(layer.self_attn.q_proj, rank=4)
    edits = [
        ReplaceModule(module=f"model.layers.*.{path}", brick="low_rank_linear", settings={"rank": rank})
        for path, rank in (("mlp.down_proj", 3), ("self_attn.q_proj", 4))
    ]
    with_structural_edits(model.config, edits)
    model.save_pretrained(tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded.model.layers[1].mlp.down_proj) is LowRankLinear
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded(**inputs(model)).logits, model(**inputs(model)).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.down_proj.input_factor.dtype == torch.bfloat16
    # To initialise such a model from nothing leaves the layer to whoever fills it.
    before = loaded.model.layers[0].mlp.down_proj.output_factor.clone()
    loaded.apply(loaded._init_weights)
    assert torch.equal(loaded.model.layers[0].mlp.down_proj.output_factor, before)


@pytest.mark.parametrize(
    ("family", "path"),
    [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.attn.c_attn"), ("llama", "lm_head")],
)
def test_factors_write_and_read_what_the_weight_did(family, path):
    model = tiny(family)
    told, old = anatomy(model), model.get_submodule(path)
    replaced = {name: told.role(f"{path}.{name}") for name, _ in old.named_parameters()}
    cls = LowRankLinear if type(old) is nn.Linear else LowRankConv1D
    new = cls.replacing(old, rank=3)
    roles = new.roles(replaced)
    assert set(roles) == {"output_factor", "input_factor"}
    whole = replaced["weight"]
    for name, access in (("output_factor", "writes"), ("input_factor", "reads")):
        role = roles[name]
        assert role.matches(f"{path}.{name}")
        sizes = [sum(segment.size for segment in segments) for segments in role.axes]
        assert [size or 3 for size in sizes] == list(new.get_parameter(name).shape)
        streams = {segment.stream for segments in role.axes for segment in segments}
        sides = zip(whole.axes, whole.access, strict=True)
        assert streams == {segment.stream for segments, how in sides if how == access for segment in segments}
        assert set(role.access) == {access, None}
    assert roles["output_factor"].kind == whole.kind
    assert roles["input_factor"].kind == "matrix"
    assert new.roles({}) == {}


@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_scaled_by_the_factors_it_names(bias):
    new = LowRankLinear.replacing(dense("linear", bias=bias), rank=3)
    x = numbers(4, 12)
    before = new(x)
    with torch.no_grad():
        for name, factor in new.scaled(0.25, {"weight": 0.25}).items():
            new.get_parameter(name).mul_(factor)
    torch.testing.assert_close(new(x), 0.25 * before)


@given(sizes=SIZES, scale=st.sampled_from([1.0, 3.5]), data=st.data())
def test_an_embedding_of_full_rank_gives_the_rows_and_its_gradient(sizes, scale, data):
    old = nn.Embedding(*sizes, padding_idx=0, dtype=torch.float64)
    old.embed_scale = scale  # as transformers' classes call what they multiply by
    new = LowRankEmbedding.replacing(old, data.draw(st.integers(1, min(sizes))))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, sizes[0] - 1), min_size=1, max_size=5)))
    product = (new.output_factor @ new.input_factor).detach()
    torch.testing.assert_close(new(ids), scale * product[ids])
    if new.rank == min(sizes):
        torch.testing.assert_close(product, old.weight)
    new(ids).sum().backward()
    assert not new.output_factor.grad[0].any()  # the row that pads
    torch.testing.assert_close(new.weight + 0, product)


class Shifted(nn.Embedding):
    """Does something of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.offset = 2


class Twice(nn.Embedding):
    """Says nothing of what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Normed(nn.Embedding):
    """Has a norm inside."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])


@pytest.mark.parametrize(
    "module",
    [
        Shifted(5, 3),
        Twice(5, 3),
        Normed(5, 3),
        nn.Embedding(5, 3, max_norm=1.0),
        nn.Embedding(5, 3, scale_grad_by_freq=True),
        nn.Embedding(5, 3, sparse=True),
        nn.Linear(5, 3),
    ],
    ids=lambda module: str(module).split("\n")[0],
)
def test_what_is_no_plain_embedding_has_no_product(module):
    assert not LowRankEmbedding.can_replace(module)
    with pytest.raises(PlanError, match="does something of its own"):
        LowRankEmbedding.replacing(module, 2)


def test_drawn_factors_take_the_place_of_others_and_have_the_product_s_size():
    layer = nn.Linear(64, 48).double()
    made = LowRankLinear.replacing(layer, 8)
    drawn = LowRankLinear.replacing(made, 8, start="random")
    assert drawn.rank == 8
    assert not torch.equal(drawn.output_factor, made.output_factor)
    torch.testing.assert_close((drawn.weight + 0).std(), (made.weight + 0).std(), rtol=0.2, atol=0)
    assert drawn.bias is layer.bias


def test_drawn_factors_of_a_weight_of_zeros_are_nothing_at_first_and_learn():
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight)
    drawn = LowRankLinear.replacing(layer, 2, start="random")
    assert not (drawn.weight + 0).any()
    drawn(torch.ones(1, 6)).sum().backward()
    assert drawn.output_factor.grad.any()
