"""Every condition under which a wider model computes the same, and that outside of it it does not."""

import math

import pytest

from auxin.edits import CentreParameter, Plan, ScaleParameter, SetConfig, SliceParameter, apply
from auxin.edits.structure import config_values
from auxin.errors import PlanError
from auxin.methods.grow.hypercloning import METHOD as HYPERCLONING
from auxin.methods.grow.lemon import METHOD as LEMON
from auxin.methods.grow.net2net import METHOD as NET2NET
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from auxin.planning.depth import identity_order
from auxin.planning.width import widen
from auxin.planning.width_maps import StreamMap, Widening, circular, feed_forward_maps, head_maps, padded
from auxin.planning.width_targets import WidthTargets
from tiny_models import FAMILIES, change, inputs, logits, tiny

EXACT = 1e-12
TIED = ("llama", "qwen2", "qwen3", "olmo2", "gpt_neox", "tokenformer", "gpt2", "bert")
PRE_NORM = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "t5", "vit")


def hidden(model):
    return anatomy(model).sizes.residual


def run(model, plan, keep=lambda edit: edit):
    """How far the logits move when the plan's edits, each as `keep` leaves it, are applied, whatever it promises."""
    edits = [kept for edit in plan.edits if (kept := keep(edit)) is not None]
    changed = Plan(method=plan.method, promise="none", seed=plan.seed, edits=edits, made_for=plan.made_for)
    before = logits(model)
    apply(changed, model, probe=inputs(model))
    return change(before, logits(model))


def by(method, model, **settings):
    return method.plan(Bench(model), method.settings.parse(settings))


def widened(model, approximate=False, **maps):
    """A plan of maps; what is not given stays."""
    body = anatomy(model)
    sizes = body.sizes
    keep = {
        "residual": circular(sizes.residual, sizes.residual),
        "query": circular(sizes.query_heads, sizes.query_heads),
        "key_value": circular(sizes.key_value_heads, sizes.key_value_heads),
        "feed_forward": feed_forward_maps(sizes, sizes, circular),
        "head_dim": sizes.head_dim,
    }
    result = widen(body, Widening(**{**keep, **maps}), approximate)
    return Plan(method="maps", promise=result.promise, edits=result.edits, made_for=config_values(model.config))


@pytest.mark.parametrize(("factor", "variant"), [(3, "symmetric"), (2, "noisy"), (2, "diagonal")])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_copies_are_exact(family, factor, variant):
    model = tiny(family)
    plan = by(HYPERCLONING, model, factor=factor, variant=variant)
    assert plan.promise == "exact"
    assert run(model, plan) < EXACT


@pytest.mark.parametrize("family", TIED)
def test_equal_copies_are_exact_the_other_way_tied(family):
    model = tiny(family, tie_word_embeddings=family not in ("gpt2", "bert", "tokenformer"))
    assert anatomy(model).tied != anatomy(tiny(family)).tied or family == "tokenformer"
    assert run(model, by(HYPERCLONING, model, factor=3, variant="noisy")) < EXACT


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_head_without_its_factor_makes_the_logits_n_times_too_large(family):
    model = tiny(family, tie_word_embeddings=True)
    before = logits(model)

    def undivided(edit):
        is_final = isinstance(edit, SliceParameter) and edit.parameter.rpartition(".")[0].endswith(
            ("model.norm", "ln_f")
        )
        return edit.model_copy(update={"divide": False}) if is_final else edit

    plan = by(HYPERCLONING, model, factor=3)
    run(model, plan, undivided)
    assert change(3 * before, logits(model)) < EXACT


def test_t5_takes_up_the_root_of_the_number_of_copies():
    for scaled in (True, False):
        model = tiny("t5", tie_word_embeddings=scaled)
        gain = model.decoder.final_layer_norm.weight.detach().clone()
        assert run(model, by(HYPERCLONING, model, factor=3)) < EXACT
        factor = math.sqrt(3) if scaled else 3
        assert change(gain / factor, model.decoder.final_layer_norm.weight[:16]) < 1e-14


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{"factor": 4}, {"hidden_size": 64, "num_attention_heads": 8}], ids=str)
def test_gemma_scales_its_embeddings_and_stores_gains_less_one(settings, tied):
    model = tiny("gemma", tie_word_embeddings=tied)
    embedding = model.model.embed_tokens.weight.detach().clone()
    assert run(model, by(HYPERCLONING, model, **settings)) < EXACT
    assert change(embedding / 2, model.model.embed_tokens.weight[:, :16]) < 1e-14
    model = tiny("gemma", tie_word_embeddings=tied)
    # The scale is the root of the hidden size in float32.
    assert run(model, by(LEMON, model, hidden_size=40, split_noise=0.3)) < 1e-6
    assert model.config.rms_norm_eps == pytest.approx(1e-2 * 32 / 40)


def test_a_tied_head_behind_a_norm_without_gain_is_refused():
    model = tiny("olmo", tie_word_embeddings=True)
    with pytest.raises(PlanError, match=r"no norm with a gain .* could take up"):
        by(HYPERCLONING, model, hidden_size=32)
    assert run(model, by(HYPERCLONING, model, intermediate_size=24)) < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_copies_of_the_residual_are_refused_and_not_exact(family):
    model = tiny(family)
    size = hidden(model)
    uneven = StreamMap(size, (*range(size), *[0, 1] * (size // 2)))
    body = anatomy(model)
    maps = {"residual": uneven}
    if body.fields.head_dim is None:
        maps["query"], maps["key_value"] = head_maps(
            body.sizes, 2 * body.sizes.query_heads, 2 * body.sizes.key_value_heads
        )
    with pytest.raises(PlanError, match="unequal copies"):
        widened(model, **maps)
    plan = widened(model, approximate=True, **maps)
    assert plan.promise == "approximate"
    assert run(model, plan) > 0.01


def factors_left_out(edit):
    return None if isinstance(edit, ScaleParameter) else edit


def without_epsilon(edit):
    if not isinstance(edit, SetConfig):
        return edit
    return SetConfig(values={key: value for key, value in edit.values.items() if "eps" not in key})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", PRE_NORM)
def test_padding_is_exact_with_gain_and_epsilon_and_not_without(family, tied):
    config = {} if family in ("vit", "t5") else {"tie_word_embeddings": tied}
    wide = {"hidden_size": hidden(tiny(family)) * 5 // 2, "split_noise": 0.3}
    errors = []
    for keep in (lambda edit: edit, factors_left_out, without_epsilon):
        model = tiny(family, **config)
        if family == "qwen2":
            wide = {**wide, "num_key_value_heads": 5}
        plan = by(LEMON, model, **wide)
        assert plan.promise == "exact"
        errors.append(run(model, plan, keep))
    assert errors[0] < EXACT
    assert errors[1] > 0.05
    assert errors[2] > 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "vit"])
def test_layer_norm_takes_zeros_after_centring_only(family):
    config = {"tie_word_embeddings": False} if family != "vit" else {}
    model = tiny(family, **config)
    size = hidden(model) * 3 // 2
    plan = by(LEMON, model, hidden_size=size, padding="zeros")
    assert any(isinstance(edit, CentreParameter) for edit in plan.edits)
    assert run(model, plan) < EXACT
    model = tiny(family, **config)
    assert run(model, plan, lambda edit: None if isinstance(edit, CentreParameter) else edit) > 0.01


def test_centring_alone_leaves_an_untied_layer_norm_model_as_it_is_and_a_tied_one_not():
    for tied, moves in ((False, False), (True, True)):
        model = tiny("gpt2", tie_word_embeddings=False)
        plan = by(LEMON, model, hidden_size=24, padding="zeros")
        model = tiny("gpt2", tie_word_embeddings=tied)
        error = run(model, plan, lambda edit: edit if isinstance(edit, CentreParameter) else None)
        assert (error > 0.01) == moves
        assert moves or error < EXACT


def test_paddings_that_the_norm_does_not_take_are_refused():
    with pytest.raises(PlanError, match=r"a tied head does.*Pad with the mean"):
        by(LEMON, tiny("gpt2"), hidden_size=24, padding="zeros")
    model = tiny("llama")
    with pytest.raises(PlanError, match=r"changes the mean square.*Pad with zeros"):
        by(LEMON, model, hidden_size=24, padding="mean")
    assert run(model, widened(model, approximate=True, residual=padded(16, 24), padding="mean")) > 0.01
    for family in ("olmo", "tokenformer"):
        size = hidden(tiny(family))
        with pytest.raises(PlanError, match=rf"gain and an epsilon.*copies are {size} and {2 * size}"):
            by(LEMON, tiny(family), hidden_size=size * 3 // 2)


def test_post_norm_takes_whole_copies_only():
    model = tiny("bert")
    with pytest.raises(PlanError, match=r"after the residual sum.*16 and 32"):
        by(LEMON, model, hidden_size=24)
    heads = dict(zip(("query", "key_value"), head_maps(anatomy(model).sizes, 6, 6), strict=True))
    plan = widened(model, approximate=True, residual=padded(16, 24), padding="mean", **heads)
    assert run(model, plan) > 0.01


@pytest.mark.parametrize(
    ("old", "new"),
    [((4, 2), (8, 4)), ((4, 2), (8, 2)), ((4, 2), (8, 8)), ((4, 2), (4, 4)), ((4, 1), (8, 1)), ((4, 4), (8, 8))],
)
def test_grouped_heads_are_exact(old, new):
    model = tiny("llama", num_attention_heads=old[0], num_key_value_heads=old[1])
    plan = by(HYPERCLONING, model, num_attention_heads=new[0], num_key_value_heads=new[1], variant="noisy")
    assert run(model, plan) < EXACT


def test_other_numbers_of_heads_are_exact_where_the_config_takes_them():
    for new in ((6, 3), (10, 5), (12, 2), (6, 2)):
        model = tiny("qwen3")
        plan = by(LEMON, model, num_attention_heads=new[0], num_key_value_heads=new[1])
        assert run(model, plan) < EXACT


def test_heads_that_would_read_others_keys_are_refused_and_not_exact():
    model = tiny("llama")
    tiled_keys = StreamMap(2, (0, 1, 0, 1))
    with pytest.raises(PlanError, match="another key-value head"):
        widened(model, key_value=tiled_keys)  # every query head its own, but keys tiled instead of repeated
    assert run(model, widened(model, approximate=True, key_value=tiled_keys)) > 0.05
    model = tiny("llama")
    tiled_queries = circular(4, 8)
    with pytest.raises(PlanError, match="another key-value head"):
        widened(model, query=tiled_queries)  # more query heads, tiled instead of repeated inside the group
    assert run(model, widened(model, approximate=True, query=tiled_queries)) > 0.05


def test_one_norm_over_all_heads_asks_for_equal_copies():
    model = tiny("olmo2", num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(PlanError, match=r"equally many copies of each. Ask for multiples of 4 and 4"):
        by(LEMON, model, hidden_size=24)
    query, key_value = head_maps(anatomy(model).sizes, 6, 6)
    plan = widened(model, approximate=True, residual=padded(16, 24), query=query, key_value=key_value)
    assert run(model, plan) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_added_heads_and_units_that_nothing_reads_are_exact(family):
    model = tiny(family)
    sizes = anatomy(model).sizes
    longer = StreamMap(sizes.ffn or 0, tuple(range(sizes.ffn or 0)), added=5)
    maps = {"feed_forward": {"ffn": longer}} if sizes.ffn else {}
    if family in ("llama", "qwen3", "t5"):
        groups = 2 if family == "llama" else 1
        keys, queries = sizes.key_value_heads, sizes.query_heads
        maps["query"] = StreamMap(queries, tuple(range(queries)), added=groups * queries // keys)
        maps["key_value"] = StreamMap(keys, tuple(range(keys)), added=groups)
    if family in ("gpt2", "bert", "vit", "gpt_neox"):
        heads = sizes.query_heads
        maps["query"] = maps["key_value"] = StreamMap(heads, tuple(range(heads)), added=heads)
        maps["residual"] = circular(sizes.residual, 2 * sizes.residual)
    if maps:
        plan = widened(model, **maps)
        assert run(model, plan) < EXACT


def test_gate_and_up_need_one_map():
    model = tiny("llama")
    plan = by(NET2NET, model, intermediate_size=20)

    def other_map(edit):
        if isinstance(edit, SliceParameter) and ".up_proj" in edit.parameter:
            return edit.model_copy(update={"index": [*range(12), *reversed(edit.index[12:])]})
        return edit

    assert run(model, plan, other_map) > 0.02
    model = tiny("llama")
    assert run(model, plan) < EXACT


HEAD_DIMS = [
    ("llama", {}, 8),
    ("llama", {}, 12),
    ("t5", {}, 7),
    ("gpt2", {"hidden_size": 24, "num_attention_heads": 4}, 6),
    ("gpt2", {"hidden_size": 96, "num_attention_heads": 8}, 12),
    ("bert", {"hidden_size": 48, "num_attention_heads": 4}, 12),
    ("vit", {"hidden_size": 36, "num_attention_heads": 6}, 6),
    ("gpt_neox", {"hidden_size": 64, "num_attention_heads": 4}, 16),
    ("tokenformer", {"hidden_size": 96, "num_attention_heads": 4}, 24),
    ("qwen2", {"hidden_size": 48, "num_attention_heads": 4}, 12),
    ("olmo", {"hidden_size": 32, "num_attention_heads": 4}, 8),
]


@pytest.mark.parametrize(("family", "targets", "head_dim"), HEAD_DIMS, ids=str)
def test_larger_head_dimensions_are_exact_and_need_the_factor_of_the_queries(family, targets, head_dim):
    def plan(model):
        if not targets:
            return widened(model, head_dim=head_dim)
        body = anatomy(model)
        sizes = WidthTargets.parse(targets).sizes(body)
        assert sizes.head_dim == head_dim
        query, key_value = head_maps(body.sizes, sizes.query_heads, sizes.key_value_heads)
        return widened(
            model,
            residual=padded(body.sizes.residual, sizes.residual),
            query=query,
            key_value=key_value,
            head_dim=head_dim,
            padding="zeros" if body.norm == "rms" else "mean",
        )

    model = tiny(family)
    assert run(model, plan(model)) < EXACT
    if anatomy(model).attention_scaled:
        model = tiny(family)
        error = run(
            model,
            plan(model),
            lambda edit: (
                None if edit.kind in ("scale_entries", "scale_parameter") and "norm" not in edit.parameter else edit
            ),
        )
        assert error > 1e-3


def test_rotary_pairs_must_keep_their_frequency():
    model = tiny("llama")
    plan = widened(model, head_dim=8)

    def side_by_side(edit):
        """Zeros behind every head's old dimensions, which is right without rotary embeddings."""
        if isinstance(edit, SliceParameter) and ".q_proj" in edit.parameter:
            index = [4 * head + dim if dim < 4 else -1 for head in range(4) for dim in range(8)]
            return edit.model_copy(update={"index": index})
        if isinstance(edit, SliceParameter) and ".k_proj" in edit.parameter:
            index = [4 * head + dim if dim < 4 else 8 + 4 * head + dim - 4 for head in range(2) for dim in range(8)]
            return edit.model_copy(update={"index": index})
        return edit

    assert run(model, plan, side_by_side) > 0.01
    with pytest.raises(PlanError, match=r"every rotary frequency.*nearest are 4 and 8"):
        widened(tiny("llama"), head_dim=6)
    with pytest.raises(PlanError, match="norm on queries and keys"):
        widened(tiny("qwen3"), head_dim=12)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    with pytest.raises(PlanError, match="type 'yarn'"):
        widened(tiny("llama", rope_parameters=rope), head_dim=8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [LEMON, NET2NET], ids=lambda method: method.name)
def test_wider_and_deeper_by_the_examples_is_exact(method, family):
    model = tiny(family)
    plan = by(method, model, **method.examples(model))
    assert plan.promise == "exact"
    assert run(model, plan) < EXACT


def test_identity_blocks_are_spread_to_the_top():
    assert identity_order(6, 8) == ([0, 1, 2, 2, 3, 4, 5, 5], [3, 7])
    assert identity_order(2, 6) == ([0, 0, 0, 1, 1, 1], [1, 2, 4, 5])
    assert identity_order(3, 3) == ([0, 1, 2], [])
    with pytest.raises(PlanError, match=r"less than the 3.*nearest possible: 3"):
        identity_order(3, 2)


def test_net2net_widens_heads_and_units_by_random_copies():
    model = tiny("qwen3")
    plan = by(NET2NET, model, num_attention_heads=10, num_key_value_heads=5, intermediate_size=31, seed=5)
    index = next(edit.index for edit in plan.edits if getattr(edit, "parameter", "").endswith("up_proj.weight"))
    assert index[:12] == list(range(12))
    assert index[12:] != [unit % 12 for unit in range(12, 31)]
    assert run(model, plan) < EXACT


REFUSALS = [
    (HYPERCLONING, "llama", {}, "nothing to widen.*hidden_size = 16"),
    (HYPERCLONING, "llama", {"hidden_size": 24}, r"whole copies are 16 and 32"),
    (HYPERCLONING, "llama", {"hidden_size": 8}, "hidden_size = 8 is less than the 16.*nearest possible: 16"),
    (HYPERCLONING, "llama", {"num_attention_heads": 8, "num_key_value_heads": 3}, "does not divide.*2 or 4"),
    (HYPERCLONING, "llama", {"num_attention_heads": 6}, "does not divide hidden_size = 16.*4 or 8"),
    (HYPERCLONING, "gpt2", {"num_attention_heads": 8}, "head dimension is hidden_size / heads.*hidden_size = 32"),
    (HYPERCLONING, "gpt2", {"num_key_value_heads": 2}, "every head has its own keys"),
    (HYPERCLONING, "tokenformer", {"intermediate_size": 9}, "method tokenformer"),
    (HYPERCLONING, "llama", {"hidden_size": 32, "variant": "diagonal"}, "num_attention_heads = 8"),
    (LEMON, "gpt2", {"hidden_size": 18}, "The nearest possible: 16 or 20"),
    (LEMON, "llama", {"num_hidden_layers": 1}, "less than the 2"),
    (LEMON, "bert", {"num_hidden_layers": 3}, "norms come after the residual"),
    (LEMON, "llama", {}, "nothing to widen"),
    (NET2NET, "gpt2", {"num_attention_heads": 8}, "Use lemon or hypercloning with hidden_size = 32"),
    (NET2NET, "llama", {}, "nothing to grow"),
    (NET2NET, "llama", {"intermediate_size": 11}, "less than the 12"),
]


@pytest.mark.parametrize(
    ("method", "family", "settings", "words"), REFUSALS, ids=lambda value: getattr(value, "name", str(value))
)
def test_what_is_impossible_is_refused_with_the_nearest_target(method, family, settings, words):
    with pytest.raises(PlanError, match=words):
        by(method, tiny(family), **settings)
