"""Growing in depth: stacking, identity blocks, slices, against models built by hand from renamed state dicts."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from auxin.edits import Plan, RemoveModule, apply, apply_to_checkpoint
from auxin.edits.kinds.parameter_edits import ScaleParameter
from auxin.errors import ConfigError, PlanError, PromiseError
from auxin.methods.grow.llama_pro import BlockExpansion, new_layers, plan_block_expansion, train_new_layers
from auxin.methods.grow.masked import MaskedGrowth, MaskRamp, plan_masked
from auxin.methods.grow.solar import DepthUpscaling, plan_depth_upscaling
from auxin.methods.grow.stacking import LayerStacking, layer_order, plan_stacking
from auxin.models.anatomy import anatomy
from auxin.models.loading import skeleton
from auxin.nn.masked import MaskedBlock
from auxin.nn.stand_ins import Zeros
from auxin.planning.depth import arrange, identity_layers
from auxin.planning.hooks import hooks_of
from auxin.training.optimizer import optimizer_tensors
from covering import covers, families, whole
from edits.models import assert_same
from oracles.depth import LAYERS, expansion, is_output, rearranged
from tiny_models import FAMILIES, InDouble, change, inputs, labels, tiny

PRE_NORM = [family for family in FAMILIES if family != "bert"]
DEPTH = 4
LENGTH = {"gpt2": "n_layer", "t5": "num_layers"}


def model_of(family, layers=DEPTH, **config):
    return tiny(family, **{LENGTH.get(family, "num_hidden_layers"): layers, **config})


def stacking(model, **settings):
    return plan_stacking(model, LayerStacking.parse(settings))


def expanded(model, **settings):
    return plan_block_expansion(model, BlockExpansion.parse(settings))


def upscaled(model, **settings):
    return plan_depth_upscaling(model, DepthUpscaling.parse(settings))


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


def loss(model):
    return model(**{**inputs(model), "labels": labels(model)}).loss


ARRANGEMENTS = [
    (stacking, {"factor": 2}, [0, 1, 2, 3, 0, 1, 2, 3], {}),
    (stacking, {"layers": 6}, [0, 1, 2, 3, 2, 3], {}),
    (stacking, {"factor": 3, "order": "interleave"}, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], {}),
    (stacking, {"layers": 6, "order": "interleave"}, [0, 0, 1, 2, 2, 3], {}),
    (expanded, {"group_size": 2}, [0, 1, 1, 2, 3, 3], {2: 0.0, 5: 0.0}),
    (expanded, {"layers": 8, "copies": 2}, [0, 1, 0, 1, 2, 3, 2, 3], {2: 0.0, 3: 0.0, 6: 0.0, 7: 0.0}),
    (upscaled, {"dropped": 1}, [0, 1, 2, 1, 2, 3], {}),
    (upscaled, {"layers": 8}, [0, 1, 2, 3, 0, 1, 2, 3], {}),
    (
        upscaled,
        {"slices": [[0, 2], {"layers": [1, 4], "scale": 0.5}, [3, 4]]},
        [0, 1, 1, 2, 3, 3],
        {2: 0.5, 3: 0.5, 4: 0.5},
    ),
]
NUMBERS = range(len(ARRANGEMENTS))


@pytest.mark.parametrize(
    ("family", "method", "settings", "order", "scales"),
    [
        pytest.param(family, *ARRANGEMENTS[number], marks=() if covers(NUMBERS, number, FAMILIES, family) else whole)
        for family in FAMILIES
        for number in NUMBERS
        if family != "bert" or 0.0 not in ARRANGEMENTS[number][-1].values()
    ],
)
def test_the_grown_model_is_the_one_built_by_hand(family, method, settings, order, scales):
    model = model_of(family)
    oracle = rearranged(model, order, scales)
    plan = method(skeleton(model.config, type(model)), **settings)
    assert plan == method(model, **settings)
    receipt = apply(Plan.parse(json.loads(plan.model_dump_json())), model, probe=inputs(model))
    assert torch.equal(logits(model), logits(oracle))
    assert model.config.to_dict() == oracle.config.to_dict()
    assert receipt.parameters_after == sum(parameter.numel() for parameter in oracle.parameters())
    assert set(model.state_dict()) == set(oracle.state_dict())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_part_of_an_encoder_and_decoder_grows_alone(part):
    model = model_of("t5")
    oracle = rearranged(model, [0, 1, 1, 2, 3, 3], {2: 0.0, 5: 0.0}, paths=[f"{part}.block"])
    before = logits(model)
    apply(expanded(model, group_size=2, part=part), model, probe=inputs(model))
    assert model.config.to_dict() == oracle.config.to_dict()
    assert torch.equal(logits(model), before)
    apply(stacking(model, layers=6), model, probe=inputs(model))
    assert (model.config.num_layers, model.config.num_decoder_layers) == (6, 6)


VARIANTS = [
    *(pytest.param(*family.values, {}, marks=family.marks) for family in families(PRE_NORM, "gpt_neox", "vit")),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
]


@pytest.mark.parametrize("settings", [{"group_size": 2}, {"group_size": 2, "copies": 2}, {"group_size": 1}])
@pytest.mark.parametrize(("family", "config"), VARIANTS)
def test_identity_blocks_keep_the_function_to_the_last_bit(family, config, settings):
    model = model_of(family, **config)
    before = logits(model)
    receipt = apply(expanded(model, **settings), model, probe=inputs(model))
    assert receipt.max_relative_change == 0.0
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "vit"])
def test_the_biases_of_the_outputs_matter(family):
    """What the method would do to the function if it left them."""
    model = model_of(family)
    before = logits(model)
    plan = expanded(model, group_size=2)
    edits = [edit for edit in plan.edits if not getattr(edit, "parameter", "").endswith("bias")]
    assert len(edits) < len(plan.edits)
    receipt = apply(plan.model_copy(update={"edits": edits, "promise": "none"}), model, probe=inputs(model))
    assert receipt.max_relative_change > 0.01
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("family", PRE_NORM)
def test_at_first_only_the_zeroed_outputs_of_new_layers_get_a_gradient(family):
    model = model_of(family)
    apply(expanded(model, group_size=2), model, probe=inputs(model))
    loss(model).backward()
    seen = set()
    for name, parameter in model.named_parameters():
        output = is_output(model, name, [2, 5])
        if output is not None:
            assert bool(parameter.grad.any()) == output, name
            seen.add(output)
    assert seen == {True, False}


def test_the_other_parameters_of_new_layers_wake_with_the_second_step():
    model = model_of("llama").float()
    apply(expanded(model, group_size=4), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in model.model.layers[4].parameters())


@pytest.mark.parametrize(("method", "settings", "order", "scales"), ARRANGEMENTS)
def test_what_the_config_says_of_each_layer_follows(method, settings, order, scales):
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = model_of("qwen2", use_sliding_window=True, sliding_window=3, layer_types=types)
    full = model_of("qwen2", use_sliding_window=True, sliding_window=3, layer_types=["full_attention"] * 4)
    assert not torch.equal(logits(model), logits(full)), "the window is seen"
    oracle = rearranged(model, order, scales)
    apply(method(model, **settings), model)
    assert model.config.layer_types == [types[old] for old in order]
    assert [layer.self_attn.layer_type for layer in model.model.layers] == model.config.layer_types
    assert torch.equal(logits(model), logits(oracle))


def with_moments(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return optimizer


def states(model, optimizer, path):
    return {
        name.removeprefix(path): {key: value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
        for name, parameter in model.named_parameters()
        if name.startswith(path)
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", [stacking, expanded])
def test_moments_of_copies_are_copied_and_those_of_identity_blocks_fresh(family, method):
    model = model_of(family)
    optimizer = with_moments(model)
    path = next(iter(LAYERS[family]))
    old = [states(model, optimizer, f"{path}.{layer}.") for layer in range(DEPTH)]
    order = [*range(4)] * 2 if method is stacking else [0, 1, 1, 2, 3, 3]
    settings = {"factor": 2} if method is stacking else {"group_size": 2}
    apply(method(model, **settings), model, optimizer, probe=inputs(model))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    for new, source in enumerate(order):
        for name, state in states(model, optimizer, f"{path}.{new}.").items():
            if method is expanded and new in (2, 5):
                assert not any(value.any() for value in state.values()), (new, name)
            else:
                assert state.keys() == old[source][name].keys() == {"step", "exp_avg", "exp_avg_sq"}
                assert all(torch.equal(value, old[source][name][key]) for key, value in state.items()), (new, name)
    optimizer.zero_grad()
    loss(model).backward()
    before = states(model, optimizer, f"{path}.2.")
    optimizer.step()
    after = states(model, optimizer, f"{path}.2.")
    expected = 1 if method is expanded else 4
    assert before.keys() == after.keys()
    assert {int(state["step"]) for state in after.values()} == {expected}


def test_fresh_moments_leave_with_a_failed_edit_and_reach_the_disk(tmp_path):
    """Also where the identity block comes first, so that the old parameter itself becomes part of it."""
    model = model_of("llama").float()
    optimizer = with_moments(model)
    plan = upscaled(model, slices=[{"layers": [0, 1], "scale": 0}, [0, 4]])
    assert plan.promise == "exact"
    source = tmp_path / "old"
    model.save_pretrained(source)
    (source / "training").mkdir()
    save_file(optimizer_tensors(model, optimizer), source / "training" / "state.safetensors")
    everything = optimizer_tensors(model, optimizer)
    impossible = [*plan.edits, ScaleParameter(parameter="model.norm.weight", factor=2.0)]
    with pytest.raises(PromiseError):
        apply(plan.model_copy(update={"edits": impossible}), model, optimizer)
    assert_same(optimizer_tensors(model, optimizer), everything)
    apply_to_checkpoint(plan, source, tmp_path / "new")
    apply(plan, model, optimizer)
    now = optimizer_tensors(model, optimizer)
    assert not [name for name in now if "layers.0." in name]
    assert_same(load_file(tmp_path / "new" / "training" / "state.safetensors"), now)
    moved = {name.replace(".0.", ".1."): value for name, value in everything.items() if "layers.0." in name}
    assert_same({name: value for name, value in now.items() if "layers.1." in name}, moved)


def test_only_the_new_layers_are_trained():
    model = model_of("llama").float()
    plan = expanded(model, group_size=2)
    apply(plan, model)
    assert identity_layers(plan) == {"model.layers": [2, 5]}
    assert new_layers(BlockExpansion(group_size=2), DEPTH) == [2, 5]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_new_layers(plan).attach(model, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith(("model.layers.2.", "model.layers.5.")), name
    assert plan.hooks == []
    (hook,) = hooks_of(expanded(model_of("llama"), group_size=2, train_only_new=True))
    assert hook.paths == ["model.layers.2", "model.layers.5"]
    with pytest.raises(ConfigError, match="at least one path"):
        train_new_layers(stacking(model, factor=2))


@given(layers=st.integers(1, 40), groups=st.integers(1, 40), copies=st.integers(1, 40))
def test_new_layers_are_those_of_the_paper_s_algorithm(layers, groups, copies):
    if layers % groups or copies > layers // groups:
        settings = BlockExpansion(group_size=layers // groups + 1, copies=copies)
        if layers % (layers // groups + 1) or copies > layers // groups + 1:
            with pytest.raises(PlanError, match=r"nearest possible is|at most"):
                new_layers(settings, layers)
        return
    order, new = expansion(layers, groups, copies)
    assert new_layers(BlockExpansion(group_size=layers // groups, copies=copies), layers) == new
    assert new_layers(BlockExpansion(layers=len(order), copies=copies), layers) == new


@given(layers=st.integers(1, 30), factor=st.integers(2, 8))
def test_orders_are_those_of_the_papers(layers, factor):
    total = layers * factor
    assert layer_order(layers, total, "stack") == [index % layers for index in range(total)]
    assert layer_order(layers, total, "interleave") == [index // factor for index in range(total)]


@given(layers=st.integers(1, 30), more=st.integers(1, 50))
def test_any_number_of_layers_can_be_had(layers, more):
    total = layers + more
    stacked, spread = (layer_order(layers, total, order) for order in ("stack", "interleave"))
    assert len(stacked) == len(spread) == total
    assert set(stacked) == set(spread) == set(range(layers))
    # Up through the stack, then on from its bottom, or, for the rest, from where it reaches the top at the end.
    assert stacked[-1] == spread[-1] == layers - 1
    assert sum(after != before + 1 for before, after in pairwise(stacked)) == -(-total // layers) - 1
    counts = [spread.count(layer) for layer in range(layers)]
    assert spread == sorted(spread)
    assert max(counts) - min(counts) <= 1


def test_slices_promise_what_they_keep():
    model = model_of("llama")
    before = logits(model)
    exact = upscaled(model, slices=[[0, 2], {"layers": [0, 2], "scale": 0}, [2, 4]])
    assert exact.promise == "exact"
    assert apply(exact, model).max_relative_change == 0.0
    assert torch.equal(logits(model), before)
    for slices in (
        [[0, 2], {"layers": [2, 4], "scale": 0}],
        [[0, 2], {"layers": [0, 2], "scale": 0}, {"layers": [2, 4], "scale": 0.5}],
        [[0, 4], [0, 4]],
    ):
        assert upscaled(model_of("llama"), slices=slices).promise == "none"


@pytest.mark.parametrize(
    ("family", "method", "settings", "message"),
    [
        ("llama", stacking, {}, r"exactly one of factor \(null\) and layers \(null\)"),
        ("llama", stacking, {"factor": 2, "layers": 8}, "exactly one of"),
        ("llama", stacking, {"factor": 1}, r"factor: .*2 or more"),
        ("llama", stacking, {"layers": 3}, r"layers = 3 is fewer than the 4 of model\.layers.*at least 5"),
        ("llama", stacking, {"layers": 4}, "has 4 layers already. Ask for more"),
        ("llama", stacking, {"factor": 2, "part": "encoder"}, r"part = 'encoder' names no layers.*model\.layers"),
        ("t5", stacking, {"layers": 3}, r"fewer than the 4 of encoder\.block"),
        ("bert", expanded, {"group_size": 2}, r"identity block is impossible.*norm\(x \+ 0\) is not x.*stacking"),
        ("bert", upscaled, {"slices": [[0, 4], {"layers": [3, 4], "scale": 0}]}, "identity block is impossible"),
        ("llama", expanded, {"group_size": 3}, r"group_size = 3 does not divide the 4 layers.*nearest possible is 4"),
        ("llama", expanded, {"group_size": 2, "copies": 3}, r"less than copies = 3, of the 4 layers.*possible is 4"),
        ("llama", expanded, {"group_size": 4, "copies": 5}, r"copies = 5 is more than the 4 layers.*at most 4"),
        ("llama", expanded, {"layers": 7}, r"layers = 7.*The nearest possible is 6; all are 5, 6, 8"),
        ("llama", expanded, {"layers": 3}, r"layers = 3.*The nearest possible is 5"),
        ("llama", upscaled, {"dropped": 2}, r"leaves 2 x \(4 - 2\) = 4 layers, which is no growth. Drop at most 1"),
        ("llama", upscaled, {"layers": 7}, r"even number from 6 to 8\. The nearest possible is 8"),
        ("llama", upscaled, {"layers": 20}, r"The nearest possible is 8"),
        ("llama", upscaled, {"slices": [[0, 4], [2, 5]]}, r"\[2, 5\] end beyond the 4 layers.*possible end is 4"),
        ("llama", upscaled, {"slices": [[0, 2], [2, 4]]}, "are the 4 layers that the model has"),
        ("llama", upscaled, {"slices": [[2, 2]]}, r"layers \[2, 2\] is no range"),
        ("llama", upscaled, {"dropped": 1, "layers": 8}, "not dropped and layers"),
        ("t5", upscaled, {"slices": [[1, 4], [0, 4]]}, r"layer 1 can't come first.*relative_attention_bias.*layer 0"),
    ],
)
def test_the_impossible_is_refused_with_the_reason(family, method, settings, message):
    with pytest.raises((ConfigError, PlanError), match=message):
        method(model_of(family), **settings)


def test_no_identity_among_layers_that_depend_on_their_number():
    model = model_of("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PlanError, match="scale_attn_by_inverse_layer_idx = True"):
        expanded(model, group_size=2)
    oracle = rearranged(model, [*range(4)] * 2)
    apply(stacking(model, factor=2), model)
    assert torch.equal(logits(model), logits(oracle))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_removed_branch_adds_nothing_to_an_identity_block_either(family, place):
    model = model_of(family, 2)
    inside = {"llama": "model.layers.{}.mlp", "gpt2": "transformer.h.{}.mlp"}.get(
        family, "decoder.block.{}.layer.2.DenseReluDense"
    )
    removal = RemoveModule(module=inside.format(place), leaves="zeros")
    apply(Plan(method="by hand", promise="none", edits=[removal]), model)
    before = logits(model)
    apply(expanded(model, group_size=1), model, probe=inputs(model))
    assert torch.equal(logits(model), before)
    removed = [name for name, module in model.named_modules() if isinstance(module, Zeros)]
    assert removed == [inside.format(layer) for layer in (2 * place, 2 * place + 1)]


def test_a_removed_module_that_left_its_input_has_no_identity_copy():
    model = model_of("llama", 2)
    removal = RemoveModule(module="model.layers.1.mlp", leaves="identity")
    apply(Plan(method="by hand", promise="none", edits=[removal]), model)
    with pytest.raises(
        PlanError, match=r"model\.layers\.1\.mlp: what was removed there left its input.*Grow the model"
    ):
        expanded(model, group_size=1)
    assert len(stacking(model, factor=2).edits) == 1


@pytest.mark.parametrize("family", [family for family in PRE_NORM if family != "vit"])
def test_masked_models_take_identity_blocks_on_the_way(family):
    """Around layers and their outputs: what a mask lets through is a multiple of what is inside."""
    model = model_of(family, 2)
    values = {"layers": 3, "new_layers": "copies"}
    if family != "tokenformer":
        values["intermediate_size"] = 20
    apply(plan_masked(model, MaskedGrowth.parse(values)), model, probe=inputs(model))
    MaskRamp.set_strength(model, 0.5)
    with InDouble():
        before = model(**inputs(model)).logits
        apply(expanded(model, group_size=1), model, probe=inputs(model))
        assert change(before, model(**inputs(model)).logits) < 1e-12
    assert len(model.get_submodule(anatomy(model).stacks[0].path)) == 6
    # The wrapper of the layer that is not all there yet was copied with it, its mask at the strength that it had.
    masks = [module.mask for module in model.modules() if isinstance(module, MaskedBlock)]
    assert [mask.item() for mask in masks] == [0.5] * (4 if family == "t5" else 2)


@pytest.mark.parametrize("family", ["llama", "olmo2", "t5"])
def test_a_copy_of_a_layer_whose_input_is_masked_is_no_identity_block(family):
    model = model_of(family, 2)
    values = {"hidden_size": 32, **({"num_attention_heads": 4} if family == "t5" else {})}
    apply(plan_masked(model, MaskedGrowth.parse(values)), model, probe=inputs(model))
    with pytest.raises(PlanError, match=r"\.0: what comes in is masked.*finish = true"):
        expanded(model, group_size=1)
    MaskRamp.set_strength(model, 0.5)
    path = anatomy(model).stacks[0].path
    with InDouble():
        before = model(**inputs(model)).logits
        # Copies of others are, with the norms, outputs and heads behind masks.
        part = {"part": "encoder"} if family == "t5" else {}
        apply(upscaled(model, slices=[[0, 2], {"layers": [1, 2], "scale": 0.0}], **part), model, probe=inputs(model))
        assert change(before, model(**inputs(model)).logits) < 1e-12
    assert len(model.get_submodule(path)) == 3


def test_a_dense_layer_among_experts_can_come_first_where_the_config_can_say_so():
    config = {"num_hidden_layers": 6, "mlp_only_layers": [1, 4], "decoder_sparse_step": 1, "head_dim": 4}
    model = tiny("qwen3_moe", **config)
    expected = tiny("qwen3_moe", **{**config, "num_hidden_layers": 4, "mlp_only_layers": [0, 2]})
    weights = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    for new, old in enumerate([1, 2, 4, 5]):
        layer = model.model.layers[old].state_dict()
        weights |= {f"model.layers.{new}.{name}": value.clone() for name, value in layer.items()}
    expected.load_state_dict(weights)
    body = anatomy(model)
    edits = arrange(model, body, body.stacks[0], [1, 2, 4, 5])
    apply(Plan(method="by hand", promise="none", edits=edits), model)
    assert model.config.mlp_only_layers == [0, 2]
    assert torch.equal(logits(model), logits(expected))
