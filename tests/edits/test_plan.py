"""Plans as data: validation before anything changes, the table, YAML."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

import auxin
from auxin.accounting import flops_per_token
from auxin.edits import (
    NormalFill,
    PadParameter,
    Plan,
    RemoveModule,
    RepeatFill,
    SetConfig,
    ZeroFill,
    apply,
    apply_to_checkpoint,
    planned_config,
)
from auxin.edits.kinds.parameter_edits import ScaleParameter
from auxin.edits.plan import REPLAYED, resolve
from auxin.edits.purpose import made_for_another
from auxin.edits.structure import config_values
from auxin.edits.tensor_names import together
from auxin.errors import ConfigError, PlanError
from auxin.methods.grow.tokenformer import TokenGrowth, plan_token_growth
from edits.models import tiny_model
from tiny_models import fresh_llama, inputs, labels, tiny


def plan_of(*edits, promise="none"):
    return Plan(method="by hand", promise=promise, edits=list(edits))


def pad(parameter="model.layers.*.mlp.key_tokens", size=30, **values):
    return PadParameter(parameter=parameter, size=size, **{"fill": ZeroFill(), **values})


FFN_30 = SetConfig(values={"ffn_tokens": [20, 10]})


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([pad("model.layers.*.mlp.key_toknes")], r"Edit 1 .*toknes.*nearest is model\.layers\.\*\.mlp\.key_tokens"),
        ([pad("model.layers.7.mlp.key_tokens")], r"nearest is model\.layers\.[01]\.mlp\.key_tokens"),
        ([FFN_30, pad(size=20)], r"Edit 2 .*not fit .*0\.mlp\.key_tokens: size 20 must be more than the 20"),
        ([pad(axis=2)], r"axis 2 is beyond the 2 axes"),
        ([pad(fill=RepeatFill(first=20))], r"first row to repeat 20 is beyond the 20"),
        ([FFN_30, pad(), pad("model.layers.0.mlp.*", size=31)], r"Edit 3 .*collides with edit 2: .*0\.mlp\.key_tokens"),
        ([FFN_30, pad()], r"No edit: model\.layers\.0\.mlp\.value_tokens has shape \[20, 32\].*asks for \[30, 32\]"),
        ([pad(), pad("model.layers.*.mlp.value_tokens")], r"Edit 1 .*\[30, 32\] after the plan's.*asks for \[20, 32\]"),
        ([SetConfig(values={"ffn_tokns": 3})], r"Edit 1 \(set ffn_tokns = 3\): .*no value 'ffn_tokns'"),
        ([SetConfig(values={"num_attention_heads": 5})], r"Edit 1 .*refuses it: num_attention_heads must divide"),
        ([FFN_30, FFN_30], r"Edit 2 .*ffn_tokens was set by an earlier edit"),
        ([SetConfig(values={"num_hidden_layers": 3})], r"has a parameter model\.layers\.2\."),
        ([pad("lm_head.weight", 99), pad("model.embed_tokens.weight", 99)], r"Edit 2 .*collides with edit 1"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused_and_says_where(edits, message):
    model = tiny_model()
    with pytest.raises(PlanError, match=message):
        apply(plan_of(*edits), model)
    assert model.config.ffn_tokens == [20]
    assert {tuple(p.shape) for p in model.model.layers[0].mlp.parameters()} == {(20, 32)}


def test_a_config_value_that_makes_another_module_is_refused():
    model = tiny("llama")
    with pytest.raises(
        PlanError, match=r"hidden_act = relu.*model\.layers\.0\.mlp\.act_fn would be ReLU instead of SiLU"
    ):
        apply(plan_of(SetConfig(values={"hidden_act": "relu"}), promise="exact"), model)
    assert model.config.hidden_act == "silu"
    assert apply(plan_of(SetConfig(values={"attention_dropout": 0.5})), model).max_relative_change == 0
    assert model.model.layers[0].self_attn.attention_dropout == 0.5


def test_edits_along_two_axes_of_one_parameter_do_not_collide():
    plan = plan_of(pad(size=30), pad(size=40, axis=1), promise="none")
    with pytest.raises(PlanError, match=r"has shape \[30, 40\]"):
        resolve(plan.edits, tiny_model())


fills = st.one_of(
    st.just(ZeroFill()),
    st.builds(NormalFill, std=st.none() | st.floats(1e-3, 10)),
    st.builds(RepeatFill, first=st.integers(0, 9), divide=st.booleans(), noise=st.floats(0, 1)),
)
edits = st.one_of(
    st.builds(
        SetConfig, values=st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | st.lists(st.floats(0, 1)))
    ),
    st.builds(
        PadParameter, parameter=st.text("abc.*", min_size=1), axis=st.integers(0, 3), size=st.integers(1), fill=fills
    ),
)


@given(st.lists(edits, max_size=4), st.sampled_from(["exact", "approximate", "none"]), st.integers(0, 2**40))
def test_a_plan_survives_yaml(tmp_path_factory, edits, promise, seed):
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan = Plan(method="x", settings={"a": [1, None]}, promise=promise, seed=seed, edits=edits)
    plan.to_yaml(path)
    assert Plan.from_yaml(path) == plan


def test_a_growth_plan_survives_yaml_and_does_the_same(tmp_path):
    model, other = tiny_model(), tiny_model()
    plan = plan_token_growth(model.config, TokenGrowth(ffn_tokens=40, regime="duplicate", noise=0.1, seed=3))
    plan.to_yaml(tmp_path / "plan.yaml")
    read = Plan.from_yaml(tmp_path / "plan.yaml")
    assert read == plan
    assert str(read) == str(plan)
    apply(plan, model)
    apply(read, other)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_plan_says_what_needs_this_package_and_a_receipt_what_was_done():
    model = tiny("llama")
    replayed = auxin.plan(model, "graft", tokens=4)
    assert str(replayed).splitlines()[-1] == REPLAYED
    receipt = auxin.apply(replayed, copy.deepcopy(model))
    assert receipt.replayed
    assert str(receipt).endswith(f" {REPLAYED}")
    plan = auxin.plan(model, "llama-pro", group_size=1)
    assert REPLAYED not in str(plan)
    receipt = auxin.apply(plan, model)
    assert not receipt.replayed
    assert REPLAYED not in str(receipt)
    before, after = receipt.parameters_before, receipt.parameters_after
    assert str(receipt).startswith(f"{before:,} -> {after:,} parameters in ")
    assert "Promise 'exact': the outputs on the probe moved by 0.0e+00 relative" in str(receipt)


def test_a_receipt_of_a_folder_says_too_what_needs_this_package(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "old")
    plan = auxin.plan(str(tmp_path / "old"), "graft", tokens=4)
    assert apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new").replayed
    plan = auxin.plan(str(tmp_path / "old"), "llama-pro", group_size=1)
    assert not apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "deeper").replayed


def test_a_table_has_a_row_for_layers_that_lose_as_many_of_other_units_and_no_sums(tmp_path, monkeypatch):
    """Numbers of units, tensors of the layer itself and names of files made a row of every layer's every matrix, wider
    than any terminal."""
    monkeypatch.chdir(tmp_path)
    model = fresh_llama(0, num_hidden_layers=4)
    data = [{**inputs(model, batch=4), "labels": labels(model, batch=4)}]
    for method, settings in (
        ("magnitude", {"heads": 0.5, "ffn": 0.5}),
        ("slicegpt", {"hidden": 0.75}),
        ("vtrans", {"heads": 0.5, "ffn": 0.5, "hidden": 0.75, "steps": 2}),
    ):
        plan = auxin.plan(model, method, **settings, **({} if method == "magnitude" else {"data": data}))
        _, *table = str(plan).removesuffix("\n".join(plan._about())).splitlines()
        modules = [line.split("  ")[0] for line in table if line.startswith("model.layers")]
        assert modules
        assert all(module.startswith("model.layers.*.") for module in modules)
        assert len(set(modules)) == len(modules), "a row each"
        assert max(map(len, table)) <= 180
        sums = [file.sha256[:8] for file in plan.files]
        assert not any(digits in "\n".join(table) for digits in sums)
        assert all(digits in str(plan) for digits in sums), "where the files are listed"
    rows = {line.split("  ")[0]: line for line in str(auxin.plan(model, "magnitude", ffn=0.5)).splitlines()}
    entries = [sum(p.numel() for n, p in model.named_parameters() if n.endswith("up_proj.weight"))]
    assert f"(others in each)  {entries[0]:,} -> {entries[0] // 2:,}" in rows["model.layers.*.mlp.up_proj.weight"]


def test_what_happens_to_modules_of_several_layers_has_one_row():
    removed = [RemoveModule(module=f"model.layers.{number}.mlp") for number in (1, 2)]
    plan = plan_of(*removed).model_copy(update={"made_for": config_values(fresh_llama(0, num_hidden_layers=4).config)})
    assert [line.split("  ")[0] for line in str(plan).splitlines()[2:3]] == ["model.layers.{1,2}.mlp"]


def test_a_summary_is_a_plan_without_its_edits():
    plan = auxin.plan(tiny("llama"), "random", ffn=0.5)
    head, *_ = str(plan).splitlines()
    assert plan.summary().splitlines() == [head, *plan.findings]
    assert plan.findings[0].startswith("Reached: ")


def test_a_wrong_field_in_a_plan_file_is_named(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "method: x\npromise: exact\nedits:\n- kind: pad_parameter\n  parameter: a\n  sice: 3\n  fill: {kind: zeros}\n"
    )
    with pytest.raises(ConfigError, match="sice"):
        Plan.from_yaml(path)


def test_the_table_has_one_row_for_all_layers_and_counts_what_the_model_has():
    model = tiny_model(num_hidden_layers=3)
    plan = plan_token_growth(model.config, TokenGrowth(ffn_tokens=50))
    table = str(plan)
    lines = table.splitlines()
    row = next(line for line in lines if line.startswith("model.layers.*.mlp.key_tokens"))
    assert f"{3 * 20 * 32:,} -> {3 * 50 * 32:,}" in row
    assert f"{3 * 20 * 32 * 2:,} -> {3 * 50 * 32 * 2:,}" in row
    assert len([line for line in lines if "mlp" in line]) == 2
    assert "exact" in lines[0]
    flops = flops_per_token(model, 32).forward
    parameters = model.num_parameters()
    apply(plan, model)
    assert f"{parameters:,} -> {model.num_parameters():,}" in lines[-1]
    assert f"{round(flops):,} -> {round(flops_per_token(model, 32).forward):,}" in lines[-1]
    assert flops_per_token(model, 32).forward - flops == pytest.approx(2 * 3 * 30 * 32 * 2)


def test_rows_of_experts_leave_their_flops_to_the_last_row():
    table = str(auxin.plan(tiny("mixtral"), "net2net", intermediate_size=24)).splitlines()
    row = next(line for line in table if line.startswith("model.layers.*.mlp.experts.down_proj"))
    assert row.endswith(f"{2 * 4 * 16 * 12:,} -> {2 * 4 * 16 * 24:,}")
    before, _, after = table[-1].split()[-3:]
    assert table[-1].startswith("(model, 32 tokens)")
    assert (
        int(after.replace(",", "")) - int(before.replace(",", "")) == 2 * 2 * (3 * 16 * 12) * 2
    )  # two experts a token


@pytest.mark.parametrize(
    ("family", "counted"), [("vit", "per sample"), ("whisper", "per sample"), ("wav2vec2", "frames")]
)
def test_what_is_no_text_is_not_counted_in_tokens(family, counted):
    last = str(auxin.plan(tiny(family), "stacking", factor=2)).splitlines()[-1]
    assert counted in last
    assert "tokens" not in last


def test_a_plan_says_which_model_it_was_made_for():
    plan = auxin.plan(tiny("llama"), "net2net", intermediate_size=96)
    assert made_for_another(plan, tiny("llama").config) == ""
    assert made_for_another(plan, tiny("bert").config) == (
        "The plan was made for a model of type 'llama'; this one is 'bert'."
    )
    other = tiny("llama", intermediate_size=80)
    assert "intermediate_size = " in made_for_another(plan, other.config)
    assert "there and 80 here" in made_for_another(plan, other.config)
    assert made_for_another(plan_of(FFN_30), tiny("bert").config) == ""


def test_a_plan_for_another_folder_says_so_when_it_does_not_fit(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    plan = auxin.plan(tiny("bert"), "stacking", factor=2)
    with pytest.raises(
        PlanError, match=r"stacking was made for a bert, and this is a llama\. Make one for this model\.$"
    ):
        auxin.apply(plan, tmp_path / "llama", output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_table_names_the_layers_that_are_meant():
    model = tiny_model(num_hidden_layers=6)
    names = [f"model.layers.{layer}.mlp.value_tokens" for layer in (1, 3, 4)]
    edits = [ScaleParameter(parameter=name, factor=0.0) for name in names]
    (row,) = [line for line in plan_of(*edits).table(model).splitlines() if "value_tokens" in line]
    assert row.startswith("model.layers.{1,3,4}.mlp.value_tokens ")
    assert f"{3 * 20 * 32:,} -> {3 * 20 * 32:,}" in row
    (row,) = [line for line in plan_of(edits[0]).table(model).splitlines() if "value_tokens" in line]
    assert row.startswith("model.layers.1.mlp.value_tokens ")


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1), st.booleans())
def test_names_said_at_once_are_those_names(meant, all_known):
    every = {(layer, expert) for layer in range(6) for expert in range(4)}
    form = "layers.{}.experts.{}.up"
    names = [form.format(*pair) for pair in meant]
    said = together(names, [form.format(*pair) for pair in every] if all_known else [])
    assert sorted(name for group in said.values() for name in group) == sorted(names)
    for text, group in said.items():
        layers, experts = (numbers_in(part, size) for part, size in zip(text.split(".")[1::2], (6, 4), strict=True))
        assert sorted(group) == sorted(form.format(layer, expert) for layer in layers for expert in experts)
    assert ("*" in "".join(said)) <= all_known
    if meant == every and all_known:
        assert list(said) == ["layers.*.experts.*.up"]


def numbers_in(part: str, size: int) -> list[int]:
    """The numbers that `{0,2-4}`, `3` or `*` means."""
    if part == "*":
        return list(range(size))
    ends = [run.split("-") for run in part.strip("{}").split(",")]
    return [number for run in ends for number in range(int(run[0]), int(run[-1]) + 1)]


def test_a_plan_by_hand_for_single_layers_is_one_row_too():
    plan = plan_of(
        FFN_30, *(pad(f"model.layers.{i}.mlp.{name}") for i in range(2) for name in ("key_tokens", "value_tokens"))
    )
    rows = plan.table(tiny_model()).splitlines()
    assert len([row for row in rows if "model.layers.*" in row]) == 2
    assert "set ffn_tokens" in str(plan)


def test_the_planned_config_is_that_of_the_grown_model():
    model = tiny_model()
    plan = plan_token_growth(model.config, TokenGrowth(qkv_tokens=30, regime="zero_keys"))
    planned = planned_config(plan.edits, model.config)
    assert model.config.qkv_tokens == [12]
    apply(plan, model)
    assert planned.to_dict() == model.config.to_dict()
