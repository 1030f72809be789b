"""A rotation of the residual stream changes no logit, on every architecture that takes one; the others say why not."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from auxin.edits import Plan, apply
from auxin.edits.structure import structural_edits
from auxin.errors import PlanError
from auxin.methods import method
from auxin.models.anatomy import anatomy
from auxin.planning import rotation
from auxin.planning.bench import Bench
from auxin.planning.rotation import Rotatable, rotatable
from tiny_models import MODELS, InDouble, inputs, logits, tiny

ROTATED = (
    "llama",  # biases everywhere
    "gemma",  # gains that are stored less one, tied, embeddings times the root of the width
    "mixtral",  # routers and experts
    "qwen2_moe",  # shared experts
    "phi3",  # fused matrices
    "deepseek_v3",  # queries and keys of low rank
    "gpt_oss",  # experts whose inputs come first
    "granite",  # multipliers of stream and logits
    "smollm3",  # tied
    "llama_for_texts",  # a head that is no table
)
WHOLE = [
    "qwen2 qwen3 mistral ministral qwen3_moe olmoe granitemoe glm deepseek_v2 glm4_moe dots1 ernie4_5_moe helium arcee",
    "apertus seed_oss hunyuan_v1_dense llama_for_tokens llama_for_answers qwen3_for_texts",
]
FAMILIES = [*ROTATED, *(pytest.param(family, marks=pytest.mark.whole) for line in WHOLE for family in line.split())]


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def rotated(found: Rotatable, by: Tensor, folder: Path) -> Plan:
    edits, files = found.edits(by, folder)
    return Plan(method="rotation", promise="exact", edits=edits, files=files).beside(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_what_they_were(family, tmp_path):
    model = tiny(family)
    tied, before = anatomy(model).tied, logits(model)
    found = rotatable(model)
    table = model.get_input_embeddings().weight.detach().clone()
    by = orthogonal(found.body.sizes.residual, 0)
    apply(rotated(found, by, tmp_path), model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10 * before.abs().max().item())
    torch.testing.assert_close(model.get_input_embeddings().weight, table @ by, rtol=0, atol=1e-12)
    assert tied == bool(found.untying)
    assert not anatomy(model).tied
    assert not structural_edits(model.config)


@settings(max_examples=6)
@given(seed=st.integers(0, 99), tied=st.booleans(), gains=st.sampled_from(["random", "with zeros", "ones"]))
def test_whatever_the_rotation_and_the_gains(seed, tied, gains, tmp_path_factory):
    model = tiny("llama", seed=seed, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[:] = 1 if gains == "ones" else parameter
                parameter[:3] *= 0 if gains == "with zeros" else 1
    before = logits(model)
    apply(rotated(rotatable(model), orthogonal(16, seed), tmp_path_factory.mktemp("rotation")), model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10 * before.abs().max().item())


def test_the_stream_is_the_rotated_one(tmp_path):
    model = tiny("llama")
    turned, by = copy.deepcopy(model), orthogonal(16, 1)
    apply(rotated(rotatable(model), by, tmp_path), turned)
    with InDouble(), torch.no_grad():
        old, new = (one.model(**inputs(model), output_hidden_states=True).hidden_states[:-1] for one in (model, turned))
    for before, after in zip(old, new, strict=True):
        torch.testing.assert_close(after, before @ by, rtol=0, atol=1e-12)


def test_every_norm_knows_what_reads_it():
    found = rotatable(tiny("mixtral")).readers
    layer = "model.layers.1"
    assert {name.removeprefix(f"{layer}.") for name in found[f"{layer}.input_layernorm"]} == {
        f"self_attn.{matrix}_proj.weight" for matrix in "qkv"
    }
    assert {name.removeprefix(f"{layer}.") for name in found[f"{layer}.post_attention_layernorm"]} == {
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj",
    }
    assert found["model.norm"] == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", "has LayerNorms, which take off the mean"),
        ("bert", "has LayerNorms"),
        ("gemma2", r"has norms behind the parts of model\.layers"),
        ("nanochat", "has norms without gains"),
        ("llama_without_head", "has no head: it gives the stream itself"),
        ("t5", "its token embedding, and would need a table of its own, which its config can't say"),
        ("clip", "has several towers"),
    ],
)
def test_what_a_rotation_would_change_is_refused(family, why):
    with pytest.raises(PlanError, match=rf"{why}.*Take a method that cuts units as they are: minitron"):
        rotatable(tiny(family))


def applied(name: str, **values: Any) -> Any:
    model, chosen = tiny("llama"), method(name)
    apply(chosen.plan(Bench(model), chosen.settings.parse(values)), model)
    return model


def test_a_stream_of_several_blocks_is_refused(monkeypatch):
    monkeypatch.setattr(rotation, "anatomy", lambda model: replace(anatomy(model), residual_blocks="wide"))
    with pytest.raises(PlanError, match="several blocks in its residual stream"):
        rotatable(tiny("llama"))


def test_bricks_are_rotated_with_their_model(tmp_path):
    model = applied("graft", tokens=4, targets=["self_attn.q_proj", "self_attn.o_proj"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # what a graft gives at first is nothing
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    before = logits(model)
    apply(rotated(rotatable(model), orthogonal(16, 2), tmp_path), model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10 * before.abs().max().item())


@pytest.mark.whole
def test_no_family_is_forgotten():
    """Those that are rotated are all those whose anatomy allows it."""
    takes = set()
    for family in MODELS:
        body = anatomy(tiny(family, dtype=torch.float32))
        before = all(stack.norm_position == "before" for stack in body.stacks)
        if body.norm == "rms" and before and body.norm_has_gain and body.head and body.final_norm:
            takes.add(family)
    assert takes - {"t5", "mt5", "umt5"} == {*ROTATED, *" ".join(WHOLE).split()}
