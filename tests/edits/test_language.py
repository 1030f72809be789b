"""Every kind of edit: structure, values, moments, the way back, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import auxin
from auxin.analysis.quantized import QuantizedMeasurement
from auxin.edits import (
    ArrangeLayers,
    CentreParameter,
    ChangeArchitecture,
    ConfigureModule,
    ConstantFill,
    MakeParameters,
    MeanFill,
    MergeModule,
    MultiplyParameter,
    NormalFill,
    PadParameter,
    Plan,
    ProjectParameter,
    RemoveModule,
    ReplaceModule,
    ScaleParameter,
    SetConfig,
    SetParameter,
    ShiftParameter,
    SliceParameter,
    TieParameters,
    WrapModule,
    ZeroFill,
    apply,
    inverse_plan,
)
from auxin.edits.kinds.parameter_edits import generator
from auxin.edits.structure import structural_edits
from auxin.errors import PlanError, PromiseError
from auxin.nn.bricks import Brick, brick
from edits.models import assert_same, everything
from tiny_models import inputs, tiny


@brick("test_scaled")
class Scaled(Brick):
    """Multiplies what a module gives by learned factors, by a constant of its own and by one that is saved."""

    def __init__(self, inner: nn.Module, size: int, constant: float = 1.0) -> None:
        super().__init__()
        self.inner, self.constant_value = inner, constant
        self.factors = nn.Parameter(torch.empty(size))
        self.register_buffer("constant", torch.empty(()), persistent=False)
        self.register_buffer("saved", torch.empty(()))

    def reset_buffers(self) -> None:
        self.constant.fill_(self.constant_value)
        self.saved.fill_(1.0)

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args) * self.factors * self.constant * self.saved


def plan(*edits, promise="none", seed=0):
    return Plan(method="test", promise=promise, seed=seed, edits=list(edits))


def trained(model, steps=2, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **settings})
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def step(model, optimizer):
    ids = inputs(model, 1)["input_ids"]
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


# Parameters ----------------------------------------------------------------------------------------------------------


def matrices(edit, size):
    """The matrix that `edit` multiplies an axis of `size` entries with."""
    return edit.map_parameter(torch.eye(size, dtype=torch.float64), 0, "matrix")


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=9), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 1))
def test_a_slice_takes_units_and_divides_by_their_copies(index, unit, divide, axis):
    edit = SliceParameter(parameter="p", axis=axis, index=index, unit=unit, divide=divide)
    old = torch.randn(5 * unit, 5 * unit, dtype=torch.float64)
    expected = []
    for place in index:
        rows = old.movedim(axis, 0)[place * unit : (place + 1) * unit] if place >= 0 else torch.zeros(unit, 5 * unit)
        expected.append(rows / (index.count(place) if divide else 1))
    assert torch.equal(edit.map_parameter(old, 0, "p").movedim(axis, 0), torch.cat(expected).to(old.dtype))


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=8), st.booleans())
def test_moments_of_a_slice_follow_the_chain_rule(index, divide):
    """Where all old units are kept, W = C_out W' R_in; the gradient of W' is the adjoint of that map, and a second
    moment, whose units have one source each, takes squares."""
    index = [*index, 0, 1, 2, 3]
    edit = SliceParameter(parameter="p", index=index, divide=divide)
    rows = torch.tensor([[1.0 if unit == place else 0.0 for unit in range(4)] for place in index], dtype=torch.float64)
    counts = rows.sum(0)
    adjoint = rows if divide else rows / counts
    gradient = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(edit.map_moment(gradient, 1), adjoint @ gradient)
    second = edit.map_moment(gradient**2, 2)
    present = torch.tensor([place >= 0 for place in index])
    assert torch.allclose(second[present], (adjoint**2 @ gradient**2)[present])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.floats(0.01, 1), st.integers(0, 3))
def test_noise_breaks_copies_apart_and_keeps_their_sum(index, noise, seed):
    edit = SliceParameter(parameter="p", index=index, divide=True, noise=noise)
    old = torch.randn(4, 3, dtype=torch.float64)
    new = edit.map_parameter(old, seed, "p")
    for unit in set(index):
        copies = [place for place, source in enumerate(index) if source == unit]
        assert torch.allclose(new[copies].sum(0), old[unit])
        if len(copies) > 1:
            assert not torch.equal(new[copies[0]], new[copies[1]])
    assert torch.equal(new, edit.map_parameter(old, seed, "p"))


@pytest.mark.parametrize(
    "edit",
    [
        PadParameter(parameter="p", size=7, fill=ZeroFill()),
        PadParameter(parameter="p", axis=1, size=7, fill=MeanFill()),
        PadParameter(parameter="p", size=7, fill=ConstantFill(value=2)),
        SliceParameter(parameter="p", index=[3, 1, 2, 0, 1, -1]),
        SliceParameter(parameter="p", axis=1, index=[0, 1, 2, 3, 0, 1, 2, 3], divide=True),
        SliceParameter(parameter="p", index=[1, 0, 1, 0], unit=2, divide=True),
        ScaleParameter(parameter="p", factor=-0.5),
        ScaleParameter(parameter="p", factor=2, offset=1),
    ],
    ids=str,
)
def test_what_can_be_taken_back_is(edit):
    old = torch.randn(4, 4, dtype=torch.float64)
    new = edit.map_parameter(old, 0, "p")
    assert new.shape == edit.new_shape((4, 4))
    assert torch.allclose(edit.restore_parameter(new, (4, 4)), old)
    for back in edit.inverse((4, 4)):
        new = back.map_parameter(new, 0, "p")
    assert torch.allclose(new, old)
    assert edit.map_parameter(old.to("meta"), 0, "p").shape == edit.new_shape((4, 4))


def test_what_is_lost_has_no_inverse():
    lost = [SliceParameter(parameter="p", index=[0, 1, 1]), ScaleParameter(parameter="p", factor=0)]
    lost += [CentreParameter(parameter="p"), SliceParameter(parameter="p", index=[0, 0, 1, 2, 3], divide=True)]
    assert [edit.inverse((4,)) for edit in lost] == [None] * 4


def test_the_mean_row_and_the_centred_columns():
    old = torch.randn(4, 3, dtype=torch.float64)
    padded = PadParameter(parameter="p", size=6, fill=MeanFill()).map_parameter(old, 0, "p")
    assert torch.equal(padded[4:], old.mean(0).expand(2, 3))
    centred = CentreParameter(parameter="p", axis=1).map_parameter(old, 0, "p")
    assert torch.allclose(centred, old @ (torch.eye(3, dtype=torch.float64) - 1 / 3))


def test_a_projection_reads_its_matrix_from_a_file(tmp_path):
    matrix, old = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    path = tmp_path / "b.safetensors"
    save_file({"B": matrix}, path)
    edit = ProjectParameter(parameter="p", axis=1, file=path.name, tensor="B", shape=(5, 3)).located(path)
    assert torch.allclose(edit.map_parameter(old, 0, "p"), old @ matrix.T)
    with pytest.raises(PlanError, match=r"B in .* has 3 columns, but axis 0 of shape \[2, 3\] has 2"):
        edit.model_copy(update={"axis": 0}).new_shape((2, 3))
    with pytest.raises(PlanError, match="C can't be read"):
        edit.model_copy(update={"tensor": "C"}).located(path)
    with pytest.raises(PlanError, match=r"has shape \[5, 3\], and the plan says \[5, 4\]"):
        edit.model_copy(update={"shape": (5, 4)}).located(path)


def test_a_shift_reads_what_it_adds_from_a_file(tmp_path):
    shift, old = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    path = tmp_path / "b.safetensors"
    save_file({"b": shift}, path)
    edit = ShiftParameter(parameter="p", file=path.name, tensor="b", shape=(3,)).located(path)
    assert torch.equal(edit.map_parameter(old, 0, "p"), old + shift)
    assert torch.equal(edit.map_moment(old, 1), old)
    half = edit.map_parameter(old.bfloat16(), 0, "p")
    assert torch.equal(half, (old.bfloat16().float() + shift.float()).bfloat16())
    with pytest.raises(PlanError, match=r"has shape \[3\], and what it is added to has \[4\]"):
        edit.new_shape((4,))


@pytest.mark.parametrize("axis", [0, 1])
def test_entries_are_multiplied_by_a_vector_of_a_file_and_their_gradients_divided(tmp_path, axis):
    factors = torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64)
    old = torch.randn(3, 3, dtype=torch.float64)
    path = tmp_path / "b.safetensors"
    save_file({"g": factors}, path)
    edit = MultiplyParameter(parameter="p", axis=axis, file=path.name, tensor="g", shape=(3,)).located(path)
    along = factors[:, None] if axis == 0 else factors
    assert torch.equal(edit.map_parameter(old, 0, "p"), old * along)
    # L(W) = <C, diag(g) W> is of W' = diag(g) W the function <C, W'>: what was C g is C.
    gradient = torch.randn(3, 3, dtype=torch.float64)
    for order in (1, 2):
        moment = edit.map_moment((gradient * along) ** order, order)
        assert torch.allclose(moment, torch.where(along == 0, 0, gradient**order))
    assert edit.map_parameter(old.to("meta"), 0, "p").is_meta
    with pytest.raises(PlanError, match=r"g in .* has 3 entries, but axis 0 of shape \[4, 3\] has 4"):
        edit.model_copy(update={"axis": 0}).new_shape((4, 3))


def test_factors_of_gains_that_are_stored_less_one_and_back(tmp_path):
    factors, old = torch.rand(3, dtype=torch.float64) + 0.5, torch.randn(2, 3, dtype=torch.float64)
    path = tmp_path / "f.safetensors"
    save_file({"f": factors}, path)
    edit = MultiplyParameter(parameter="p", axis=1, file=path.name, tensor="f", shape=(3,)).located(path)
    back = edit.model_copy(update={"divide": True})
    assert torch.allclose(back.map_parameter(edit.map_parameter(old, 0, "p"), 0, "p"), old, rtol=1e-14)
    assert torch.allclose(back.map_moment(edit.map_moment(old, 2), 2), old, rtol=1e-14)
    gain = edit.model_copy(update={"axis": 0, "offset": 1.0})
    assert torch.allclose(gain.map_parameter(old[0], 0, "p"), (old[0] + 1) * factors - 1, rtol=1e-14)
    assert str(gain) == "multiply along axis 0 by f of f.safetensors (offset 1)"
    half = edit.map_parameter(old.bfloat16(), 0, "p")
    assert torch.equal(half, (old.bfloat16().float() * factors.float()).bfloat16())
    alone = edit.model_copy(update={"made_up_for": False})
    assert torch.equal(alone.map_moment(old, 2), old)


def test_values_are_set_to_those_of_a_file(tmp_path):
    values, old = torch.randn(3, dtype=torch.float64), torch.randn(3)
    path = tmp_path / "b.safetensors"
    save_file({"b": values}, path)
    edit = SetParameter(parameter="p", file=path.name, tensor="b", shape=(3,)).located(path)
    one, other = edit.map_parameter(old, 0, "p"), edit.map_parameter(old, 0, "q")
    assert torch.equal(one, values.float())
    assert one.data_ptr() != other.data_ptr()
    assert not edit.map_moment(old, 1).any()
    with pytest.raises(PlanError, match=r"has shape \[3\], and what becomes it has \[4\]"):
        edit.new_shape((4,))


def test_random_numbers_differ_by_seed_name_and_shape():
    draws = {
        torch.randn(1, generator=generator(seed, name, shape)).item()
        for seed in (0, 1)
        for name in ("a", "b")
        for shape in ((1,), (2,))
    }
    assert len(draws) == 8


# Layers --------------------------------------------------------------------------------------------------------------


def test_layers_are_copied_dropped_and_moved_with_their_moments():
    model = tiny("llama")
    optimizer = trained(model)
    old = copy.deepcopy(dict(model.named_parameters()))
    moments = {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }
    kept = model.model.layers[1]
    apply(plan(ArrangeLayers(layers="model.layers", order=[1, 0, 1])), model, optimizer)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    assert kept in model.model.layers
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    for place, source in enumerate([1, 0, 1]):
        for name, parameter in model.model.layers[place].named_parameters():
            before = f"model.layers.{source}.{name}"
            assert torch.equal(parameter, old[before])
            for key, value in moments[before].items():
                assert torch.equal(optimizer.state[parameter][key], value)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    step(model, optimizer)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    apply(plan(ArrangeLayers(layers="model.layers", order=[1])), model, optimizer)
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_fresh_layer_is_what_the_architecture_makes_of_the_seed():
    models = [tiny("llama", dtype=torch.float32) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        apply(plan(ArrangeLayers(layers="model.layers", order=[0, None, 1]), seed=seed), model)
    weights = [model.model.layers[1].mlp.up_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.5 < weights[0].std() / models[0].config.initializer_range < 2
    assert torch.equal(models[0].model.layers[1].input_layernorm.weight, torch.ones(models[0].config.hidden_size))


def test_layers_can_be_blended():
    model = tiny("llama")
    old = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
    blend = {"mlp.up_proj.weight": [[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]}
    apply(plan(ArrangeLayers(layers="model.layers", order=[0, 1, 1], blend=blend)), model)
    new = [layer.mlp.up_proj.weight for layer in model.model.layers]
    for weights, tensor in zip(blend["mlp.up_proj.weight"], new, strict=True):
        assert torch.allclose(tensor, weights[0] * old[0] + weights[1] * old[1])


def test_lists_with_an_entry_per_layer_follow():
    model = tiny("qwen2", layer_types=["full_attention", "sliding_attention"], use_sliding_window=True)
    apply(plan(ArrangeLayers(layers="model.layers", order=[1, 0, 1])), model)
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


# Modules -------------------------------------------------------------------------------------------------------------


def wrapped(model, **settings):
    size = model.config.hidden_size
    return WrapModule(
        module="model.layers.*.mlp",
        brick="test_scaled",
        settings={"size": size, **settings},
        fills={"factors": ConstantFill(value=1)},
    )


def test_a_wrapped_module_keeps_its_parameters_and_loads_again(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    optimizer = trained(model)
    logits = model(**inputs(model, 0)).logits
    apply(plan(wrapped(model), promise="exact"), model, optimizer)
    assert torch.equal(model(**inputs(model, 0)).logits, logits)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    step(model, optimizer)
    model.model.layers[0].mlp.saved.fill_(0.5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**inputs(model, 0)).logits, model(**inputs(model, 0)).logits)
    assert not getattr(again, "is_quantized", False)
    assert getattr(again, "hf_quantizer", None) is None
    for either in (model, again):
        apply(plan(RemoveModule(module="model.layers.*.mlp", leaves="inner")), either)
        assert structural_edits(either.config) == []
        assert not hasattr(either.config, "quantization_config")
        assert type(either.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_layers_take_their_bricks_along():
    model = tiny("llama")
    one = wrapped(model, constant=3.0).model_copy(update={"module": "model.layers.1.mlp"})
    apply(plan(one), model)
    apply(plan(ArrangeLayers(layers="model.layers", order=[1, 0, 1])), model)
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["Scaled", "LlamaMLP", "Scaled"]
    assert {edit.module for edit in structural_edits(model.config)} == {"model.layers.0.mlp", "model.layers.2.mlp"}
    assert model.model.layers[0].mlp.constant == 3


def test_a_removed_branch_adds_nothing_and_its_parameters_are_gone(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.bias.zero_()
    optimizer = trained(model, steps=1, lr=0.0, weight_decay=0.0)
    logits = model(**inputs(model, 0)).logits
    apply(plan(RemoveModule(module="model.layers.1.mlp", leaves="zeros"), promise="exact"), model, optimizer)
    assert torch.equal(model(**inputs(model, 0)).logits, logits)
    assert not [name for name, _ in model.named_parameters() if "layers.1.mlp" in name]
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.state) == len(list(model.parameters()))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(**inputs(model, 0)).logits, logits)


def test_tied_parameters_are_one_after_loading_too(tmp_path):
    model = tiny("llama")
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    optimizer = trained(model)
    apply(plan(TieParameters(parameter=second, to=first)), model, optimizer)
    assert model.get_parameter(first) is model.get_parameter(second)
    step(model, optimizer)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert again.get_parameter(first) is again.get_parameter(second)
    assert torch.equal(again(**inputs(model, 0)).logits, model(**inputs(model, 0)).logits)
    with pytest.raises(PlanError, match="tied already"):
        apply(plan(TieParameters(parameter=second, to=first)), model)


# Refusals and the way back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([WrapModule(module="model.layers.*.mpl", brick="test_scaled")], r"nearest is model\.layers\.\*\.mlp"),
        ([WrapModule(module="model.layers.0.mlp", brick="test_skaled")], r"Unknown brick 'test_skaled'"),
        ([WrapModule(module="model.layers.0.mlp", brick="test_scaled")], r"refuses a LlamaMLP"),
        ([WrapModule(module="model.layers.0.mlp", brick="test_scaled", settings={"size": 3})], r"factors .* no edit"),
        ([ReplaceModule(module="model.layers.0.mlp", brick="test_scaled")], r"can't replace a module"),
        ([RemoveModule(module="model.layers.0.mlp", leaves="inner")], r"no wrapper"),
        ([RemoveModule(module="model.layers.0.mlp.gate")], r"nearest is model\.layers\.0\.mlp\.gate_proj"),
        ([ArrangeLayers(layers="model.layer", order=[0])], r"no stack of layers. This model has model\.layers"),
        ([ArrangeLayers(layers="model.layers", order=[0, 2])], r"layer 2 is beyond the 2 layers"),
        ([ArrangeLayers(layers="model.layers", order=[0])] * 2, r"Edit 2 .*arranged by an earlier edit"),
        ([SetConfig(values={"num_hidden_layers": 3}), ArrangeLayers(layers="model.layers", order=[0])], r"them agree"),
        ([ArrangeLayers(layers="model.layers", order=[0, 0], blend={"mlp.up.w": [[1, 0]] * 2})], r"nearest is mod"),
        (
            [
                ScaleParameter(parameter="model.layers.0.mlp.up_proj.weight", factor=2),
                ArrangeLayers(layers="model.layers", order=[0, 0], blend={"mlp.up_proj.weight": [[1, 0]] * 2}),
            ],
            r"was changed or made by an earlier edit; arrange the layers first",
        ),
        ([SliceParameter(parameter="model.norm.weight", index=[99])], r"index 99 is beyond"),
        ([SliceParameter(parameter="model.norm.weight", index=[0], unit=5)], r"no whole number of units of 5"),
        ([ScaleParameter(parameter="model.nrom.weight", factor=2)], r"nearest is model\.norm\.weight"),
        ([ScaleParameter(parameter="model.norm.weight", factor=2)] * 2, r"Edit 2 .*collides with edit 1"),
        ([TieParameters(parameter="lm_head.weight", to="model.norm.weight")], r"can't be one tensor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(edits, message):
    model = tiny("llama", tie_word_embeddings=False)
    before = everything(model)
    with pytest.raises(PlanError, match=message):
        apply(plan(*edits), model)
    assert_same(everything(model), before)


HALF = ScaleParameter(parameter="model.norm.weight", factor=0.5)


@pytest.mark.parametrize(
    "edits",
    [
        [ArrangeLayers(layers="model.layers", order=[1, 0, None, 1])],
        [SetConfig(values={"intermediate_size": 36}), *(
            SliceParameter(parameter=f"model.layers.*.mlp.{name}", index=[*range(12), *range(12), *range(12)])
            for name in ("up_proj.*", "gate_proj.*")
        ), SliceParameter(parameter="model.layers.*.mlp.down_proj.weight", axis=1, index=[*range(12)] * 3)],
        [RemoveModule(module="model.layers.0.mlp", leaves="zeros")],
        [TieParameters(parameter="model.layers.1.mlp.up_proj.weight", to="model.layers.0.mlp.up_proj.weight")],
        ["wrap", ArrangeLayers(layers="model.layers", order=[1, 0])],
    ],
    ids=["layers", "width", "remove", "tie", "wrap"],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["promise", "tree"])
def test_a_failed_apply_leaves_model_and_optimizer_as_they_were(edits, stage, monkeypatch):
    model = tiny("llama")
    optimizer = trained(model)
    edits = [wrapped(model) if edit == "wrap" else edit for edit in edits]
    before = everything(model, optimizer)
    logits = model(**inputs(model, 0)).logits
    if stage == "promise":
        with pytest.raises(PromiseError):
            apply(plan(*edits, HALF, promise="exact"), model, optimizer)
    else:

        def fail(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr("auxin.edits.tree._Rebuilding._change_configs", fail)
        with pytest.raises(KeyboardInterrupt):
            apply(plan(*edits), model, optimizer)
    assert_same(everything(model, optimizer), before)
    assert torch.equal(model(**inputs(model, 0)).logits, logits)
    step(model, optimizer)


def test_an_inverse_plan_leads_back():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(model.config.to_dict())
    size = model.config.hidden_size
    there = plan(
        wrapped(model),
        ArrangeLayers(layers="model.layers", order=[0, 1, 1]),
        ScaleParameter(parameter="model.layers.2.mlp.inner.down_proj.weight", factor=0),
        ScaleParameter(parameter="model.norm.weight", factor=2),
    )
    back = inverse_plan(there, model)
    apply(there, model)
    apply(back, model)
    assert_same(dict(model.state_dict()), dict(before))
    assert model.config.to_dict() == config
    lost = plan(SetConfig(values={"hidden_size": size // 2}), RemoveModule(module="model.layers.0.mlp", leaves="zeros"))
    with pytest.raises(PlanError):
        inverse_plan(lost, model)


def test_models_changed_behind_their_config_are_refused():
    model = tiny("llama")
    model.model.layers[0].mlp.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(PlanError, match=r"has a parameter model\.layers\.0\.mlp\.extra .* changed by other means"):
        apply(plan(ScaleParameter(parameter="model.norm.weight", factor=2)), model)


@pytest.mark.parametrize("kind", ["gguf", "torchao", "bitsandbytes", "gptq", "compressed-tensors"])
def test_a_quantized_model_is_refused(kind):
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": kind}
    with pytest.raises(PlanError, match=rf"quantized \({kind}\).*Dequantize it first"):
        apply(plan(ScaleParameter(parameter="model.norm.weight", factor=2)), model)


class Packed(torch.Tensor):
    """A tensor of another package's kind: torchao and bitsandbytes put such ones into ordinary linear layers."""


def test_one_with_tensors_of_another_kind_is_refused():
    model = tiny("llama")
    up = model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().as_subclass(Packed))
    for asked in (lambda: auxin.plan(model, "stacking", layers=4), lambda: QuantizedMeasurement().observe(model)):
        with pytest.raises(PlanError, match=r"quantized \(.*test_language\.Packed\).*Dequantize it first"):
            asked()
    with pytest.raises(PlanError, match="quantized"):
        apply(plan(ScaleParameter(parameter="model.norm.weight", factor=2)), model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_one_that_pytorch_has_quantized_is_refused():
    model = torch.ao.quantization.quantize_dynamic(tiny("llama", dtype=torch.float32), {torch.nn.Linear})
    for asked in (lambda: auxin.plan(model, "magnitude", heads=0.5), lambda: auxin.plan(model, "stacking", layers=4)):
        with pytest.raises(PlanError, match=r"quantized \(torch.*Linear\).*Dequantize it first"):
            asked()


def test_new_parameters_join_the_group_of_their_relatives():
    model = tiny("llama")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    apply(plan(wrapped(model), ArrangeLayers(layers="model.layers", order=[0, 1, 1])), model, optimizer)
    for group, dims in zip(optimizer.param_groups, (2, 1), strict=True):
        assert {p.dim() for p in group["params"]} == {dims}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_plan_with_every_kind_of_edit_survives_yaml(tmp_path):
    everything_there_is = plan(
        SetConfig(values={"a": 1}),
        PadParameter(parameter="p", size=3, fill=NormalFill()),
        SliceParameter(parameter="p", index=[0, 1], unit=2, divide=True, noise=0.1),
        ScaleParameter(parameter="p", factor=2),
        CentreParameter(parameter="p"),
        ProjectParameter(parameter="p", file="f", tensor="t", shape=(2, 1)),
        MultiplyParameter(parameter="p", axis=1, file="f", tensor="t", shape=(2,)),
        SetParameter(parameter="p", file="f", tensor="t", shape=(2,)),
        ShiftParameter(parameter="p", file="f", tensor="t", shape=(2,)),
        ArrangeLayers(layers="l", order=[0, None]),
        ReplaceModule(module="m", brick="b", settings={"tokens": [1]}, fills={"k": ZeroFill()}),
        WrapModule(module="m", brick="b"),
        RemoveModule(module="m", leaves="inner"),
        MergeModule(module="m"),
        MakeParameters(module="m", making="c", settings={"num_experts": 2}),
        ConfigureModule(module="m", values={"a": 1}),
        ChangeArchitecture(model_type="mixtral", values={"a": 1}),
        TieParameters(parameter="p", to="q"),
    )
    everything_there_is.to_yaml(tmp_path / "plan.yaml")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == everything_there_is
    assert str(everything_there_is).count("\n") == 18
