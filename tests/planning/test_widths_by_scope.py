"""Cutting and widening one layer or one stack, and widening models whose layers or stacks differ."""

import copy

import pytest
import torch

from auxin.edits import ConfigureModule, Plan, SetConfig, apply
from auxin.edits.structure import config_values, structural_edits
from auxin.errors import PlanError
from auxin.methods import method
from auxin.models.anatomy import anatomy
from auxin.planning.bench import Bench
from auxin.planning.cutting import cut
from auxin.planning.width import describe_sizes, widen
from auxin.planning.width_maps import StreamMap, Widening, circular, head_maps, scoped_maps
from auxin.words.widths import Sizes, Width
from cut_models import FFN, KEPT, layer, narrow_plan, silence
from tiny_models import change, inputs, logits, tiny

EXACT = 1e-12


def done(model, result, promise="none"):
    """How far the logits move when the edits are applied."""
    edits = result if isinstance(result, list) else result.edits
    before = logits(model)
    made = Plan(method="test", promise=promise, edits=edits, made_for=config_values(model.config))
    apply(made, model, probe=inputs(model))
    return change(before, logits(model))


def by(name, model, **settings):
    found = method(name)
    return found.plan(Bench(model), found.settings.parse(settings))


def values(edits, kind):
    return [edit.values for edit in edits if isinstance(edit, kind)]


def cut_ffn(family, number=1, **config):
    model = tiny(family, **config)
    apply(narrow_plan(family, number), model, probe=inputs(model))
    return model


def silence_heads(model, family, gone, numbers=(0, 1)):
    """Set to zero what reads query heads, in both attentions of a T5's decoder."""
    readers = {
        "llama": ["model.layers.{}.self_attn.o_proj.weight"],
        "qwen3": ["model.layers.{}.self_attn.o_proj.weight"],
        "t5": ["decoder.block.{}.layer.0.SelfAttention.o.weight", "decoder.block.{}.layer.1.EncDecAttention.o.weight"],
        "gpt2": ["transformer.h.{}.attn.c_proj.weight"],
        "gpt_neox": ["gpt_neox.layers.{}.attention.dense.weight"],
        "bert": ["bert.encoder.layer.{}.attention.output.dense.weight"],
        "vit": ["vit.layers.{}.attention.o_proj.weight"],
    }[family]
    dim, axis = anatomy(model).sizes.head_dim, 0 if family == "gpt2" else 1
    with torch.no_grad():
        for name in (reader.format(number) for reader in readers for number in numbers):
            for head in gone:
                model.get_parameter(name).narrow(axis, head * dim, dim).zero_()


# Cutting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FFN)
def test_feed_forward_units_of_one_layer_are_cut_exactly_where_nothing_reads_them(family):
    model = tiny(family)
    silence(model, family)
    result = cut(model, {("ffn", layer(family)): KEPT})
    assert result.promise == "approximate"
    assert "6 of 12 feed-forward units stay" in result.reasons[0]
    assert values(result.edits, SetConfig) == []
    assert [list(said.values()) for said in values(result.edits, ConfigureModule)] == [[6]]
    assert done(model, result) < EXACT
    assert "intermediate_size = 6 to 12" in describe_sizes(anatomy(model))
    other = tiny(family)
    assert done(other, cut(other, {("ffn", layer(family)): KEPT})) > 1e-3


@pytest.mark.parametrize("family", FFN)
def test_what_all_layers_have_the_config_says(family):
    kept = {0: KEPT, 1: [1, 2, 4, 6, 8, 9]}
    model = tiny(family)
    for number, units in kept.items():
        silence(model, family, number, units)
    keep = {("ffn", layer(family, number)): units for number, units in kept.items()}
    if family == "t5":  # the encoder's, too
        for number in kept:
            weight = model.encoder.block[number].layer[1].DenseReluDense.wo.weight
            with torch.no_grad():
                weight[:, 6:] = 0
            keep["ffn", f"encoder.block.{number}"] = [*range(6)]
    result = cut(model, keep)
    assert [list(said.values()) for said in values(result.edits, SetConfig)] == [[6]]
    assert values(result.edits, ConfigureModule) == []
    assert done(model, result) < EXACT
    assert structural_edits(model.config) == []
    assert anatomy(model).sizes.ffn == 6


def test_one_stack_is_cut_by_one_edit_for_its_layers():
    model = tiny("t5")
    for number in (0, 1):
        silence(model, "t5", number)
    result = cut(model, {("ffn", "decoder.block"): KEPT})
    assert result.edits[0] == ConfigureModule(module="decoder.block.*.layer.2.DenseReluDense", values={"d_ff": 6})
    assert len(result.edits) == 3
    assert done(model, result) < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("kept", "keys"), [([0, 1], [0]), ([2, 3], [1]), ([1, 2], [0, 1])])
def test_heads_of_one_layer_go_with_the_key_value_heads_that_nobody_reads_then(family, kept, keys):
    model = tiny(family)
    silence_heads(model, family, {0, 1, 2, 3} - {*kept}, [1])
    old = copy.deepcopy(model.model.layers[1].self_attn.k_proj.weight)
    assert done(model, cut(model, {("query", "model.layers.1"): kept})) < EXACT
    found = anatomy(model).sizes
    assert found.at("model.layers.1") == Sizes(16, 2, len(keys), found.head_dim, 12)
    assert found.at("model.layers.0") == Sizes(16, 4, 2, found.head_dim, 12)
    rows = torch.cat([old[key * found.head_dim : (key + 1) * found.head_dim] for key in keys])
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, rows)


def test_any_number_of_heads_is_cut_where_the_config_would_not_take_it():
    model = tiny("llama", num_key_value_heads=4)
    silence_heads(model, "llama", [2])
    result = cut(model, {("query", ""): [0, 1, 3]})
    assert values(result.edits, SetConfig) == []
    assert values(result.edits, ConfigureModule) == [{"num_attention_heads": 3, "num_key_value_heads": 3}]
    assert done(model, result) < EXACT
    assert anatomy(model).sizes.at("model.layers.0") == Sizes(16, 3, 3, 4, 12)


def test_heads_of_a_stack_are_cut_in_all_of_its_attentions():
    model = tiny("t5")
    silence_heads(model, "t5", [0, 2])
    result = cut(model, {("query", "decoder.block"): [1, 3]})
    modules = [edit.module for edit in result.edits if isinstance(edit, ConfigureModule)]
    assert modules == [f"decoder.block.*.layer.{part}" for part in ("0.SelfAttention", "1.EncDecAttention")]
    assert done(model, result) < EXACT
    table = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert table.shape == (6, 2)
    assert model.encoder.block[0].layer[0].SelfAttention.n_heads == 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "t5"])
def test_residual_units_that_are_zero_are_cut_exactly_from_models_with_rms_norms(family):
    """Whatever writes the units 12..15 of 16 is zero; gains grow by the root of 12/16, epsilon by 16/12."""
    model = tiny(family)
    body = anatomy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            role = body.role(name)
            for axis, (segments, access) in enumerate(zip(role.axes, role.access, strict=True)):
                if (
                    access == "writes"
                    and segments[0].stream == "residual"
                    and role.kind in ("matrix", "bias", "embedding")
                ):
                    parameter.narrow(axis, 12, 4).zero_()
    gain = model.get_parameter(f"{body.final_norm}.weight").clone()
    assert done(model, cut(model, {("residual", ""): range(12)})) < EXACT
    factor = (16 / 12) ** 0.5
    if family == "t5":  # its tied head's logits are divided by the root of the hidden size besides
        factor *= (12 / 16) ** 0.5
    assert change(gain[:12] * factor, model.get_parameter(f"{body.final_norm}.weight")) < 1e-14
    assert anatomy(model).epsilon == pytest.approx(1e-2 * 16 / 12)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "vit", "llama", "qwen2", "t5"])
def test_cutting_is_the_way_back_from_padding(family):
    """LayerNorms are padded with the mean, which they do not notice when it goes either."""
    model = tiny(family)
    body, before, config = anatomy(model), logits(model), copy.deepcopy(model.config.to_dict())
    old = body.sizes
    bound = body.fields.head_dim is None
    widening = Widening(
        residual=StreamMap(old.residual, tuple(range(old.residual)), added=old.residual // 2),
        query=StreamMap(old.query_heads, tuple(range(old.query_heads)), added=old.query_heads // 2 * bound),
        key_value=StreamMap(
            old.key_value_heads, tuple(range(old.key_value_heads)), added=old.key_value_heads // 2 * bound
        ),
        feed_forward={"ffn": StreamMap(12, tuple(range(12)), added=5)},
        head_dim=old.head_dim,
        padding="zeros" if body.norm == "rms" else "mean",
    )
    assert done(model, widen(body, widening), promise="exact") < EXACT
    keep = {("residual", ""): range(old.residual), ("ffn", ""): range(12)}
    if bound:
        keep["query", ""] = range(old.query_heads)
    assert done(model, cut(model, keep)) < EXACT
    assert change(before, logits(model)) < EXACT
    now = model.config.to_dict()
    assert now.pop(body.fields.epsilon) == pytest.approx(config.pop(body.fields.epsilon))
    assert now == {**config, **({"pooler_output_size": now["pooler_output_size"]} if family == "vit" else {})}


def test_norms_that_can_not_be_scaled_stay_and_the_reasons_say_what_is_lost():
    model = tiny("bert")
    gain = model.bert.encoder.layer[0].output.LayerNorm.weight.clone()
    result = cut(model, {("residual", ""): range(4, 16), ("query", ""): [0, 1, 3]})
    assert result.promise == "approximate"
    assert any("12 of 16 hidden units stay" in reason for reason in result.reasons)
    done(model, result)
    assert torch.equal(model.bert.encoder.layer[0].output.LayerNorm.weight, gain[4:])
    assert model.config.layer_norm_eps == 1e-2
    assert (model.config.hidden_size, model.config.num_attention_heads) == (12, 3)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert", "vit"])
def test_heads_bound_to_the_residual_are_cut_with_it(family):
    model = tiny(family)
    body = anatomy(model)
    size, dim = body.sizes.residual, body.sizes.head_dim
    kept = [*range(dim, size)]
    done(model, cut(model, {("residual", ""): kept, ("query", ""): [0, 1, 3]}))
    found = anatomy(model).sizes
    assert (found.residual, found.query_heads, found.key_value_heads, found.head_dim) == (size - dim, 3, 3, dim)


@pytest.mark.parametrize(
    ("family", "keep", "message"),
    [
        ("llama", {("ffn", ""): [0, 12]}, r"ffn: the units that stay must be some of 0\.\.11, each once.*\[0, 12\]"),
        ("llama", {("ffn", "model.layers.1"): [0, 0]}, r"ffn of model\.layers\.1: .*each once"),
        ("llama", {("ffn", ""): []}, r"not none"),
        ("llama", {("ffn", "model.layers.2"): [0]}, r"'model.layers.2' is no stack and no layer"),
        ("llama", {("key_value", ""): [0]}, r"key_value: units of this stream are not cut.*residual, query, ffn"),
        ("llama", {("residual", "model.layers.1"): [0]}, r"the residual is one through all layers"),
        ("llama", {("query", ""): [0, 1, 2]}, r"heads \[2, 1\] would stay.*Keep 1 or 2 of each"),
        ("llama", {("residual", ""): range(14)}, r"14 units .* no multiple of the 4 heads.*Keep 12 or 16"),
        ("llama", {("ffn", ""): range(12)}, r"nothing to cut: all units are among those that stay"),
        ("gpt2", {("query", "transformer.h.1"): [0]}, r"hidden size / heads, so that no layer"),
        ("gpt2", {("query", ""): [0, 1]}, r"16 units of the residual with 2 heads of dimension 4.*Keep 4 heads, or 8"),
        ("gpt2", {("residual", ""): range(14)}, r"Keep a multiple of 4 units"),
        ("t5", {("query", "decoder.block.1"): [0]}, r"Give the heads that stay for decoder\.block"),
        ("tokenformer", {("ffn", ""): [0]}, r"tokenformer model has no units of ffn"),
    ],
)
def test_what_can_not_be_cut_is_refused_with_a_reason(family, keep, message):
    with pytest.raises(PlanError, match=message):
        cut(tiny(family), keep)


def test_one_list_does_not_serve_layers_of_different_widths():
    model = cut_ffn("llama")
    with pytest.raises(PlanError, match=r"all layers: model\.layers\.1 in there has 6 units of ffn, others have 12"):
        cut(model, {("ffn", ""): [0, 1]})
    assert done(model, cut(model, {("ffn", "model.layers.0"): [0, 1]})) > 0
    # The config says the width of those layers that have none of their own.
    assert anatomy(model).sizes == Sizes(16, 4, 2, 4, 2, (Width("ffn", "model.layers.1", 6),))
    done(model, cut(model, {("ffn", "model.layers.1"): [0, 5]}))
    # Both have two units now, which the config can say.
    assert structural_edits(model.config) == []
    assert model.config.intermediate_size == 2


# Widening ------------------------------------------------------------------------------------------------------------


def keeping(sizes, **maps):
    """Maps that leave everything as it is, but for those given."""
    same = {
        "residual": circular(sizes.residual, sizes.residual),
        "query": circular(sizes.query_heads, sizes.query_heads),
        "key_value": circular(sizes.key_value_heads, sizes.key_value_heads),
        "feed_forward": {"ffn": circular(sizes.ffn, sizes.ffn)},
        "head_dim": sizes.head_dim,
    }
    return Widening(**{**same, **maps})


@pytest.mark.parametrize("family", FFN)
@pytest.mark.parametrize("scope", ["layer", "stack"])
def test_one_layer_or_one_stack_grows_alone_and_exactly(family, scope):
    model = tiny(family)
    path = layer(family) if scope == "layer" else FFN[family][0]
    body = anatomy(model, scopes=[path])
    result = widen(body, keeping(body.sizes, scoped={("ffn", path): circular(12, 20)}, noise=0.1))
    assert result.promise == "exact"
    assert done(model, result, promise="exact") < EXACT
    found = anatomy(model).sizes
    assert found.units("ffn", layer(family)) == 20
    others = ["encoder.block.0"] if family == "t5" else []
    others += [layer(family, 0)] if scope == "layer" else []
    assert all(found.units("ffn", other) == 12 for other in others)
    # A whole stack that is all of the model grows in the config.
    assert (structural_edits(model.config) == []) == (scope == "stack" and family != "t5")


def test_heads_of_one_layer_grow_alone():
    model = tiny("llama")
    body = anatomy(model, scopes=["model.layers.0"])
    query, key_value = head_maps(body.sizes, 8, 4)
    scoped = {("query", "model.layers.0"): query, ("key_value", "model.layers.0"): key_value}
    assert done(model, widen(body, keeping(body.sizes, scoped=scoped)), promise="exact") < EXACT
    assert anatomy(model).sizes.at("model.layers.0") == Sizes(16, 8, 4, 4, 12)
    body = anatomy(model)
    tiled = circular(8, 16)
    scoped = {("query", "model.layers.0"): tiled, ("key_value", "model.layers.0"): circular(4, 4)}
    with pytest.raises(PlanError, match=r"model\.layers\.0: Query head 2 at place 2 of 16 would read another"):
        widen(body, keeping(body.sizes, scoped=scoped))


def test_a_map_must_be_one_of_this_model():
    model = cut_ffn("llama")
    body = anatomy(model)
    with pytest.raises(PlanError, match=r"model\.layers\.1: the widening maps 12 units of ffn, and there are 6"):
        widen(body, keeping(body.sizes, feed_forward={"ffn": circular(12, 24)}))
    body = anatomy(tiny("llama"))
    with pytest.raises(PlanError, match=r"scopes=\['model.layers.1'\]"):
        widen(body, keeping(body.sizes, scoped={("ffn", "model.layers.1"): circular(12, 24)}))
    with pytest.raises(PlanError, match="feed-forward unit 1 would be lost"):
        widen(body, keeping(body.sizes, feed_forward={"ffn": StreamMap(12, (0,))}), approximate=True)
    lost_and_copied = keeping(body.sizes, query=StreamMap(4, (0, 0)))
    with pytest.raises(PlanError, match="query head unit 1 would be lost"):
        widen(body, lost_and_copied, approximate=True, cut=True)


def test_scoped_maps_are_those_between_the_widths_of_each_scope():
    old = Sizes(16, 4, 2, 4, 12, (Width("ffn", "a", 6), Width("query", "b", 2), Width("key_value", "b", 1)))
    new = Sizes(32, 8, 4, 4, 24, (Width("ffn", "a", 12), Width("query", "b", 4), Width("key_value", "b", 2)))
    maps = scoped_maps(old, new, circular, lambda one, two: head_maps(one, two.query_heads, two.key_value_heads))
    assert maps == {
        ("ffn", "a"): circular(6, 12),
        ("query", "b"): StreamMap(2, (0, 1, 0, 1)),
        ("key_value", "b"): StreamMap(1, (0, 0)),
    }
    assert keeping(old, feed_forward={"ffn": circular(12, 24)}, scoped=maps).sizes(old).at("b") == Sizes(
        16, 4, 2, 4, 24
    )


# Methods -------------------------------------------------------------------------------------------------------------


def uneven(family):
    """One layer (a T5's decoder) with 6 of 12 feed-forward units, and where it can be with 2 of 4 heads."""
    model = cut_ffn(family, "*" if family == "t5" else 1)
    scope = {"llama": "model.layers.1", "t5": "decoder.block"}.get(family)
    if scope:
        done(model, cut(model, {("query", scope): [1, 3]}))
    return model


@pytest.mark.parametrize("variant", ["symmetric", "noisy", "diagonal"])
@pytest.mark.parametrize("family", FFN)
def test_every_scope_is_cloned_by_its_own_factor(family, variant):
    model = uneven(family)
    scopes = [FFN[family][0], layer(family), layer(family, 0), ""]
    old = [anatomy(model).sizes.at(scope) for scope in scopes]
    plan = by("hypercloning", model, factor=2, variant=variant)
    assert done(model, plan.edits, promise="exact") < EXACT
    new = [anatomy(model).sizes.at(scope) for scope in scopes]
    for one, two in zip(old, new, strict=True):
        assert (two.residual, two.query_heads, two.ffn) == (2 * one.residual, 2 * one.query_heads, 2 * one.ffn)
        single = one.key_value_heads == 1 < one.query_heads
        assert two.key_value_heads == one.key_value_heads * (1 if single else 2)


@pytest.mark.parametrize("name", ["hypercloning", "lemon", "net2net"])
@pytest.mark.parametrize("family", FFN)
def test_a_width_that_is_asked_for_is_that_of_all_layers(family, name):
    model = uneven(family)
    plan = by(name, model, intermediate_size=14)
    assert done(model, plan.edits, promise="exact") < EXACT
    sizes = anatomy(model).sizes
    assert {sizes.units("ffn", scope) for scope in ("", FFN[family][0], layer(family), layer(family, 0))} == {14}
    assert not [
        said for edit in structural_edits(model.config) for said in edit.values if "inter" in said or "ff" in said
    ]


def test_widths_of_narrow_layers_grow_up_to_the_models():
    model = uneven("t5")
    assert done(model, by("lemon", model, intermediate_size=12).edits, promise="exact") < EXACT
    assert anatomy(model).sizes.scoped == (Width("query", "decoder.block", 2), Width("key_value", "decoder.block", 2))
    wide = tiny("t5")
    body = anatomy(wide, scopes=["decoder.block"])
    done(wide, widen(body, keeping(body.sizes, scoped={("ffn", "decoder.block"): circular(12, 20)})))
    with pytest.raises(PlanError, match=r"intermediate_size = 14 is less than the 20 that decoder.block has"):
        by("net2net", wide, intermediate_size=14)
    assert done(wide, by("hypercloning", wide, factor=2).edits, promise="exact") < EXACT
    assert anatomy(wide).sizes.scoped == (Width("ffn", "decoder.block", 40),)


def test_lemon_grows_residual_and_depth_of_uneven_layers():
    model = uneven("llama")
    plan = by("lemon", model, hidden_size=24, num_hidden_layers=3)
    assert done(model, plan.edits, promise="exact") < 1e-6
    widths = [block.mlp.up_proj.out_features for block in model.model.layers]
    assert sorted(widths) == [6, 6, 12]


def test_bert2bert_takes_copies_of_its_own_or_of_stacks_whose_layers_are_alike():
    for family in ("llama", "bert"):
        with pytest.raises(PlanError, match=r"different widths.*initialisation = fpi"):
            by("bert2bert", uneven(family), hidden_size=32)
    model = uneven("llama")
    plan = by("bert2bert", model, intermediate_size=20, initialisation="fpi")
    assert plan.promise == "exact"
    assert done(model, plan.edits, promise="exact") < EXACT
    model = uneven("t5")
    done(model, by("bert2bert", model, hidden_size=32, intermediate_size=20).edits)
    assert anatomy(model).sizes.units("ffn", "decoder.block") == 20


@pytest.mark.parametrize("family", FFN)
def test_masks_know_the_widths_of_every_layer(family):
    model = uneven(family)
    plan = by("masked", model, intermediate_size=14)
    assert done(model, plan.edits, promise="exact") < EXACT
    for module in model.modules():
        if hasattr(module, "set_strength"):
            module.set_strength(1.0)
    assert done(model, by("masked", model, finish=True).edits, promise="exact") < EXACT
    assert anatomy(model).sizes.units("ffn", layer(family)) == 14


def test_masks_know_the_heads_of_every_layer():
    model = uneven("llama")
    sizes = anatomy(model).sizes.at("model.layers.1")
    assert (sizes.query_heads, sizes.key_value_heads) == (2, 2)
    plan = by("masked", model, num_attention_heads=8, num_key_value_heads=4)
    assert done(model, plan.edits, promise="exact") < EXACT


def test_ligo_refuses_layers_that_it_can_not_blend():
    with pytest.raises(PlanError, match=r"different widths \(.*intermediate_size = 6 to 12\)"):
        by("ligo", uneven("gpt2"), layers=3, steps=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("altup", {"blocks": 2}),
        ("graft", {"tokens": 4}),
        ("llama-pro", {"group_size": 1}),
        ("net2net", {"num_hidden_layers": 4}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_methods_that_leave_the_widths_alone_stay_exact(family, name, settings):
    model = uneven(family)
    plan = by(name, model, **settings)
    assert done(model, plan.edits, promise="exact") < EXACT


def test_sizes_are_described_by_ranges_where_they_differ():
    assert describe_sizes(anatomy(tiny("llama"))) == (
        "hidden_size = 16, num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 12"
    )
    assert describe_sizes(anatomy(uneven("llama"))) == (
        "hidden_size = 16, num_attention_heads = 2 to 4, num_key_value_heads = 2, intermediate_size = 6 to 12"
    )
    assert describe_sizes(anatomy(uneven("t5"))) == (
        "hidden_size = 16, num_attention_heads = 2 to 4, intermediate_size = 6 to 12"
    )
    with pytest.raises(PlanError, match="intermediate_size = 6 to 12"):
        by("net2net", uneven("gpt2"), num_hidden_layers=2)
