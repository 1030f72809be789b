"""Heads that go alone where the config doesn't say their dimension, but transformers' code would read it there."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

import auxin
from auxin.edits import ConfigureModule, Plan, SetConfig, apply
from auxin.errors import PlanError
from auxin.models.anatomy import anatomy
from auxin.models.configs import edited_config
from auxin.models.sublayers import sublayers
from auxin.planning.cutting import cut
from auxin.planning.removed_sublayers import without_sublayers
from auxin.planning.removed_units import without_units
from tiny_models import MODELS, change, filled, inputs, logits, tiny

OVER_ALL_HEADS = ("olmo2", "olmo3")
"""Those whose norms on queries and keys go over all heads together."""
FAMILIES = (
    *("apertus", "cohere", "cohere2", "dots1", "ernie4_5_moe", "exaone4", "glm4_moe", "granite", "granitemoe"),
    *("mixtral", "nanochat", "olmo", *OVER_ALL_HEADS, "phi3", "qwen2", "qwen2_moe", "qwen3_moe", "smollm3"),
    "starcoder2",
)


def unsaid(family, **more):
    """A tiny float32 model whose config doesn't say the head dimension."""
    model_class, config_class, values = MODELS[family]
    values = {**{key: value for key, value in values.items() if key != "head_dim"}, **more}
    return eager(filled(model_class(config_class(**values)), dtype=torch.float32))


def eager(model):
    """Experts one after the other: torch's grouped products take no rows of a tiny model's length."""
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")
    return model


def kept_heads(model):
    sizes = anatomy(model).sizes
    return list(
        range(sizes.query_heads // sizes.key_value_heads if sizes.key_value_heads > 1 else 1, sizes.query_heads)
    )


def masked(family, kept, layers=(0, 1), **more):
    """The model whose other heads reach nothing: their entries of attentions' outputs are zero, and norms over all
    heads are over those that stay."""
    model = unsaid(family, **more)
    sizes = anatomy(model).sizes
    dim, group = sizes.head_dim, sizes.query_heads // sizes.key_value_heads
    keys = sorted({head // group for head in kept})

    def over(heads):
        entries = [head * dim + entry for head in heads for entry in range(dim)]

        def normed(module, args, output):
            (x,) = args
            square = x[..., entries].pow(2).mean(-1, keepdim=True)
            return (module.weight * x * (square + module.variance_epsilon).rsqrt()).to(x.dtype)

        return normed

    for layer in layers:
        attention = model.get_submodule(f"model.layers.{layer}.self_attn")
        output = attention.dense if hasattr(attention, "dense") else attention.o_proj
        gone = [head * dim + entry for head in range(sizes.query_heads) if head not in kept for entry in range(dim)]
        with torch.no_grad():
            output.weight[:, gone] = 0
        if family in OVER_ALL_HEADS:
            attention.q_norm.register_forward_hook(over(kept))
            attention.k_norm.register_forward_hook(over(keys))
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "phi"])
def test_heads_go_alone_and_plain_transformers_loads_what_is_left(family, tmp_path):
    more = {"qk_layernorm": False} if family == "phi" else {}
    model = unsaid(family, **more)
    kept, dim, hidden = kept_heads(model), anatomy(model).sizes.head_dim, model.config.hidden_size
    expected = logits(masked(family, kept, **more))
    assert change(logits(model), expected) > 1e-2
    apply(Plan(method="cut", promise="none", edits=cut(model, {("query", ""): kept}).edits), model)
    assert (model.config.hidden_size, model.config.num_attention_heads) == (hidden, len(kept))
    assert model.config.head_dim == dim
    model.save_pretrained(tmp_path)
    loaded = eager(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert type(loaded) is type(model)
    assert change(expected, logits(loaded)) < 2e-5
    assert anatomy(loaded).fields.head_dim == "head_dim"


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "olmo", "phi3"])
def test_one_layer_can_have_fewer_heads_than_the_others(family):
    model = unsaid(family)
    kept = kept_heads(model)
    expected = logits(masked(family, kept, layers=[1]))
    edits = cut(model, {("query", "model.layers.1"): kept}).edits
    said = [edit for edit in edits if isinstance(edit, SetConfig | ConfigureModule)]
    assert [type(edit) for edit in said] == [SetConfig, ConfigureModule]
    assert said[0].values == {"head_dim": anatomy(model).sizes.head_dim}
    apply(Plan(method="cut", promise="none", edits=edits), model)
    assert change(expected, logits(model)) < 2e-5


def test_a_plan_says_that_the_config_gets_a_head_dimension():
    plan = auxin.plan(unsaid("qwen2"), "magnitude", heads=0.5)
    assert "head_dim = 4" in plan.notes[0]
    assert "may still divide" in plan.notes[0]
    assert not auxin.plan(unsaid("qwen2"), "magnitude", ffn=0.5).notes


def test_heads_and_residual_that_fit_each_other_leave_it_unsaid():
    plan = auxin.plan(unsaid("qwen2"), "magnitude", heads=0.5, hidden=0.5)
    values = plan.edits[0].values
    assert (values["hidden_size"], values["num_attention_heads"]) == (8, 2)
    assert "head_dim" not in values


@pytest.mark.parametrize("family", ["olmoe", "phi", "stablelm", "gpt2"])
def test_code_that_would_not_follow_is_not_told(family):
    """OLMoE's norm on queries is as long as the residual, that of Phi as hidden size / heads; StableLM and GPT-2 do not
    read a head dimension."""
    model = unsaid(family)
    assert anatomy(model).fields.heads_are_bound
    with pytest.raises(PlanError, match="has no value 'head_dim'"):
        edited_config(model.config, {"head_dim": 8})
    with pytest.raises(PlanError, match="hidden size = heads x dimension"):
        auxin.plan(model, "magnitude", heads=0.5)


def test_growth_still_takes_hidden_size_for_heads_x_dimension():
    model = unsaid("qwen2")
    plan = auxin.plan(model, "hypercloning", hidden_size=32)
    assert "head_dim" not in plan.edits[0].values
    assert anatomy(model).fields.head_dim is None


def test_a_config_forgets_what_it_need_not_say():
    config = edited_config(unsaid("qwen2").config, {"head_dim": 8})
    assert config.head_dim == 8
    assert "head_dim" not in edited_config(config, {"head_dim": None}).to_dict()


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "qwen2",
            {"hidden_size": 56, "num_attention_heads": 14},
            r"all of 14 .* \(the next possible: 7\). Ask for less",
        ),
        (
            "gpt2",
            {"n_embd": 56, "n_head": 14},
            r"no other number is possible alone.* Ask for heads = 13 with hidden = 52",
        ),
    ],
)
def test_where_no_head_would_go_the_message_names_the_numbers_that_are_possible(family, config, message):
    with pytest.raises(PlanError, match=message):
        auxin.plan(unsaid(family, **config), "magnitude", heads=0.95)


PATCHES = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "audio-spectrogram-transformer")


@pytest.mark.parametrize(
    ("family", "layers"),
    [*((family, (0, 1)) for family in PATCHES), *((family, (1,)) for family in PATCHES if family != "beit")],
)
def test_heads_of_encoders_of_patches_go_alone(family, layers, tmp_path):
    """What is left is what the model gives with the other heads silent, also when it is loaded again."""
    kept = [0, 2, 3]
    model, silent = tiny(family, dtype=torch.float32), tiny(family, dtype=torch.float32)
    (stack,) = anatomy(model).stacks
    paths = [f"{stack.path}.{layer}" for layer in layers]
    with torch.no_grad():
        for path in paths:
            silent.get_parameter(f"{path}.attention.o_proj.weight")[:, 4:8] = 0
    scopes = [""] if len(layers) == 2 else paths
    cut_heads = cut(model, {("query", scope): kept for scope in scopes}).edits
    apply(Plan(method="cut", promise="none", edits=cut_heads), model)
    assert model.get_parameter(f"{paths[0]}.attention.q_proj.weight").shape == (12, 16)
    assert model.config.head_dim == 4
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for made in (model, again):
        torch.testing.assert_close(output(made), output(silent), rtol=1e-5, atol=1e-5)


def output(model):
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


PATCHES = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "audio-spectrogram-transformer")


@pytest.mark.parametrize("family", PATCHES)
def test_heads_of_encoders_of_patches_go_a_second_time(family):
    """What the first time wrote into the config is read the second time: heads are not half as many and twice as
    wide."""
    whole = tiny(family)
    smaller = copy.deepcopy(whole)
    with pytest.warns(UserWarning, match="head_dim = 4"):
        apply(auxin.plan(whole, "random", heads=2, seed=1), smaller)
    sizes = anatomy(smaller).sizes
    assert (sizes.query_heads, sizes.head_dim, sizes.scoped) == (2, 4, ())
    smallest = copy.deepcopy(smaller)
    apply(auxin.plan(smaller, "random", heads=1, seed=2), smallest)
    assert smaller.num_parameters() > smallest.num_parameters()
    expected = []
    for gone in itertools.product((0, 1), repeat=2):
        masked = copy.deepcopy(smaller)
        outputs = [module for name, module in masked.named_modules() if name.endswith("attention.o_proj")]
        with torch.no_grad():
            for head, output in zip(gone, outputs, strict=True):
                output.weight[:, 4 * head : 4 * head + 4] = 0
        expected.append(logits(masked))
    got = logits(smallest)
    assert sum(change(each, got) < 1e-10 for each in expected) == 1


@pytest.mark.parametrize("family", [family for family in PATCHES if family != "beit"])  # whose biases are by heads
def test_a_layer_of_patches_without_a_head_is_known_and_further_parts_go(family):
    model = tiny(family)
    layer = anatomy(model).stacks[0].path + ".1"
    edits, _ = without_units(model, {("query", layer): [0, 2]})
    apply(Plan(method="by hand", promise="none", edits=edits), model)
    sizes = anatomy(model).sizes
    assert (sizes.query_heads, sizes.at(layer).query_heads, sizes.head_dim) == (4, 2, 4)
    parts = [one.path for one in sublayers(model)]
    apply(Plan(method="by hand", promise="none", edits=without_sublayers(model, [parts[1]])), model)
    assert torch.isfinite(logits(model)).all()
