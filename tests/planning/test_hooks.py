"""Hooks as data: every kind reads, writes and makes its hook; plans bring theirs along; others can add kinds."""

import pytest
import torch

import auxin
from auxin.accounting import Ledger, StageRecord
from auxin.edits import PadParameter, Plan, SetConfig, ZeroFill, apply
from auxin.edits.diff import diff_plans
from auxin.edits.structure import config_values
from auxin.errors import ConfigError, PlanError
from auxin.methods.factorize.structured_ffn import GuideFade
from auxin.methods.grow.hypercloning import HyperCloning, plan_hypercloning
from auxin.methods.grow.llama_pro import BlockExpansion, plan_block_expansion
from auxin.methods.grow.masked import MaskedGrowth, MaskRamp, plan_masked
from auxin.methods.grow.tokenformer import OldTokenRates, TauAnneal, TokenGrowth, plan_token_growth
from auxin.methods.restructure.clipped_softmax import GammaRamp
from auxin.nn.clipped_softmax import ClippedSoftmax
from auxin.nn.guide import Guided
from auxin.nn.masked import Masked
from auxin.nn.pattention import Pattention
from auxin.planning.bench import Bench, from_model
from auxin.planning.hooks import HOOKS, ExactRates, HookContext, OldRates, TrainOnly, asked_by, hooks_of
from auxin.planning.lineage import old_shapes
from auxin.planning.method import Method, make_plan
from auxin.settings import Settings
from edits.models import tiny_model, trained, training_step
from plugins import install
from tiny_models import inputs, labels, tiny

KINDS = {
    "old_rates": ({"ratio": 0.25, "steps": 3}, OldRates),
    "exact_rates": ({}, ExactRates),
    "train_only": ({"paths": ["model.norm"]}, TrainOnly),
    "old_token_rates": ({"ratio": 0, "steps": 3}, OldTokenRates),
    "tau_anneal": ({"steps": 5}, TauAnneal),
    "mask_ramp": ({"steps": 5}, MaskRamp),
    "guide_fade": ({"steps": 5}, GuideFade),
    "gamma_ramp": ({"steps": 5}, GammaRamp),
}


def token_plan(**values):
    model = tiny_model()
    return model, plan_token_growth(model.config, TokenGrowth(ffn_tokens=30)).model_copy(update=values)


def test_every_kind_is_tried_here():
    assert {kind for kind, cls in HOOKS.all().items() if cls.__module__.startswith("auxin.")} == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_carries_its_hooks_through_a_file_and_makes_them(kind, tmp_path):
    values, cls = KINDS[kind]
    model, plan = token_plan(hooks=[{"kind": kind, **values}])
    plan.to_yaml(tmp_path / "plan.yaml")
    loaded = Plan.from_yaml(tmp_path / "plan.yaml")
    assert loaded == plan
    assert f"Hook in the training after: {kind}" in str(loaded)
    (hook,) = hooks_of(loaded, apply(loaded, model))
    assert type(hook) is cls
    for name, value in values.items():
        assert getattr(hook, name) == value


def test_hooks_know_what_was_there_before_the_plan():
    model, plan = token_plan(hooks=[{"kind": "old_rates", "ratio": 0}, {"kind": "old_token_rates", "ratio": 0}])
    before = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    everything, tokens = hooks_of(plan)
    assert everything.old_shapes == before
    assert tokens.old_counts == {slot: sum(model.config.group_sizes(slot)) for slot in ("qkv", "proj", "ffn")}


def test_hooks_come_in_the_order_in_which_they_are_written_but_for_those_that_regroup_the_optimizer():
    model, plan = token_plan(hooks=["tau", "old", "exact"])
    data = {"tau": {"kind": "tau_anneal", "steps": 2}, "old": {"kind": "old_rates", "ratio": 0}, "exact": "exact_rates"}
    plan = plan.model_copy(update={"hooks": [{"kind": "exact_rates"} if n == "exact" else data[n] for n in plan.hooks]})
    made = hooks_of(plan, apply(plan, model))
    assert [type(hook) for hook in made] == [ExactRates, TauAnneal, OldRates]


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            {"kind": "old_rate", "ratio": 0},
            "plan by tokenformer: hooks.0.kind: Unknown hook 'old_rate'. Did you mean 'old_",
        ),
        ({"kind": "old_rates", "ration": 0}, "hooks.0.ration: unknown field. Did you mean 'ratio'?"),
        ({"kind": "old_rates", "ratio": 2}, "hooks.0.ratio: must be 1 or less .received 2"),
        ({"kind": "old_rates", "ratio": 0, "steps": 0}, "hooks.0.steps: must be 1 or more .received 0"),
        ({"kind": "old_rates"}, "hooks.0.ratio: required"),
        ({"kind": "train_only", "paths": []}, "hooks.0.paths: must be a list of 1 or more .received 0"),
        ({"ratio": 0}, "hooks.0.kind: required"),
    ],
)
def test_wrong_data_names_the_plan_and_the_nearest_name(hook, message):
    _, plan = token_plan(hooks=[hook])
    with pytest.raises(ConfigError, match=message):
        hooks_of(plan)


def test_a_methods_wrong_hook_is_found_when_it_plans():
    class Nothing(Settings):
        pass

    method = Method(
        name="wrong",
        title="",
        paper="",
        intent="adapt",
        settings=Nothing,
        plan=from_model(lambda model, settings: token_plan(hooks=[{"kind": "old_rats", "ratio": 0}])[1]),
        examples=lambda model: {},
    )
    with pytest.raises(ConfigError, match="Did you mean 'old_rates'"):
        make_plan(method, Bench(tiny_model()), Nothing())


def test_exact_rates_need_the_receipt_of_one_change():
    model, plan = token_plan(hooks=[{"kind": "exact_rates"}])
    with pytest.raises(ConfigError, match=r"plan by tokenformer: hooks: exact_rates .* with its receipt"):
        hooks_of(plan)
    (hook,) = hooks_of(plan, receipt := apply(plan, model))
    assert hook.receipt == receipt


def test_old_entries_are_those_before_all_changes_since_the_last_training():
    model, first = token_plan()
    before = dict(old_shapes([first]))
    apply(first, model)
    second = plan_token_growth(model.config, TokenGrowth(ffn_tokens=40))
    changes = [
        StageRecord(name="c", kind="change", parameters=1, plan=p.model_dump(mode="json")) for p in (first, second)
    ]
    train = StageRecord(name="t", kind="train", parameters=1)
    settings = HOOKS.find("old_rates").parse({"kind": "old_rates", "ratio": 0})

    def old(*stages):
        return settings.made(HookContext("s", Ledger(stages=list(stages)))).old_shapes

    assert old(train, *changes) == before
    assert old(train, changes[0], train, changes[1]) == old_shapes([second]) != before
    # A second training after the changes still knows them.
    assert old(*changes, train) == before
    with pytest.raises(ConfigError, match=r"s: old_rates .*records no change"):
        old(train)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(method="m", promise="none", edits=[], hooks=[{"kind": "old_rates", "ratio": 0}]), "made_for"),
        (
            plan_hypercloning(tiny("llama"), HyperCloning(factor=2)).model_copy(
                update={"hooks": [{"kind": "old_rates", "ratio": 0}]}
            ),
            "hypercloning makes .* out of old entries and new ones alike.*old_rates",
        ),
    ],
)
def test_old_entries_that_can_t_be_told_are_refused(plan, message):
    with pytest.raises(PlanError, match=message):
        hooks_of(plan)


def test_what_a_plan_brings_works_in_a_loop_of_ones_own():
    """LLaMA Pro's plan freezes all but the new layers; its author's loop needs no word of the method."""
    model = tiny("llama")
    plan = plan_block_expansion(model, BlockExpansion(group_size=1, train_only_new=True))
    assert plan.hooks == [{"kind": "train_only", "paths": ["model.layers.1", "model.layers.3"]}]
    apply(plan, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hooks = hooks_of(plan)
    for hook in hooks:
        hook.attach(model, optimizer)
    for step in range(2):
        for hook in hooks:
            hook.before_step(step)
        optimizer.zero_grad()
        model(**inputs(model), labels=labels(model)).loss.backward()
        optimizer.step()
        for hook in hooks:
            hook.after_step(step)
    moved = {
        name.split(".")[2] for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert moved == {"1", "3"}


def test_masks_bring_their_ramp_only_where_it_is_asked_for():
    model = tiny("llama")
    assert plan_masked(model, MaskedGrowth(layers=3)).hooks == []
    plan = plan_masked(model, MaskedGrowth(layers=3, ramp_steps=7))
    (hook,) = hooks_of(plan)
    assert (type(hook), hook.steps) == (MaskRamp, 7)


def test_a_diff_of_plans_shows_their_hooks():
    _, plan = token_plan()
    other = plan.model_copy(update={"hooks": [{"kind": "tau_anneal", "steps": 2}]})
    assert diff_plans(plan, plan).fields == {}
    assert diff_plans(plan, other).fields == {"hooks": ([], [{"kind": "tau_anneal", "steps": 2}])}


def test_old_entries_stay_in_front_of_padded_ones():
    """A plan made by hand, frozen from what the plan itself says: padded rows move, the others do not."""
    model = tiny_model()
    optimizer = trained(model, lr=1e-2)
    ffn = sum(model.config.group_sizes("ffn"))
    tokens = [*model.config.group_sizes("ffn"), 6]
    pads = [
        PadParameter(parameter=f"model.layers.*.mlp.{name}", size=ffn + 6, fill=fill)
        for name, fill in (("key_tokens", {"kind": "normal"}), ("value_tokens", ZeroFill()))
    ]
    plan = Plan(
        method="by hand",
        promise="exact",
        edits=[SetConfig(values={"ffn_tokens": tokens}), *pads],
        hooks=[{"kind": "old_rates", "ratio": 0}],
        made_for=config_values(model.config),
    )
    apply(plan, model, optimizer)
    (hook,) = hooks_of(plan)
    hook.attach(model, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hook.before_step(0)
    training_step(model, optimizer, 50)
    hook.after_step(0)
    for name, parameter in model.named_parameters():
        old = ffn if ".mlp." in name else len(parameter)
        assert torch.equal(parameter[:old], before[name][:old]), name
    assert not torch.equal(model.model.layers[0].mlp.value_tokens[ffn:], torch.zeros(6, model.config.hidden_size))


PLUGIN = '''
from typing import Literal
from auxin.planning.hooks import HookSettings, TrainOnly

class HeadOnly(HookSettings):
    """Trains the head alone."""
    kind: Literal["head_only"]
    head: str = "lm_head"

    def made(self, context):
        return TrainOnly([self.head])
'''


def test_another_package_adds_a_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(HOOKS, "_own", dict(HOOKS.all()))
    plan = Plan(method="m", promise="none", edits=[], hooks=[{"kind": "head_only"}])
    with pytest.raises(ConfigError, match="Unknown hook 'head_only'"):
        asked_by(plan)
    install(tmp_path, monkeypatch, "auxin-head", PLUGIN, group="hooks", thing="HeadOnly")
    (hook,) = hooks_of(plan)
    assert hook.paths == ["lm_head"]


def test_old_entries_are_free_after_a_last_held_step_that_was_left_out() -> None:
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data.zero_()
    hook = OldRates(0.0, {"weight": (1, 2)}, steps=1)
    hook.attach(layer, torch.optim.SGD(layer.parameters()))
    hook.before_step(0)  # the guard leaves its update out, so that no after_step follows
    hook.before_step(1)
    with torch.no_grad():
        layer.weight += 1
        hook.after_step(1)
    assert layer.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def _masked():
    model = tiny("llama")
    apply(plan_masked(model, MaskedGrowth(layers=3)), model)
    return model, MaskRamp(3), lambda: [float(m.strengths().min()) for m in model.modules() if isinstance(m, Masked)]


def _guided():
    model = tiny("llama")
    apply(auxin.plan(model, "structured-ffn", guide="weight"), model)
    return model, GuideFade(3), lambda: [float(m.strength) for m in model.modules() if isinstance(m, Guided)]


def _annealed():
    model = tiny("tokenformer", qkv_tau=[2.0], proj_tau=[2.0], ffn_tau=[2.0])
    return model, TauAnneal(3), lambda: [float(m.tau[0]) for m in model.modules() if isinstance(m, Pattention)]


def _clipped():
    model = tiny("llama")
    apply(auxin.plan(model, "clipped-softmax", alpha=2, length=16, ramp_steps=3), model)
    return model, GammaRamp(3), lambda: [m.limits()[0] for m in model.modules() if isinstance(m, ClippedSoftmax)]


@pytest.mark.parametrize("made", [_masked, _guided, _annealed, _clipped])
def test_what_follows_from_the_step_alone_does_not_miss_an_update_that_was_left_out(made):
    model, hook, values = made()
    hook.attach(model, torch.optim.SGD(model.parameters()))
    first = values()
    hook.before_step(0)
    assert values() == first
    seen = []
    for step in range(3):
        hook.before_step(step)
        hook.after_step(step)
        seen.append(values())
    left_out = []
    for step in range(4):  # the guard leaves all of them out
        hook.before_step(step)
        left_out.append(values())
    assert left_out[1:] == seen
    assert first != seen[0] != seen[1] != seen[2]
