"""FinerCut takes what a search written out takes, reuses what it measured, and beats what it should."""

import random
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

import auxin
from auxin.analysis import cache as kept
from auxin.analysis import measure
from auxin.analysis.removal import Removal
from auxin.analysis.similarity import Similarity
from auxin.edits import ArrangeLayers, apply
from auxin.errors import ConfigError, PlanError
from auxin.methods.prune.finercut import FinerCut, plan_finercut
from auxin.methods.prune.shortgpt import ShortGPT, plan_shortgpt
from auxin.models.sublayers import sublayers
from auxin.objectives.calibration import Calibration
from auxin.planning.bench import Bench
from auxin.planning.removed_sublayers import without_sublayers
from byte_language import CONTEXT, byte_model, held_out_loss, library, train
from oracles import removal as oracle
from tiny_models import EPSILON, fresh_llama, inputs, tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / "cache"))


class Texts:
    """Calibration data that counts how often they are read."""

    def __init__(self, model: Any, ids: Tensor, batch_size: int = 2, labels: bool = False) -> None:
        self.ids, self.passes = ids, 0
        batches = [{"input_ids": part, "labels": part} if labels else part for part in ids.split(batch_size)]
        made = Calibration.of_batches(model, batches)
        self.calibration = replace(made, read=self._read)
        self._batches = made.read

    def _read(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        return self._batches()


def samples(model: Any, count: int = 4, seed: int = 1) -> Texts:
    return Texts(model, inputs(model, seed=seed, batch=count)["input_ids"])


def order(plan: Any) -> list[tuple[str, str]]:
    """What goes and what is said about it."""
    listed = plan.findings[1].removeprefix("Removed, in this order: ").removesuffix(".")
    return [tuple(item.removesuffix(")").split(" (")) for item in listed.split(", ")]


def planned(model: Any, data: Texts, **settings: Any) -> Any:
    return plan_finercut(Bench(model, data.calibration), FinerCut(**settings))


@pytest.mark.parametrize("distance", ["js", "kl", "angular", "norm", "perplexity"])
def test_it_takes_what_a_search_written_out_takes(distance):
    model = tiny("llama", num_hidden_layers=3)
    data = samples(model, 3)
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = oracle.greedy(w, data.ids.tolist(), 4, 2, EPSILON, layers=3, steps=3, name=distance)
    found = order(planned(model, data, removed=3, distance=distance))
    assert [path for path, _ in found] == [f"model.layers.{n}.{part}" for (n, part), _ in expected]
    for (_, said), (_, far) in zip(found, expected, strict=True):
        assert float(said.removeprefix(f"{distance} ")) == pytest.approx(far, rel=6e-3)  # three digits are shown


@pytest.mark.parametrize("samples_read", [1, 4])
def test_how_sure_the_distances_are_is_said_beside_them(samples_read):
    """Each is that of the removal that was measured at its step; of one sample nothing is known."""
    model = fresh_llama(0, num_hidden_layers=4)
    data = samples(model, samples_read)
    plan = planned(model, data, removed=2)
    (first, _), (second, _) = order(plan)
    margins = []
    for gone, path in (([], first), ([first], second)):
        found = measure(Removal(distances=["js"], removed=gone), model, data.calibration)
        margins += [one.distances["js"].margin for one in found.effects if one.path == path]
    told = [line for line in plan.findings if "margins (95 %)" in line]
    if samples_read == 1:
        assert margins == [None, None]
        assert not told
        return
    assert told == [
        f"Over the samples these numbers have margins (95 %) of {', '.join(f'± {m:.2g}' for m in margins)}."
    ]
    influence = plan_shortgpt(Bench(model, data.calibration), ShortGPT(removed=1)).findings[2]
    layers = measure(Similarity(parts=False), model, data.calibration).stacks[0].layers
    assert f"of ± {min(layers, key=lambda layer: layer.influence).similarity.margin:.2g}." in influence


def test_a_part_that_is_named_after_its_last_matrix_is_said_to_be_what_it_is():
    model = tiny("bert", dtype=torch.float32)
    data = Texts(model, inputs(model, batch=2)["input_ids"], labels=True)
    kinds = {one.path: one.kind for one in sublayers(model)}
    found = order(planned(model, data, removed=2))
    assert [said.partition(": ")[0] for _, said in found] == [kinds[path] for path, _ in found]


def test_more_begins_with_less_and_is_measured_on_top_of_it():
    model = fresh_llama(0, num_hidden_layers=4)
    data = samples(model)
    less = order(planned(model, data, removed=2))
    assert data.passes == 2
    more = order(planned(model, data, removed=4))
    assert data.passes == 4, "the first two steps were measured before"
    assert more[:2] == less
    assert data.passes == len(list(kept.default_cache().glob("removal-*.json")))


def test_a_search_costs_the_same_however_much_of_it_is_known(tmp_path, monkeypatch):
    model = fresh_llama(0, num_hidden_layers=4)
    ids = list(inputs(model, batch=4)["input_ids"].split(2))

    def cost(cache: str, removed: int) -> Any:
        monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / cache))
        found = auxin.plan(model, "finercut", removed=removed, data=ids).cost
        return found.samples, found.units, found.flops, found.data

    cold = cost("cold", 2)
    assert cold[:2] == (2 * 4, 2 * 4 * 7)
    first = cost("half", 1)
    assert first[:2] == (4, 4 * 7)
    assert cost("half", 2) == cold, "its first step is known"
    assert cost("half", 1) == first, "all of it is known"


def test_one_shot_is_the_list_of_single_effects():
    model = tiny("llama", num_hidden_layers=4)
    data = samples(model)
    found = order(planned(model, data, removed=4, one_shot=True))
    assert data.passes == 1
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    gates = [(number, part) for number in range(4) for part in ("self_attn", "mlp")]

    def far(gate: Any) -> float:
        """The divergence that one removal alone leads to."""
        texts = data.ids.tolist()
        pairs = [[oracle.llama(w, ids, 4, 2, EPSILON, 4, closed) for closed in (set(), {gate})] for ids in texts]
        return statistics.mean(oracle.distances(*pair, ids)["js"] for pair, ids in zip(pairs, texts, strict=True))

    alone = {f"model.layers.{number}.{part}": far((number, part)) for number, part in gates}
    assert [path for path, _ in found] == sorted(alone, key=lambda path: alone[path])[:4]
    for path, said in found:
        assert float(said.removeprefix("js ")) == pytest.approx(alone[path], rel=6e-3)
    # Step by step another one goes, or is told to lead to another distance.
    assert order(planned(model, data, removed=4)) != found


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_runs_layers_from_the_one_that_differs_on(steps):
    """Of N sublayers, N - k are left to try when k are gone: that many runs of the last layer a step, beside the whole
    model's and, where some are gone, that without them; of a layer below as many as candidates lie in it and before."""
    layers, per_layer, batches = 5, 2, 2
    model = fresh_llama(2, num_hidden_layers=layers)
    runs: Counter[int] = Counter()

    def count(number: int, output: Tensor) -> None:
        """But for runs on shapes, which cost nothing."""
        runs[number] += type(output) is Tensor and not output.is_meta

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *given, number=number: count(number, given[-1]))
    gone = [path for path, _ in order(planned(model, samples(model, 2 * batches), removed=steps))]
    total = layers * per_layer
    for number in range(layers):
        expected = 0
        for step in range(steps):
            left = {f"model.layers.{n}.{part}" for n in range(number + 1) for part in ("self_attn", "mlp")}
            expected += 1 + (step > 0) + len(left - set(gone[:step]))
        assert runs[number] == batches * expected
    assert runs[layers - 1] == batches * (sum(total - k for k in range(steps)) + 2 * steps - 1)


def test_planted_parts_go_first():
    model = fresh_llama(1, num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    paths = [path for path, _ in order(planned(model, samples(model), removed=2))]
    assert paths == ["model.layers.2.self_attn", "model.layers.0.mlp"]


def test_lower_layers_can_be_spared_at_first():
    model = fresh_llama(1, num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    data = samples(model)
    assert order(planned(model, data, removed=1))[0][0] == "model.layers.0.mlp"
    spared = [path for path, _ in order(planned(model, data, removed=5, spared=0.25))]
    # Two of eight candidates stay until more than two others are gone.
    assert all(not path.startswith("model.layers.0.") for path in spared[:3])
    assert "model.layers.0.mlp" in spared[3:]


@pytest.mark.parametrize("candidates", ["attention", "feed-forward", "layers"])
def test_only_what_may_go_goes(candidates):
    model = fresh_llama(2, num_hidden_layers=3)
    plan = planned(model, samples(model), removed=2, candidates=candidates)
    kinds = {one.path: one.kind for one in sublayers(model)}
    assert {kinds.get(path, "layers") for path, _ in order(plan)} == {candidates}
    before = model.num_parameters()
    apply(plan, model)
    assert model.num_parameters() < before
    if candidates == "layers":
        assert [type(edit) for edit in plan.edits] == [ArrangeLayers]
        assert model.config.num_hidden_layers == 1


def test_another_sample_may_lead_elsewhere():
    """A search that did not look at its data would find the same for any."""
    model = fresh_llama(0, num_hidden_layers=4, initializer_range=0.5)
    assert len({str(order(planned(model, samples(model, seed=seed), removed=3))) for seed in range(3)}) > 1


def test_the_target_is_met_by_the_last_step_alone():
    model = fresh_llama(0, num_hidden_layers=4)
    data = samples(model)
    plan = planned(model, data, target={"parameters": 0.7})
    limit = 0.7 * model.num_parameters()
    longer = order(plan)
    smaller = fresh_llama(0, num_hidden_layers=4)
    apply(plan, smaller)
    assert smaller.num_parameters() <= limit
    larger = fresh_llama(0, num_hidden_layers=4)
    apply(planned(model, data, removed=len(longer) - 1), larger)
    assert larger.num_parameters() > limit
    assert f"{model.num_parameters():,} -> {smaller.num_parameters():,}" in plan.findings[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"removed": 8}, "removed = 8 of 8 candidates is 8, and one of each stack of layers stays. Ask for 1 to 7"),
        ({"removed": 5, "spared": 0.5}, "is 5, and 4 are spared until more than 4 others are gone. Ask for 1 to 4, or"),
        ({"removed": 0.9, "spared": 0.6}, "is 7, and 4 are spared until more than 4 others are gone. Ask for 1 to 4"),
        ({"target": {"parameters": 0.4}, "spared": 0.75}, "with all gone that can go"),
        ({"removed": 0.1}, "of 8 candidates is 0"),
        ({"target": {"parameters": 0.01}}, "with all gone that can go"),
        ({"target": {"parameters": 10**9}}, "nothing has to go"),
    ],
)
def test_impossible_amounts_are_refused_before_any_pass(settings, words):
    model = fresh_llama(0, num_hidden_layers=4)
    data = samples(model)
    with pytest.raises(PlanError, match=words):
        planned(model, data, **settings)
    assert data.passes == 0


@examples(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    spared=st.integers(0, 99).map(lambda percent: percent / 100),
    seed=st.integers(0, 99),
)
def test_what_is_allowed_is_what_a_search_reaches(counts, spared, seed):
    """The paper's rule, step by step: the first floor(N x) wait until floor(N x) + 1 are gone."""
    offered = {f"{stack}.{number}": str(stack) for stack, count in enumerate(counts) for number in range(count)}
    order = list(offered)
    first = order[: floor(len(order) * Fraction(str(spared)))]
    draw, gone = random.Random(seed), []
    while True:
        waiting = first if len(gone) < len(first) + 1 else []
        left = Counter(offered[path] for path in order if path not in gone)
        free = [p for p in order if p not in gone and p not in waiting and left[offered[p]] > 1]
        if not free:
            break
        gone.append(draw.choice(free))
    settings = FinerCut(removed=1, spared=spared)
    assert len(settings.most(offered)) == len(gone)
    for removed in range(1, len(order) + 1):
        asked = FinerCut(removed=removed, spared=spared)
        if removed <= len(gone):
            assert asked.count(offered) == removed
        else:
            with pytest.raises(PlanError):
                asked.count(offered)


@pytest.mark.parametrize("offered", range(2, 14))
def test_the_smallest_share_that_is_named_is_one(offered):
    parts = {f"layers.{number}": "layers" for number in range(offered)}
    with pytest.raises(PlanError, match="is 0") as refused:
        FinerCut(removed=0.01).count(parts)
    share = float(str(refused.value).rpartition("share from ")[2].removesuffix(" on."))
    assert FinerCut(removed=share).count(parts) == 1


def test_each_stack_keeps_a_part():
    model = tiny("t5", dtype=torch.float32)
    data = Texts(model, inputs(model, batch=2)["input_ids"], labels=True)
    with pytest.raises(PlanError, match=r"one of each stack of layers stays\. Ask for 1 to (\d+)") as refused:
        planned(model, data, removed=8)
    most = int(str(refused.value).rpartition("Ask for 1 to ")[2].partition(",")[0])
    assert data.passes == 0
    assert len(order(planned(model, data, removed=most, one_shot=True))) == most


def test_a_part_that_layers_share_is_refused_by_its_names():
    model = fresh_llama(0, num_hidden_layers=4)
    model.model.layers[3].mlp = model.model.layers[1].mlp
    data = samples(model)
    with pytest.raises(
        PlanError, match=r"layers\.1\.mlp.* and model\.layers\.3\.mlp.* are one module.*Give each layer"
    ):
        planned(model, data, removed=1)
    with pytest.raises(PlanError, match="are one module"):
        without_sublayers(model, ["model.layers.1.mlp"])
    assert data.passes == 0


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        (plan_finercut, FinerCut(removed=1)),
        (plan_finercut, FinerCut(removed=1, candidates="attention")),
        (plan_finercut, FinerCut(removed=1, candidates="layers")),
        (plan_finercut, FinerCut(target={"parameters": 0.9})),
        (plan_shortgpt, ShortGPT(removed=1)),
        (plan_shortgpt, ShortGPT(target={"parameters": 0.9})),
    ],
)
def test_layers_that_are_run_again_are_named_and_what_to_do_instead_is_done(plan, settings, groups, tmp_path):
    model = tiny("albert", num_hidden_layers=6, num_hidden_groups=groups)
    data = Texts(model, inputs(model, batch=4)["input_ids"], labels=True)
    with pytest.raises(
        PlanError, match=r"^The layers of albert\.\S+ share their parameters.* by taylor, or .* by greenformers\.$"
    ):
        plan(Bench(model, data.calibration), settings)
    assert data.passes == 0
    for method, instead in (("taylor", {"ffn": 0.5}), ("greenformers", {"rank": 0.5})):
        assert auxin.plan(model, method, **instead, data=data.calibration, folder=tmp_path).edits


def test_nothing_to_go_is_said_with_what_the_method_knows_whatever_was_asked():
    """ShortGPT has no candidates to choose from."""
    model = fresh_llama(0, num_hidden_layers=1)
    data = samples(model)
    for asked in ({"removed": 1}, {"target": {"parameters": 0.9}}):
        with pytest.raises(PlanError, match=r"no two layers of which one could go\. Take parts of layers, by finercut"):
            plan_shortgpt(Bench(model, data.calibration), ShortGPT.parse(asked))
        with pytest.raises(PlanError, match="Choose other candidates"):
            planned(model, data, candidates="layers", **asked)
    assert data.passes == 0
    assert planned(model, data, removed=1).edits


@pytest.mark.parametrize("values", [{}, {"removed": 1, "target": {"parameters": 0.5}}, {"removed": 1.5}])
def test_settings_that_say_nothing_or_twice_are_refused(values):
    with pytest.raises(ConfigError):
        FinerCut.parse(values)


def test_shortgpt_leaves_out_the_layer_that_turns_the_stream_least():
    model = fresh_llama(1, num_hidden_layers=4)
    with torch.no_grad():
        for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            part.weight.mul_(1e-3)
    plan = plan_shortgpt(Bench(model, samples(model).calibration), ShortGPT(removed=1))
    assert [edit.order for edit in plan.edits if isinstance(edit, ArrangeLayers)] == [[0, 1, 3]]
    assert order(plan)[0][0] == "model.layers.2"


def test_from_python_and_the_face():
    model = tiny("llama", dtype=torch.float32)
    plan = auxin.plan(model, "finercut", removed=0.5, data=[inputs(model, batch=3)])
    assert plan.cost is not None
    assert plan.cost.samples == 2 * 3
    auxin.apply(plan, model)
    assert len(sublayers(model)) == 2


def test_greedy_beats_random_and_does_no_worse_than_layers_or_one_shot():
    learnt, held_out = library("argparse", "ast", "datetime", "difflib", "doctest", "inspect"), library("typing")
    model = byte_model(seed=0, num_hidden_layers=6)
    train(model, learnt, 200)
    starts = torch.arange(16) * 1000
    ids = learnt[starts[:, None] + torch.arange(CONTEXT)]
    data = Texts(model, ids, batch_size=16)

    def loss(plan: Any) -> float:
        pruned = byte_model(seed=0, num_hidden_layers=6)
        pruned.load_state_dict(model.state_dict())
        apply(plan, pruned)
        return held_out_loss(pruned, held_out)

    greedy = loss(planned(model, data, removed=4))
    one_shot = loss(planned(model, data, removed=4, one_shot=True))
    layers = loss(planned(model, data, removed=2, candidates="layers"))
    paths = [one.path for one in sublayers(model)]
    plan = planned(model, data, removed=4)
    drawn = []
    for seed in range(10):
        chosen = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:4]
        edits = without_sublayers(model, [paths[n] for n in chosen])
        drawn.append(loss(plan.model_copy(update={"edits": edits})))
    dense = held_out_loss(model, held_out)
    print({"dense": dense, "greedy": greedy, "one shot": one_shot, "layers": layers, "random": sorted(drawn)})
    assert greedy < min(drawn)
    assert greedy < statistics.median(drawn) - 0.05
    # The search goes by the calibration samples; what is held out may see the hundredth otherwise.
    assert greedy <= layers + 0.01
    assert greedy <= one_shot + 0.01
