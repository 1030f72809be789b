"""What AltUp makes of checkpoints and optimizers: bits that come back, streams of tensors, moments that follow."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from auxin.edits import apply, apply_to_checkpoint
from auxin.methods.grow.altup import AltUpSettings, plan_altup
from covering import families
from methods.altup_models import EVERY, EXACT, alter, altered, outputs, shake, small, train, untied, updates
from tiny_models import change, inputs, labels, logits

RECYCLED = [pytest.param(*family.values, {"blocks": 3}, marks=family.marks) for family in families(EVERY)]
CASES = [("llama", {"conversion": name, "blocks": 3}) for name in ("copies", "free", "relay", "zeros", "random")]
CASES += [("llama", {"conversion": "copies", "norm": "all", "noise": 0.1}), ("llama", {"coefficients": "dynamic"})]
CASES += [("t5", {"conversion": "copies", "blocks": 3}), ("gpt2", {"conversion": "copies"})]
CASES += [("gemma", {"conversion": "copies"}), ("vit", {"conversion": "zeros"})]
CASES += [("bert", {"conversion": name}) for name in ("copies", "free", "zeros")]
# That recycled streams of every architecture load again is tested with all methods, in a new process.
SAVED = [("t5", {"blocks": 3}), *CASES]
every_case = pytest.mark.parametrize(("family", "values"), [*RECYCLED, *CASES])


def model_of(family, values, dtype=torch.float32):
    make = small if values.get("conversion") in (None, "copies") else untied
    return make(family, dtype=dtype)


def in_place(model):
    """Products depend in their last bit on where in memory their factors start."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize(("family", "values"), SAVED)
def test_it_is_saved_and_loaded_bit_by_bit(family, values, tmp_path):
    model = shake(altered(model_of(family, values), **values))
    model.save_pretrained(tmp_path / "one")
    loaded = in_place(type(model).from_pretrained(tmp_path / "one"))
    assert torch.equal(outputs(loaded), outputs(in_place(model)))
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert [module.active for module in updates(loaded).values()] == [m.active for m in updates(model).values()]
    # Once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two/config.json").read_text() == (tmp_path / "one/config.json").read_text()
    again = load_file(tmp_path / "two/model.safetensors")
    for name, tensor in load_file(tmp_path / "one/model.safetensors").items():
        assert torch.equal(again[name], tensor), name


def optimizer_tensors(model, optimizer):
    return {
        f"optimizer.{state}.{name}": tensor.clone()
        for name, parameter in model.named_parameters()
        for state, tensor in optimizer.state[parameter].items()
    }


@every_case
@pytest.mark.filterwarnings("ignore:.*blocks")
def test_a_checkpoint_becomes_what_the_model_in_memory_becomes(family, values, tmp_path):
    model = model_of(family, values)
    optimizer = train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), steps=2)
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old/training").mkdir()
    save_file(optimizer_tensors(model, optimizer), tmp_path / "old/training/state.safetensors", {"format": "pt"})
    plan = plan_altup(model, AltUpSettings.parse(values))
    apply_to_checkpoint(plan, tmp_path / "old", tmp_path / "new")
    apply(plan, model, optimizer)
    loaded = type(model).from_pretrained(tmp_path / "new")
    wanted, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    moments, kept = load_file(tmp_path / "new/training/state.safetensors"), optimizer_tensors(model, optimizer)
    assert moments.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(moments[name], tensor), name
    assert torch.equal(outputs(in_place(loaded)), outputs(in_place(model)))


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"blocks": 3}),
        ("llama", {"conversion": "copies"}),
        ("llama", {"conversion": "free"}),
        ("t5", {"conversion": "copies"}),
        ("bert", {"conversion": "copies"}),
    ],
)
def test_moments_follow_and_training_goes_on(family, values):
    model = untied(family)
    optimizer = train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), steps=3)
    old = {name: copy.deepcopy(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    width = {name: parameter.shape for name, parameter in model.named_parameters()}
    before = logits(model)
    alter(model, optimizer, **values)
    assert change(before, logits(model)) <= EXACT
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert id(parameter) in held, name
        state = optimizer.state.get(parameter)
        if name in old and parameter.shape == width[name]:
            assert torch.equal(state["exp_avg"], old[name]["exp_avg"]), name
            assert torch.equal(state["exp_avg_sq"], old[name]["exp_avg_sq"]), name
        elif name in old:
            assert state["exp_avg"].shape == parameter.shape, name
            assert state["exp_avg_sq"].min() >= 0, name
        if ".altup." in name:
            assert not state, name
    if family == "bert":
        word = "bert.embeddings.word_embeddings.weight"
        copied = optimizer.state[model.get_parameter(word.replace("embeddings.word", "embeddings.others.0.word"))]
        assert torch.equal(copied["exp_avg"], old[word]["exp_avg"])
    loss = [model(**inputs(model), labels=labels(model)).loss.item()]
    train(model, optimizer, steps=3)
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()
    assert model(**inputs(model), labels=labels(model)).loss.item() != loss[0]


def test_a_table_of_copies_shares_its_first_moment():
    """Copies that are read with W/K each get 1/K of the gradient, so that together they go where the table would."""
    model = untied("llama")
    optimizer = train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), steps=3)
    table = model.get_input_embeddings().weight
    state = copy.deepcopy(optimizer.state[table])
    alter(model, optimizer, conversion="copies", blocks=2)
    table = model.get_input_embeddings().weight
    for part in optimizer.state[table]["exp_avg"].split(16, -1):
        torch.testing.assert_close(part, state["exp_avg"] / 2)


def test_a_part_of_t5_alone():
    model = small("t5")
    before = logits(model)
    alter(model, part="decoder", blocks=2)
    assert change(before, logits(model)) == 0
    assert {name.split(".")[0] for name in updates(model)} == {"decoder"}
    assert change(before, logits(shake(model))) > 1e-3
