"""Every parameter of every known architecture has exactly one role, and the roles fit its shape."""

import pytest
import torch
from transformers import XGLMConfig, XGLMForCausalLM

from auxin.edits import ConfigureModule, Plan, SetConfig, SliceParameter, apply
from auxin.edits.structure import edited_skeleton
from auxin.errors import PlanError
from auxin.models.anatomy import ANATOMIES, anatomy
from auxin.models.loading import skeleton
from auxin.words.widths import Sizes, Width
from cut_models import FFN, layer, narrow_edits, narrow_plan
from tiny_models import FAMILIES, inputs, labels, logits, tiny

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": True}) for family in ("llama", "qwen3", "olmo", "gpt_neox", "tokenformer")),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt2", {"n_inner": None}),
    ("bert", {"tie_word_embeddings": False}),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
    ("qwen3", {"attention_bias": True}),
    ("gemma", {}),
]


def assert_roles_fit(model, found):
    """Every parameter has one role, whose segments add up to its shape."""
    for name, parameter in model.named_parameters():
        roles = [role for role in found.roles if role.matches(name)]
        assert len(roles) == 1, name
        (role,) = roles
        assert len(role.axes) == len(role.access) == parameter.dim(), name
        for size, segments, access in zip(parameter.shape, role.axes, role.access, strict=True):
            assert (access is None) == (not segments), name
            if segments:
                assert sum(segment.size for segment in segments) == size, name


@pytest.mark.parametrize(("family", "config"), VARIANTS, ids=str)
def test_every_parameter_has_one_role_that_fits_its_shape(family, config):
    model = tiny(family, **config)
    found = anatomy(model)
    assert_roles_fit(model, found)
    # All layers are alike: one pattern for all of them, and one width for the model.
    assert found.sizes.scoped == ()
    assert {segment.scope for role in found.roles for axis in role.axes for segment in axis} <= {""}
    stacks = [stack.path for stack in found.stacks]
    inside = [role.pattern for role in found.roles if any(role.pattern.startswith(f"{path}.") for path in stacks)]
    assert inside
    assert all(any(pattern.startswith(f"{path}.*") for path in stacks) for pattern in inside)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_names_exists_and_a_skeleton_suffices(family):
    model = tiny(family)
    found = anatomy(skeleton(model.config, type(model)))
    assert found == anatomy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for stack in found.stacks:
        assert len(modules[stack.path]) == getattr(model.config, stack.length_field)
        # Layers may lack some of the outputs, which serve several architectures.
        assert any(f"{stack.path}.0.{name}" in modules for name in stack.outputs)
        for name in stack.output_norms:
            assert f"{stack.path}.0.{name}" in modules
    assert set(found.embeddings) <= set(parameters)
    assert found.head in modules
    assert found.final_norm is None or modules[found.final_norm].weight is not None
    own = [name for names in found.fields.by_stack.values() for name in names.values()]
    # A head dimension that the code reads is no field of the config before it is written there.
    apart = ("by_stack", "unsaid_head_dim", "of_layers")
    for value in (own, *(value for name, value in vars(found.fields).items() if name not in apart)):
        fields = value if isinstance(value, list | tuple) else (value,)
        assert all(field is None or hasattr(model.config, field) for field in fields)


@pytest.mark.parametrize(
    ("family", "config"),
    [*((family, {}) for family in FAMILIES), ("gpt_neox", {"use_parallel_residual": False})],
    ids=str,
)
def test_the_parts_of_a_layer_read_each_other_unless_they_are_parallel(family, config):
    """By intervention: what the first part of a layer gives is changed, and the second part hears of it, or not."""
    model = tiny(family, **config)
    for stack in anatomy(model).stacks:
        modules = dict(model.named_modules())
        paths = [path for name in stack.outputs if (path := f"{stack.path}.0.{name}") in modules]
        first, second = (modules[path] for path in paths[:2])
        heard = []
        second.register_forward_hook(lambda module, inputs, output, heard=heard: heard.append(output))
        logits(model)
        handle = first.register_forward_hook(lambda module, inputs, output: 2 * output)
        logits(model)
        handle.remove()
        assert torch.equal(*heard) == stack.parallel


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_run_in_double_precision(family):
    model = tiny(family)
    assert logits(model).dtype == torch.float64
    loss = model(**inputs(model), labels=labels(model)).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    values = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    model = skeleton(XGLMConfig(ffn_dim=8, num_layers=1, **values), XGLMForCausalLM)
    with pytest.raises(PlanError, match=r"Unknown architecture 'xglm'.*llama"):
        anatomy(model)


def test_another_package_can_register_an_architecture(tmp_path, monkeypatch):
    model = skeleton(XGLMConfig(d_model=8, attention_heads=2, vocab_size=9, ffn_dim=8), XGLMForCausalLM)
    model.config.model_type = "gpt2"
    described = anatomy(tiny("llama"))
    monkeypatch.setattr(ANATOMIES, "_own", {"xglm": lambda model: "described"})
    monkeypatch.setattr(ANATOMIES, "_complete", True)
    with pytest.raises(PlanError, match=r"Unknown architecture 'gpt2'\. Known: xglm"):
        anatomy(model)
    ANATOMIES.add("gpt2", lambda model: described)
    assert anatomy(model, complete=False).sizes is described.sizes


# Widths by scope -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FFN)
def test_a_layer_that_was_cut_has_its_own_width_and_roles(family):
    model = tiny(family)
    apply(narrow_plan(family), model, probe=inputs(model))
    found = anatomy(model)
    assert_roles_fit(model, found)
    assert found.sizes.scoped == (Width("ffn", layer(family), 6),)
    assert found.sizes.ffn == 12
    stack = FFN[family][0]
    assert set(found.scopes("ffn")) == {f"{stack}.0", f"{stack}.1"} | ({""} if family == "t5" else set())
    assert found.scopes("query") == [""]
    assert anatomy(edited_skeleton(model.config, type(model))) == found


@pytest.mark.parametrize("family", FFN)
def test_a_stack_of_like_layers_keeps_its_patterns(family):
    model = tiny(family)
    apply(narrow_plan(family, "*"), model, probe=inputs(model))
    found = anatomy(model)
    assert_roles_fit(model, found)
    stack = FFN[family][0]
    assert found.sizes == Sizes(
        found.sizes.residual, 4, found.sizes.key_value_heads, found.sizes.head_dim, 12
    ).with_widths([Width("ffn", stack, 6)])
    assert {role.pattern for role in found.roles} == {role.pattern for role in anatomy(tiny(family)).roles}
    # What every layer has, the config could say: then there is no scope.
    model = tiny(family)
    (field,) = narrow_edits(family, "*")[0].values
    edits = [SetConfig(values={field: 6}), *narrow_edits(family, "*")[1:]]
    if family == "t5":
        names = {"wi": 0, "wo": 1}
        path = "encoder.block.*.layer.1.DenseReluDense.{}.weight"
        edits += [SliceParameter(parameter=path.format(n), axis=a, index=[*range(6)]) for n, a in names.items()]
    apply(Plan(method="cut", promise="none", edits=edits), model, probe=inputs(model))
    assert anatomy(model).sizes.scoped == ()
    assert anatomy(model).sizes.ffn == 6


def heads_cut(model, number=1):
    """Two of four query heads and one of two key-value heads in a layer of a Llama."""
    path = f"model.layers.{number}.self_attn"
    kept = {"q_proj": [2, 3], "k_proj": [1], "v_proj": [1]}
    edits = [
        SliceParameter(parameter=f"{path}.{name}.{kind}", axis=0, index=index, unit=4)
        for name, index in kept.items()
        for kind in ("weight", "bias")
    ]
    edits.append(SliceParameter(parameter=f"{path}.o_proj.weight", axis=1, index=[2, 3], unit=4))
    values = {"num_attention_heads": 2, "num_key_value_heads": 1}
    apply(Plan(method="cut", promise="none", edits=[ConfigureModule(module=path, values=values), *edits]), model)


def test_layers_with_fewer_heads_have_their_own_numbers():
    model = tiny("llama")
    heads_cut(model)
    found = anatomy(model)
    assert_roles_fit(model, found)
    layers = ["model.layers.0", "model.layers.1"]
    assert found.scopes("query") == found.scopes("key_value") == layers
    assert found.scopes("ffn") == [""]
    assert found.sizes.at(layers[0]) == Sizes(16, 4, 2, 4, 12)
    assert found.sizes.at(layers[1]) == Sizes(16, 2, 1, 4, 12)
    assert found.grouped
    single = tiny("llama", num_key_value_heads=4)
    assert not anatomy(single).grouped


@pytest.mark.parametrize("scopes", [["model.layers.1"], ["model.layers"]])
def test_scopes_are_told_apart_on_request(scopes):
    model = tiny("llama")
    found = anatomy(model, scopes=scopes)
    assert_roles_fit(model, found)
    assert found.sizes == anatomy(model).sizes
    expected = ["model.layers.0", "model.layers.1"] if scopes[0][-1] == "1" else scopes
    assert all(found.scopes(stream) == expected for stream in ("query", "key_value", "ffn"))
    assert found.scopes("residual") == [""]


def test_a_scope_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(PlanError, match=r"'model.layers.2' is no stack and no layer.*model\.layers \(2 layers\)"):
        anatomy(tiny("llama"), scopes=["model.layers.2"])


def test_heads_of_another_dimension_in_one_layer_are_refused():
    model = tiny("llama")
    path = "model.layers.1.self_attn"
    edits = [ConfigureModule(module=path, values={"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1})]
    apply(Plan(method="odd", promise="none", edits=edits), skeleton_of := edited_skeleton(model.config, type(model)))
    with pytest.raises(PlanError, match="heads of dimension 8, the model of 4"):
        anatomy(skeleton_of)


def test_tensors_of_a_layer_that_disagree_are_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(6, 16)
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.down_proj\.weight has 6 entries along ffn.*12 units of 1"):
        anatomy(model)
