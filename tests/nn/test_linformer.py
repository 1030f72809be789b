"""Linformer's attention reads mixtures of tokens: what the equation says, in encoders of several kinds."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

import auxin
from auxin.accounting import flops_per_token
from auxin.edits import MergeModule, Plan, ReplaceModule, inverse_plan
from auxin.edits import apply as edits_apply
from auxin.errors import PlanError
from auxin.nn.attention_functions import calls_a_function
from auxin.nn.linformer import LinformerAttention, means_of_neighbours
from oracles import linformer as oracle
from outputs import output
from tiny_models import inputs, labels, tiny

PLACE = "bert.encoder.layer.*.attention.self"


def plan(kept: int, most: int, module: str = PLACE) -> Plan:
    settings = {"projected_length": kept, "max_length": most}
    edits: Any = [ReplaceModule(module=module, brick="linformer_attention", settings=settings)]
    return Plan(method="by hand", promise="none", edits=edits)


def projected(model: Any, kept: int, most: int, module: str = PLACE) -> Any:
    """A copy of a model with Linformer's attention, with random projections."""
    new = copy.deepcopy(model)
    auxin.apply(plan(kept, most, module), new)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in new.named_parameters():
        if name.endswith("_projection"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / most**0.5)
    return new


@given(
    heads=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 7),
    kept=st.integers(1, 8),
    padding=st.integers(0, 3),
    implementation=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 10**6),
)
def test_it_reads_what_the_equation_says(heads, tokens, kept, padding, implementation, seed):
    config = BertConfig(hidden_size=8, num_attention_heads=heads, attention_probs_dropout_prob=0.0)
    config._attn_implementation = implementation
    generator = torch.Generator().manual_seed(seed)
    module = LinformerAttention.replacing(BertSelfAttention(config).double().eval(), kept, 8)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn(2, tokens, 8, generator=generator, dtype=torch.float64)
    visible = torch.arange(tokens) < max(tokens - padding, 1)
    mask: Tensor | None = visible.expand(2, 1, tokens, tokens)
    if implementation == "eager":
        mask = torch.zeros(2, 1, tokens, tokens).double().masked_fill(~visible, torch.finfo(torch.float64).min)
    with torch.no_grad():
        got, maps = module(hidden, mask if padding else None)
        parts = [getattr(module, name)(hidden).unflatten(-1, (heads, -1)) for name in ("query", "key", "value")]
    if not padding:
        visible = torch.ones(tokens, dtype=torch.bool)
    matrices = [matrix[:, :tokens].tolist() for matrix in (module.key_projection, module.value_projection)]
    for sample in range(2):
        for head in range(heads):
            rows = oracle.head(*(part[sample, :, head].tolist() for part in parts), *matrices, visible.tolist())
            expected = torch.tensor(rows, dtype=torch.float64)
            torch.testing.assert_close(got[sample].unflatten(-1, (heads, -1))[:, head], expected)
    assert maps is None or maps.shape == (2, heads, tokens, kept)


ENCODERS = {
    "bert": PLACE,
    "vit": "vit.layers.*.attention",
    "whisper": "model.encoder.layers.*.self_attn",
    "bart": "model.decoder.layers.*.encoder_attn",
}


@pytest.mark.parametrize("family", ENCODERS)
def test_with_a_mixture_for_every_token_the_model_is_what_it_was(family):
    model = tiny(family)
    lengths = list[int]()
    paths = plan(1, 1, ENCODERS[family]).edits[0].paths(name for name, _ in model.named_modules())
    layers = dict(model.get_submodule(paths[0]).named_modules())
    hook = (layers.get("key") or layers["k_proj"]).register_forward_hook(
        lambda layer, given, result: lengths.append(result.shape[1])
    )

    def with_mixtures(kept: int) -> Tensor:
        new = copy.deepcopy(model)
        for path in paths:
            new.set_submodule(path, LinformerAttention.replacing(model.get_submodule(path), kept, lengths[0]))
        return output(new(**inputs(model)))

    with torch.no_grad():
        model(**inputs(model))
        hook.remove()
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            before = output(model(**inputs(model)))
            torch.testing.assert_close(with_mixtures(lengths[0]), before, rtol=1e-9, atol=1e-9)
            assert not torch.allclose(with_mixtures(2), before, rtol=1e-6, atol=1e-6)


@given(kept=st.integers(1, 12), length=st.integers(1, 8), implementation=st.sampled_from(["eager", "sdpa"]))
def test_padding_is_no_matter(kept, length, implementation):
    model = projected(tiny("bert"), kept, 32)
    model.set_attn_implementation(implementation)
    text = inputs(model, length=8)["input_ids"]
    mask = (torch.arange(8) < length).long().expand_as(text).clone()
    mask[0] = 1  # one text of full length beside it
    other = torch.where(mask.bool(), text, 5)
    with torch.no_grad():
        padded, changed = (output(model(input_ids=ids, attention_mask=mask)) for ids in (text, other))
        alone = output(model(input_ids=text[1:, :length]))
    torch.testing.assert_close(changed[mask.bool()], padded[mask.bool()], rtol=0, atol=0)
    torch.testing.assert_close(padded[1, :length], alone[0], rtol=1e-9, atol=1e-9)


@given(kept=st.integers(1, 20), more=st.integers(0, 20))
def test_it_starts_as_means_of_stretches(kept, more):
    matrix = means_of_neighbours(kept, kept + more)
    torch.testing.assert_close(matrix.sum(1), torch.ones(kept))
    owners = matrix.argmax(0)
    assert (owners.diff() >= 0).all()
    assert matrix.count_nonzero(0).eq(1).all()
    sizes = matrix.count_nonzero(1)
    assert sizes.max() - sizes.min() <= 1
    if not more:
        assert torch.equal(matrix, torch.eye(kept))


def test_flops_grow_with_the_length_alone():
    """Of a layer 2 n (12 d^2 + 4 k d), as the thesis on Greenformers counts them."""

    def flops(length: int) -> float:
        config = {"hidden_size": 32, "intermediate_size": 128, "max_position_embeddings": 256}
        plain = tiny("bert", **config, num_attention_heads=4)
        new, shorter = projected(plain, 8, 256), tiny("bert", **config, num_attention_heads=4, num_hidden_layers=1)
        one = flops_per_token(projected(shorter, 8, 256), length).forward
        return flops_per_token(new, length).forward - one

    for length in (16, 64, 256):
        assert flops(length) == 2 * (12 * 32**2 + 4 * 8 * 32)


def test_it_is_saved_loaded_trained_and_taken_back(tmp_path):
    plain = tiny("bert", dtype=torch.float32)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    model, weights = plain, copy.deepcopy(plain.state_dict())
    back = inverse_plan(plan(3, 32), model)
    edits_apply(plan(3, 32), model, optimizer)
    losses = []
    for _ in range(12):
        loss = model(**inputs(model), labels=labels(model)).loss
        loss.backward()
        assert model.get_parameter(f"{PLACE.replace('*', '0')}.key_projection").grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    auxin.save(model, tmp_path / "saved")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(output(loaded(**inputs(model))), output(model.eval()(**inputs(model))))
    attentions = [module for module in loaded.modules() if isinstance(module, LinformerAttention)]
    assert [tuple(module.key_projection.shape) for module in attentions] == [(3, 32)] * 2
    auxin.apply(Plan(method="x", promise="none", edits=[MergeModule(module=PLACE)]), loaded)
    auxin.apply(back, model)
    for one in (loaded, model):
        assert one.state_dict().keys() == weights.keys()
        assert not any(isinstance(module, LinformerAttention) for module in one.modules())


def test_a_second_one_changes_its_lengths():
    model = projected(tiny("bert"), 3, 32)
    auxin.apply(plan(4, 40), model)
    fresh = tiny("bert")
    auxin.apply(plan(4, 40), fresh)
    assert torch.equal(*(output(one(**inputs(one))) for one in (model, fresh)))


def hard() -> Plan:
    edits: Any = [ReplaceModule(module=PLACE, brick="hard_attention", settings={"keep": 3})]
    return Plan(method="by hand", promise="none", edits=edits)


def hardened() -> Any:
    model = tiny("bert")
    auxin.apply(hard(), model)
    return model


def longer() -> Any:
    return projected(tiny("bert", max_position_embeddings=80), 2, 64)(input_ids=torch.ones(1, 70).long())


def attention(family: str) -> nn.Module:
    return next(module for module in tiny(family).modules() if calls_a_function(module))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinformerAttention.replacing(attention("bert"), 0, 8), "projected_length = 0 of max_length = 8"),
        (lambda: LinformerAttention.replacing(attention("bert"), 9, 8), "Give 1 to max_length"),
        (lambda: LinformerAttention.replacing(attention("llama"), 2, 8), "LlamaAttention is causal.*of an encoder"),
        (
            lambda: LinformerAttention.replacing(tiny("falcon").transformer.h[0].self_attention, 2, 8),
            "does not hand its queries",
        ),
        (lambda: auxin.apply(plan(2, 32), hardened()), "another brick already"),
        (lambda: auxin.apply(hard(), projected(tiny("bert"), 2, 32)), "another brick already"),
        (lambda: auxin.apply(plan(2, 64, "encoder.block.0.layer.0.SelfAttention"), tiny("t5")), "relative positions"),
        (longer, "70 tokens, and it was made for"),
    ],
)  # fmt: skip
def test_what_can_t_be_projected_is_refused(make, words):
    with pytest.raises(PlanError, match=words):
        make()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_several_texts_in_one_sequence_are_refused(implementation):
    model = projected(tiny("bert"), 2, 32)
    model.set_attn_implementation(implementation)
    pairs = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()[None, None]
    if implementation == "eager":
        pairs = torch.zeros(1, 1, 7, 7).double().masked_fill(~pairs, torch.finfo(torch.float64).min)
    with pytest.raises(PlanError, match="several texts in one sequence"):
        model(input_ids=torch.ones(1, 7).long(), attention_mask=pairs)


def test_other_implementations_are_refused():
    model = projected(tiny("bert"), 2, 32)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PlanError, match=r"'flex_attention'.*Call model.set_attn_implementation\('sdpa'\)"):
        model.bert.encoder.layer[0].attention.self(torch.zeros(1, 4, 16, dtype=torch.float64))
