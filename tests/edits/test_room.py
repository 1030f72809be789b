"""What can't be made is refused from its shapes, by name, before any work starts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auxin.edits import Plan, apply, apply_to_checkpoint
from auxin.edits.kinds.edit import ArrangeLayers, PadParameter, ReplaceModule, SetConfig
from auxin.edits.kinds.fills import CopyFill, DirectionsFill, MeanFill, NormalFill, RepeatFill, ValuesFill, ZeroFill
from auxin.edits.tensor_names import lies_below
from auxin.errors import PlanError
from edits.models import assert_same, everything, tiny_model, trained
from tiny_models import tiny

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOO_MANY = 10**12


def by_hand(*edits):
    return Plan(method="by hand", promise="none", edits=list(edits))


def vocabulary(size, fill=None):
    pads = [PadParameter(parameter=name, size=size, fill=fill or ZeroFill()) for name in (TABLE, HEAD)]
    return by_hand(SetConfig(values={"vocab_size": size}), *pads)


def refused(model, plan, match, optimizer=None):
    before = everything(model, optimizer)
    with pytest.raises(PlanError, match=match):
        apply(plan, model, optimizer)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("fill", [ZeroFill(), RepeatFill(), NormalFill(), MeanFill()])
def test_a_table_that_no_machine_has_room_for_is_refused_by_name(fill):
    found = rf"needs 256 TB, and there is memory for .*{TABLE} \[{TOO_MANY}, 16\], by edit 2 \({TABLE}: pad"
    refused(tiny("llama"), vocabulary(TOO_MANY, fill), found)


def test_on_shapes_there_is_no_limit():
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    receipt = apply(vocabulary(TOO_MANY, RepeatFill()), model)
    assert receipt.parameters_after > 16 * TOO_MANY
    assert model.lm_head.weight.shape == (TOO_MANY, 16)


def test_what_counts_is_the_growth_with_the_optimizer_s_state_against_the_memory_that_is_left(monkeypatch):
    # 8 new rows of 32 in the table, which is the head: 1 kB of weights, and twice that of moments.
    plan = by_hand(SetConfig(values={"vocab_size": 104}), PadParameter(parameter=TABLE, size=104, fill=ZeroFill()))
    for room, with_optimizer, fits in (
        (900, False, False),
        (1100, False, True),
        (1100, True, False),
        (3400, True, True),
    ):
        monkeypatch.setattr("auxin.edits.room.available_memory", lambda room=room: room)
        model = tiny_model()
        optimizer = trained(model) if with_optimizer else None
        if fits:
            apply(plan, model, optimizer)
        else:
            refused(model, plan, r"needs \d.* kB, and there is memory for", optimizer)
    monkeypatch.setattr("auxin.edits.room.available_memory", lambda: None)
    apply(plan, tiny_model())


def test_a_checkpoint_that_the_disk_or_the_memory_has_no_room_for_is_refused(tmp_path, monkeypatch):
    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "old")
    with pytest.raises(PlanError, match=rf"the disk of {tmp_path} has room for .*{TABLE} \[{TOO_MANY}, 16\]"):
        apply_to_checkpoint(vocabulary(TOO_MANY), tmp_path / "old", tmp_path / "new")
    monkeypatch.setattr("auxin.edits.room.available_memory", lambda: 10_000)
    with pytest.raises(PlanError, match="there is memory for 10 kB"):
        apply_to_checkpoint(vocabulary(30), tmp_path / "old", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    monkeypatch.undo()
    apply_to_checkpoint(vocabulary(30), tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"intermediate_size": 10**15}, r"gate_proj\.weight .* the plan's config asks for \[1000000000000000, 16\]"),
        (
            {"hidden_size": 10**10, "intermediate_size": 10**12},
            "No model can be built with .*hidden_size = 10000000000",
        ),
    ],
)
def test_config_values_without_bounds(values, match):
    refused(tiny("llama"), by_hand(SetConfig(values=values)), match)


def test_tables_outside_of_checkpoints_are_made_only_where_there_is_memory_for_them():
    positions = "bert.embeddings.position_embeddings.weight"
    edits = [SetConfig(values={"max_position_embeddings": TOO_MANY})]
    edits.append(PadParameter(parameter=positions, size=TOO_MANY, fill=ZeroFill()))
    refused(tiny("bert"), by_hand(*edits), rf"max_position_embeddings = {TOO_MANY}.*need .* bytes.*position_ids")


@pytest.mark.parametrize("order", [[0, 1] * 1500, [0, 1, *[None] * 2998]])
def test_thousands_of_layers_are_refused_in_a_short_message(order):
    found = r"num_hidden_layers = 3000: .* more than 1024"
    refused(tiny("llama"), by_hand(ArrangeLayers(layers="model.layers", order=order)), found)
    refused(tiny("llama"), by_hand(SetConfig(values={"num_hidden_layers": 3000})), found)
    with pytest.raises(PlanError) as error:
        apply(by_hand(ArrangeLayers(layers="model.layers", order=order)), tiny("llama"))
    assert len(str(error.value)) < 1000


def test_a_model_that_is_deeper_already_may_stay_so(monkeypatch):
    monkeypatch.setattr("auxin.edits.tracker.MOST_LAYERS", 1)
    model = tiny("llama")
    apply(by_hand(ArrangeLayers(layers="model.layers", order=[1, 0])), model)
    refused(model, by_hand(ArrangeLayers(layers="model.layers", order=[0, 1, 1])), "num_hidden_layers = 3")
    apply(by_hand(ArrangeLayers(layers="model.layers", order=[1])), model)


@pytest.mark.parametrize(
    ("fill", "match"),
    [
        (ValuesFill(values=[1.0, 2.0]), r"values: 2 are given for 64 new entries of shape \[4, 16\]"),
        (CopyFill(of=HEAD), "not rows of a padded one"),
        (RepeatFill(first=19), "first row to repeat 19 is beyond the 19 old rows"),
        (MeanFill(rows=20), "the mean of 20 rows needs more than the 19 old rows"),
        (DirectionsFill(), "directions fill whole new matrices, a row each; use normal"),
    ],
)
def test_fills_that_do_not_fit_rows(fill, match):
    refused(tiny("llama"), vocabulary(23, fill), rf"Edit 2 \({TABLE}: pad .*{match}")


@pytest.mark.parametrize(
    ("fill", "match"),
    [
        (ValuesFill(values=[1.0, 2.0]), r"values: 2 are given for 48 new entries of shape \[3, 16\]"),
        (NormalFill(), "std: there are no old entries"),
        (MeanFill(), "the mean of all rows needs more than the 0 old rows"),
        (RepeatFill(), "first row to repeat 0 is beyond the 0 old rows"),
    ],
)
def test_fills_that_do_not_fit_a_new_parameter(fill, match):
    path = "model.layers.0.mlp.up_proj"
    fills = {"branch.key_tokens": fill, "branch.value_tokens": ZeroFill()}
    graft = ReplaceModule(module=path, brick="grafted_linear", settings={"tokens": [3]}, fills=fills)
    refused(tiny("llama"), by_hand(graft), rf"The fill of {path}\.branch\.key_tokens: {match}")
    fitting = ValuesFill(values=[0.5] * 48)
    model = tiny("llama")
    apply(by_hand(graft.model_copy(update={"fills": {**fills, "branch.key_tokens": fitting}})), model)
    assert (model.model.layers[0].mlp.up_proj.branch.key_tokens == 0.5).all()


@given(size=st.integers(1, 12), more=st.integers(1, 30), data=st.data())
def test_copies_are_counted_without_writing_them_down(size, more, data):
    fill = RepeatFill(first=data.draw(st.integers(0, size - 1)))
    counts = torch.bincount(fill.sources(size, size + more), minlength=size)
    assert fill.copies(size, size + more) == (counts.max().item(), bool((counts == counts.max()).all()))


@given(st.text("ab.", max_size=8), st.sets(st.text("ab.", max_size=5)))
def test_what_lies_below(name, paths):
    assert lies_below(name, paths) == any(name.startswith(f"{path}.") for path in paths)
