"""A model's latency from a table of its parts: by a clock that only counts bytes it is what the bytes say, and by the
real one it falls."""

import copy
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import auxin
from auxin.accounting import latency
from auxin.accounting.latency import Conditions
from auxin.edits import ArrangeLayers, SetConfig
from auxin.edits.structure import skeleton_of
from auxin.errors import ConfigError, PlanError
from auxin.models.weights_of_no_meaning import Memory
from auxin.planning.cutting import cut, narrowest_scopes
from auxin.planning.latency import MILLISECONDS, Curve, LatencyTable, rising
from auxin.planning.removed_sublayers import without_sublayers
from auxin.planning.target import Gauge, Target, least_removal, removal
from auxin.planning.timed_parts import TimedParts
from capabilities import built_in
from tiny_models import inputs, tiny

SECONDS_PER_BYTE = 1e-6


class ByBytes:
    """Takes as long for a part as its parameters have bytes, and notes how often it is asked."""

    def __init__(self):
        self.timed = []

    def __call__(self, parts):
        self.timed.append([part.signature for part in parts])
        return [SECONDS_PER_BYTE * part.bytes for part in parts]


def conditions(length=4, phase="forward"):
    return Conditions.here(phase, 1, length, torch.float32, "cpu")


def table(model, seconds=None):
    return LatencyTable(model, conditions(), seconds or ByBytes())


def by_bytes(model):
    """The oracle: all parameters, tied ones once."""
    return MILLISECONDS * SECONDS_PER_BYTE * sum(p.nbytes for p in model.parameters())


def predicted(found, edits, model):
    done = removal(model, edits)
    return found.predicted(done.after, done.modules), by_bytes(done.after)


@pytest.fixture(autouse=True)
def quick_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("AUXIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "PATIENCE", 0.02)


@pytest.fixture
def clock(monkeypatch):
    """The one that counts bytes, wherever parts are timed."""
    found = ByBytes()
    monkeypatch.setattr(LatencyTable, "_by_stopwatch", lambda self, parts: found(parts))
    return found


# The algebra ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=12))
def test_rising_numbers_are_the_nearest_ones(values):
    """Isotonic regression is told by its conditions: it never falls, keeps sums of pools, and each pool's beginnings
    lie no lower on the average than the pool."""
    found = rising(values)
    assert found == sorted(found)
    assert sum(found) == pytest.approx(sum(values))
    for value in set(found):
        pool = [given for given, one in zip(values, found, strict=True) if one == value]
        for length in range(1, len(pool)):
            assert sum(pool[:length]) / length >= value - 1e-9
    if values == sorted(values):
        assert found == pytest.approx(values)


@given(
    st.dictionaries(st.integers(1, 100), st.floats(0.001, 10.0), min_size=1, max_size=9),
    st.integers(0, 110),
    st.integers(0, 110),
)
def test_less_is_never_slower_whatever_was_measured(measured, one, other):
    curve = Curve.through(measured)
    less, more = sorted((one, other))
    assert curve.share(less) <= curve.share(more) + 1e-12
    assert 0 < curve.share(less) <= 1
    assert curve.share(max(measured)) == 1


# The table, by bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "stream"),
    [
        ("llama", "query"),
        ("llama", "ffn"),
        ("gemma2", "query"),
        ("bert", "ffn"),
        ("gpt2", "ffn"),
        ("t5", "query"),
        ("t5", "ffn"),
        ("deepseek_v3", "expert_ffn"),
    ],
)
def test_narrower_layers_take_what_their_bytes_say(family, stream):
    """What a layer has falls evenly with its units, so that the curves must say exactly that; each layer another."""
    model = tiny(family, dtype=torch.float32)
    found = table(model)
    assert found.whole == pytest.approx(by_bytes(skeleton_of(model)))
    body = found._body
    keep = {}
    for number, scope in enumerate(narrowest_scopes(body, stream)):
        units = body.sizes.units(stream, scope)
        groups = body.sizes.at(scope).key_value_heads if stream == "query" else units
        step = units // groups if groups > 1 else 1
        left = range(step * max(1, units // step - 1 - number % 2))
        if len(left) < units:
            keep[stream, scope] = left
    told, true = predicted(found, cut(model, keep).edits, model)
    assert told == pytest.approx(true)
    assert told < found.whole
    assert any(" by " in row for row in found.rows())


def test_losses_of_heads_and_feed_forward_units_add_up():
    model = tiny("llama", dtype=torch.float32)
    clock = ByBytes()
    found = table(model, clock)
    keep = {("query", ""): range(2), ("ffn", ""): range(5)}
    told, true = predicted(found, cut(model, keep).edits, model)
    assert told == pytest.approx(true)
    timed = len(clock.timed)
    # No size is timed that was not timed before.
    keep = {("query", "model.layers.1"): range(2), ("ffn", ""): range(7), ("ffn", "model.layers.1"): range(3)}
    told, true = predicted(found, cut(model, keep).edits, model)
    assert told == pytest.approx(true)
    assert len(clock.timed) == timed
    assert len(clock.timed) == 3  # the whole model's parts, two curves


def test_units_of_the_residual_leave_less_of_everything():
    model = tiny("qwen3", dtype=torch.float32, num_hidden_layers=3)
    found = table(model)
    last = found.whole
    for units in (14, 12, 8, 4):
        told, true = predicted(found, cut(model, {("residual", ""): range(units)}).edits, model)
        assert told < last
        assert told == pytest.approx(true, rel=0.02)
        last = told


def test_what_no_unit_takes_is_not_made_less_by_the_residual():
    """Where a layer takes a fixed time and one for each entry of its matrices, that is what is told."""
    model = tiny("qwen3", dtype=torch.float32, num_hidden_layers=2)
    fixed = 0.01

    def seconds(parts):
        return [
            SECONDS_PER_BYTE * part.bytes + fixed * part.signature.startswith("Qwen3DecoderLayer") for part in parts
        ]

    found = table(model, seconds)
    keep = {("residual", ""): range(8), ("ffn", ""): range(3), ("query", ""): range(2)}
    done = removal(model, cut(model, keep).edits)
    told = found.predicted(done.after, done.modules)
    assert told == pytest.approx(by_bytes(done.after) + 2 * MILLISECONDS * fixed, rel=0.01)


def test_heads_that_go_with_the_residual_are_in_its_curve():
    model = tiny("gpt2", dtype=torch.float32)
    found = table(model)
    keep = {("residual", ""): range(8), ("query", ""): range(2)}
    told, true = predicted(found, cut(model, keep).edits, model)
    assert told == pytest.approx(true)


def test_layers_and_parts_that_go_take_their_time_with_them():
    model = tiny("llama", dtype=torch.float32, num_hidden_layers=4)
    clock = ByBytes()
    found = table(model, clock)
    told, true = predicted(found, [ArrangeLayers(layers="model.layers", order=[0, 3])], model)
    assert told == pytest.approx(true)
    assert len(clock.timed) == 1
    told, true = predicted(found, without_sublayers(model, ["model.layers.1.mlp", "model.layers.3.self_attn"]), model)
    assert told == pytest.approx(true)
    assert len(clock.timed) == 3  # a layer of each kind that was not there before
    told, _ = predicted(found, without_sublayers(model, ["model.layers.2.mlp"]), model)
    assert len(clock.timed) == 3
    assert told < found.whole


def test_layers_of_several_kinds_have_curves_of_their_own():
    model = tiny("deepseek_v3", dtype=torch.float32)
    found = table(model)
    told, true = predicted(found, cut(model, {("ffn", "model.layers.0"): range(2)}).edits, model)
    assert told == pytest.approx(true)
    assert len([row for row in found.rows() if row.startswith("model.layers.")]) == 3


def test_what_is_no_width_is_timed_by_itself_and_is_no_slower():
    """More experts per token leave every shape as it is."""
    model = tiny("mixtral", dtype=torch.float32)
    clock = ByBytes()
    found = table(model, clock)
    told, _ = predicted(found, [SetConfig(values={"num_experts_per_tok": 1})], model)
    assert told == found.whole
    assert len(clock.timed) == 2  # the layer was timed again


@pytest.mark.parametrize(("share", "alone"), [(0.84, False), (0.86, True)])
def test_a_latency_that_the_prediction_alone_meets_is_told_so(clock, monkeypatch, share, alone):
    model = tiny("llama", dtype=torch.float32)
    monkeypatch.setattr(LatencyTable, "measured", lambda table, after: (10.0, 10.0 * share))
    for target in (Target(latency=0.85, sequence_length=4), Target(latency_ms=8.5, sequence_length=4)):
        told = Gauge(target, model).latency(removal(model, cut(model, {("ffn", ""): range(6)}).edits))
        assert told.endswith("so that the prediction alone meets it") == alone


# Targets ----------------------------------------------------------------------------------------------------


def test_the_least_removal_meets_a_latency(clock):
    model = tiny("llama", dtype=torch.float32)

    def family(amount):
        return cut(model, {("ffn", ""): range(12 - amount)}).edits

    have = by_bytes(skeleton_of(model))
    for target in (Target(latency=0.85, sequence_length=4), Target(latency_ms=0.85 * have, sequence_length=4)):
        found = least_removal(Gauge(target, model), family, 11)
        assert by_bytes(found.after) <= 0.85 * have < by_bytes(removal(model, family(found.amount - 1)).after)
        told = found.reached(target)
        assert f"latency as predicted {have:.4g} -> " in told
        assert "as measured" in told
        figures = found.findings(target)[1]
        assert figures.startswith("Latency of a forward pass over 4 tokens on ")
        assert "model.layers.0 and 1 like it" in figures
        assert "by intermediate_size" in figures
    with pytest.raises(PlanError, match=r"the smallest .* can reach here is [\d.]+ ms \(0\.\d+\)"):
        least_removal(Gauge(Target(latency=0.01, sequence_length=4), model), family, 11)
    with pytest.raises(PlanError, match=r"has [\d.]+ ms already"):
        least_removal(Gauge(Target(latency_ms=2 * have, sequence_length=4), model), family, 11)


PRUNING = {name: method for name, method in built_in().items() if method.intent == "prune"}
NO_LATENCY = {
    "axformer": "axformer takes no size: it removes what lowers the loss",
    "expert-dropping": "as much computation. Give target.parameters or target.memory",
    "vocabulary-pruning": "costs no computation. Give target.parameters",
}
"""Methods to which a time says nothing, with the reason."""


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((name, {"steps": 2} if name == "vtrans" else {}) for name in sorted(PRUNING.keys() - NO_LATENCY)),
        ("magnitude", {"uniform": False}),
        ("wanda-structured", {"streams": ["ffn"]}),
        ("random", {"streams": ["hidden"]}),
        ("finercut", {"candidates": "layers"}),
    ],
)
def test_every_pruning_method_takes_a_latency(method, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny("llama", num_hidden_layers=3, dtype=torch.float32)
    target = {"latency": 0.8, "sequence_length": 4}
    data = {} if PRUNING[method].calibration is None else {"data": [inputs(model)["input_ids"]]}
    plan = auxin.plan(model, method, target=target, **data, **settings)
    assert "asked for: target.latency = 0.8 at 4 tokens" in plan.findings[0]
    assert any(line.startswith("Latency of a forward pass") for line in plan.findings)
    before = by_bytes(skeleton_of(model))
    auxin.apply(plan, model)
    assert by_bytes(skeleton_of(model)) <= 0.82 * before


@pytest.mark.parametrize(("method", "reason"), NO_LATENCY.items())
def test_methods_to_which_a_time_says_nothing_refuse_it_with_the_reason(method, reason):
    others = {"corpus": "stdlib"} if method == "vocabulary-pruning" else {}
    with pytest.raises(ConfigError, match=re.escape(reason)):
        PRUNING[method].settings.parse({"target": {"latency": 0.8}, **others})


def test_the_size_is_told_to_be_no_smaller_where_the_model_is_as_it_was(clock):
    model = tiny("gpt2", dtype=torch.float32)
    gauge = Gauge(Target(latency=0.5, sequence_length=4), model)
    assert gauge.of(removal(model, [])) == gauge.have == Target(latency=0.5, sequence_length=4).of(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latency": 1.5}, "latency = 1.5 is no share below 1. A time is given as latency_ms"),
        ({"latency": 1}, "no share below 1"),
        ({"latency": 0}, "latency"),
        ({"latency_ms": -1}, "latency_ms"),
        ({"latency": 0.5, "latency_ms": 3}, "not latency and latency_ms"),
        ({"flops": 0.5, "phase": "decoding"}, "phase says how latency is measured"),
        ({"parameters": 0.5, "batch_size": 2}, "batch_size says for how many sequences memory is counted"),
        ({"latency": 0.5, "phase": "training"}, "phase"),
        ({"latency": 0.5, "batch_size": 0}, "batch_size"),
        ({"latency": 0.5, "device": "tpu"}, "device"),
    ],
)
def test_a_latency_that_says_nothing_clear_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Target.parse(values)


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("bert", {"phase": "decoding"}, "BertForMaskedLM is no decoder of text alone. Give phase: forward"),
        ("t5", {"phase": "decoding"}, "no decoder of text alone"),
        ("llama", {"sequence_length": 33}, "positions for 32 tokens. Give at most 32"),
        ("llama", {"sequence_length": 32, "phase": "decoding"}, "the new one among them. Give at most 31"),
    ],
)
def test_what_cant_be_run_so_is_refused_before_anything_is_timed(clock, family, target, message):
    with pytest.raises(PlanError, match=message):
        auxin.plan(tiny(family), "random", target={"latency": 0.5, **target})
    assert not clock.timed


def test_a_model_whose_code_breaks_is_refused_with_the_reason(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, hidden: hidden @ hidden.mT @ hidden)
    auxin.plan(model, "random", ffn=0.5)  # shapes are those of the parameters

    def broken(self, hidden):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", broken)
    with pytest.raises(PlanError, match=r"no such kernel.*Give the target in parameters or flops"):
        auxin.plan(model, "random", target={"latency": 0.5, "sequence_length": 4}, streams=["ffn"])


# The real clock ----------------------------------------------------------------------------------------------------


def test_a_latency_is_met_by_the_real_clock_and_told_again_from_the_cache():
    """By the table's own figures, which is what a plan promises; the machine may be busy."""
    wide = {"hidden_size": 128, "intermediate_size": 4096, "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = tiny("llama", dtype=torch.float32, **wide)
    target = Target(latency=0.7, sequence_length=64, device="cpu")
    table = target.table(model)
    shares = [
        table.predicted(done.after, done.modules) / table.whole
        for done in (removal(model, cut(model, {("ffn", ""): range(units)}).edits) for units in (4000, 2048, 2000, 16))
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] <= 1
    assert shares[-1] < 0.7  # a small part of the work
    settings = {"target": target.model_dump(exclude_none=True), "streams": ["ffn"]}
    plan = auxin.plan(model, "random", **settings)
    assert auxin.plan(model, "random", **settings) == plan


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("random", {"ffn": 0.05}),
        ("random", {"ffn": 0.05, "uniform": False}),
        ("finercut", {"removed": 3, "candidates": "feed-forward"}),
        ("shortgpt", {"removed": 3}),
    ],
)
def test_parameters_flops_memory_and_time_by_the_clock_go_with_what_goes(method, settings):
    """Nearly all of each here, so that a busy machine does not matter."""
    wide = {"hidden_size": 64, "intermediate_size": 4096, "num_hidden_layers": 4, "max_position_embeddings": 64}
    model = tiny("llama", dtype=torch.float32, **wide)
    smaller = copy.deepcopy(model)
    data = {} if method == "random" else {"data": [inputs(model)["input_ids"]]}
    auxin.apply(auxin.plan(model, method, **data, **settings), smaller)
    for asked in ({"parameters": 0.5}, {"flops": 0.5}, {"memory": 0.5}):
        target = Target(**asked, **({} if "parameters" in asked else {"sequence_length": 64}))
        assert target.of(smaller) < 0.5 * target.of(model)
    table = Target(latency=0.5, sequence_length=64, device="cpu").table(model)
    before, after = table.measured(skeleton_of(smaller))
    assert after < 0.7 * before


@pytest.mark.parametrize("phase", ["forward", "decoding"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen2_moe"])
def test_parts_run_by_themselves_as_they_do_in_the_model(family, phase):
    """A layer is called with what the model calls it with: of the same shapes, the same cache, the same mask."""
    model = skeleton_of(tiny(family))
    parts, memory = TimedParts(model, Conditions.here(phase, 1, 6, torch.float64, "cpu")), Memory(torch.device("cpu"))
    whole = copy.deepcopy(parts.model).eval()
    memory.fill([whole])
    seen = {}
    for number, path in enumerate(parts.layers):
        whole.get_submodule(path).register_forward_pre_hook(partial(note, seen, number, path), with_kwargs=True)
    with torch.no_grad():
        whole(**parts._inputs(shared=False))
    for number, path in enumerate(parts.layers):
        assert form(parts._call(path, memory), number) == seen[path]
        run = parts.layer(path).run(memory)
        run.prepare()()
        run.prepare()()  # what a call leaves in the cache is not there for the next one
    for part in (parts.frame, parts.whole):
        part.run(memory).prepare()()


def note(seen, number, path, module, args, kwargs):
    seen[path] = form((args, kwargs), number)


def form(call, number):
    """Shapes of what the layer of this number is given, of a cache what it holds for that layer."""
    args, kwargs = call
    told = {}
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        values = value.layers[number].keys if hasattr(value, "layers") else value
        values = values if isinstance(values, list | tuple) else [values]
        told[name] = [list(one.shape) if isinstance(one, torch.Tensor) else type(one).__name__ for one in values]
    return told


def test_weights_of_no_meaning_share_memory_and_keep_ties():
    model = skeleton_of(tiny("llama", tie_word_embeddings=True))
    memory = Memory(torch.device("cpu"))
    one, other, again = (copy.deepcopy(model) for _ in range(3))
    memory.fill([one, other])
    memory.fill([again])
    assert one.lm_head.weight is one.model.embed_tokens.weight
    spans = [sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in m.parameters()) for m in (one, other, again)]
    assert spans[0] == spans[2]
    assert all(before[1] <= after[0] for before, after in zip(spans[0], spans[0][1:], strict=False))
    assert spans[0][-1][1] <= spans[1][0][0]
    assert not any(t.is_meta for t in one.state_dict().values())
