"""Every parameter of every known architecture has exactly one role, and the roles fit its shape."""

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from auxin.errors import PlanError
from auxin.models.anatomy import ANATOMIES, anatomy
from auxin.models.loading import skeleton
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


@pytest.mark.parametrize(("family", "config"), VARIANTS, ids=str)
def test_every_parameter_has_one_role_that_fits_its_shape(family, config):
    model = tiny(family, **config)
    found = anatomy(model)
    for name, parameter in model.named_parameters():
        roles = [role for role in found.roles if role.matches(name)]
        assert len(roles) == 1, name
        (role,) = roles
        assert len(role.axes) == len(role.access) == parameter.dim(), name
        for size, segments, access in zip(parameter.shape, role.axes, role.access, strict=True):
            assert (access is None) == (not segments), name
            if segments:
                assert sum(segment.size for segment in segments) == size, name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_names_exists_and_a_skeleton_suffices(family):
    model = tiny(family)
    found = anatomy(skeleton(model.config, type(model)))
    assert found == anatomy(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for stack in found.stacks:
        assert len(modules[stack.path]) == getattr(model.config, stack.length_field)
        for name in (*stack.outputs, *stack.output_norms):
            assert f"{stack.path}.0.{name}" in modules
    assert set(found.embeddings) <= set(parameters)
    assert found.head in modules
    assert found.final_norm is None or modules[found.final_norm].weight is not None
    for field in vars(found.fields).values():
        assert field is None or hasattr(model.config, field)


@pytest.mark.parametrize(
    ("family", "config"),
    [*((family, {}) for family in FAMILIES), ("gpt_neox", {"use_parallel_residual": False})],
    ids=str,
)
def test_the_parts_of_a_layer_read_each_other_unless_they_are_parallel(family, config):
    """By intervention: what the first part of a layer gives is changed, and the second part hears of it, or not."""
    model = tiny(family, **config)
    for stack in anatomy(model).stacks:
        first, second = (model.get_submodule(f"{stack.path}.0.{name}") for name in stack.outputs[:2])
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
    model = skeleton(PhiConfig(intermediate_size=8, num_hidden_layers=1, **values), PhiForCausalLM)
    with pytest.raises(PlanError, match=r"Unknown architecture 'phi'.*llama"):
        anatomy(model)


def test_another_package_can_register_an_architecture(tmp_path, monkeypatch):
    model = skeleton(PhiConfig(hidden_size=8, num_attention_heads=2, vocab_size=9, intermediate_size=8), PhiForCausalLM)
    model.config.model_type = "gpt2"
    monkeypatch.setattr(ANATOMIES, "_own", {"phi": lambda model: "described"})
    monkeypatch.setattr(ANATOMIES, "_complete", True)
    with pytest.raises(PlanError, match=r"Unknown architecture 'gpt2'\. Known: phi"):
        anatomy(model)
    ANATOMIES.add("gpt2", lambda model: "described elsewhere")
    assert anatomy(model, complete=False) == "described elsewhere"
