"""Hard attention reads the most probable tokens alone, in every architecture that hands its attention to a function."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import auxin
from auxin.edits import MergeModule, Plan, ReplaceModule
from auxin.errors import PlanError
from auxin.nn.attention_functions import calls_a_function
from auxin.nn.hard_attention import HardAttention
from auxin.nn.reading_few import hard
from covering import families
from nn.attentions import CASE, attention, called, projected
from oracles import axformer as oracle
from outputs import output
from tiny_models import FAMILIES, inputs, tiny

MORE = ("mistral", "gemma2", "deepseek_v3", "gpt_bigcode", "opt", "modernbert", "bart", "whisper", "beit", "wav2vec2")


def hardened(model: Any, keep: int, layers: slice = slice(None)) -> Any:
    """A copy of a model with hard attentions."""
    paths = [name for name, module in model.named_modules() if calls_a_function(module)][layers]
    assert paths
    settings = {"keep": keep}
    edits: Any = [ReplaceModule(module=path, brick="hard_attention", settings=settings) for path in paths]
    new = copy.deepcopy(model)
    auxin.apply(Plan(method="by hand", promise="none", edits=edits), new)
    return new


class FewOfEach(TorchFunctionMode):
    """Within it, of what a softmax over four axes gives, all but the largest entries of each row are zeros."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "softmax" or result.dim() != 4:
            return result
        rows = [
            [value if rank in sorted(range(len(row)), key=row.__getitem__)[-self.keep :] else 0.0
             for rank, value in enumerate(row)]
            for row in result.flatten(0, -2).tolist()
        ]  # fmt: skip
        return torch.tensor(rows, dtype=result.dtype).view_as(result)


@pytest.mark.parametrize("family", families(dict.fromkeys([*FAMILIES, *MORE]), "llama", "t5", "gemma2", "bart"))
def test_a_model_reads_what_the_largest_entries_of_its_maps_say(family):
    """Against the model's eager attention, with rows cut where its softmax gives them."""
    model = tiny(family)
    if family == "tokenformer":
        assert not any(map(calls_a_function, model.modules()))
        return
    given, keep = inputs(model), 3
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        with FewOfEach(keep):
            expected = output(eager(**given))
        got = output(hardened(model, keep)(**given))
        soft, all_of_them = output(model(**given)), output(hardened(model, 1000)(**given))
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    assert not torch.equal(got, soft)
    assert torch.equal(all_of_them, soft), "as many as there are keys are all of them, to the bit"


KEPT = {**CASE, "keep": st.integers(1, 10)}


@given(dtype=st.sampled_from([torch.float32, torch.float64]), **KEPT)
def test_rows_are_those_that_were_sorted_by_hand(heads, tokens, keep, samples, implementation, padding, seed, dtype):
    module = HardAttention.replacing(attention(*heads, implementation, dtype, seed), keep)
    hidden = torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        got, _, visible = called(module, hidden, padding, implementation)
        expected = torch.zeros(samples, tokens, heads[0] * 4, dtype=torch.float64)
        rows_of = projected(module, hidden)
        for sample in range(samples):
            for head in range(heads[0]):
                of_head = {
                    name: [token[head if name == "q" else head * heads[1] // heads[0]] for token in rows[sample]]
                    for name, rows in rows_of.items()
                }
                read = oracle.hard_attention(*of_head.values(), 0.5, visible.tolist(), keep)
                expected[sample, :, head * 4 : head * 4 + 4] = torch.tensor(read)
        expected = nn.functional.linear(expected, module.o_proj.weight.double())
    # The eager function of transformers, of which a map is cut, makes probabilities in float32, whatever the type: of
    # scores of some 50, with values of some 20, they are off by 50 x 20 x 6e-8 and less.
    in_float32 = dtype == torch.float32 or implementation == "eager" or tokens > keep
    rounding = 1e-4 if in_float32 else 1e-5
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=rounding)


@given(dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), **KEPT)
def test_maps_have_the_largest_entries_and_zeros(heads, tokens, keep, samples, implementation, padding, seed, dtype):
    soft = attention(*heads, implementation, dtype, seed)
    module = HardAttention.replacing(soft, keep)
    hidden = torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        result, weights, _ = called(module, hidden, padding, implementation)
        soft.config._attn_implementation = "eager"
        _, all_of_them, visible = called(soft, hidden, padding, "eager")
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    if tokens <= keep:
        return
    kept = weights != 0
    assert (kept.sum(-1) <= keep).all()
    assert not (kept & ~visible).any()
    assert torch.equal(weights[kept], all_of_them[kept]), "not renormalised"
    left_out = all_of_them.masked_fill(kept, 0).amax(-1)
    assert (left_out <= all_of_them.masked_fill(~kept, torch.inf).amin(-1)).all()


def test_of_equal_probabilities_no_more_are_taken():
    assert hard(torch.full((2, 5), 0.2), 3).count_nonzero(-1).tolist() == [3, 3]


# In models ------------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_hard_in_its_one_layer_and_writes_padded_texts_as_it_writes_them_alone(tmp_path):
    model = hardened(tiny("llama", dtype=torch.float32, max_position_embeddings=64), 4, slice(1, 2))
    auxin.save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    hard_ones = [name for name, module in loaded.named_modules() if isinstance(module, HardAttention)]
    assert hard_ones == ["model.layers.1.self_attn"]
    assert loaded.get_submodule(hard_ones[0]).keep == 4
    ids = inputs(model, batch=2, length=9)["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    texts = [ids[0], ids[1, :6]]
    padded = torch.stack([texts[0], torch.cat([torch.full((3,), 3), texts[1]])])
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    asked: Any = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    together = loaded.generate(padded, attention_mask=mask, **asked)[:, 9:]
    for use_cache in (True, False):
        for text, written in zip(texts, together, strict=True):
            alone = model.generate(
                text[None], attention_mask=torch.ones(1, len(text)).long(), use_cache=use_cache, **asked
            )
            assert alone[0, len(text) :].tolist() == written.tolist()
    static = loaded.generate(padded, attention_mask=mask, cache_implementation="static", disable_compile=True, **asked)
    assert static[:, 9:].tolist() == together.tolist()
    soft = tiny("llama", dtype=torch.float32, max_position_embeddings=64)
    assert soft.generate(padded, attention_mask=mask, **asked)[:, 9:].tolist() != together.tolist()


def test_gradients_are_the_same_when_layers_are_computed_again():
    models = [hardened(tiny("llama", dtype=torch.float32), 3).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    ids = inputs(models[0])["input_ids"]
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad), name
    assert models[0].get_submodule("model.layers.0.self_attn").config is models[0].config


def test_another_brick_of_the_same_kind_at_the_place_changes_how_many_are_read():
    model = hardened(hardened(tiny("bert"), 5), 3)
    assert torch.equal(*(output(one(**inputs(one))) for one in (model, hardened(tiny("bert"), 3))))


def test_it_merges_back_to_the_attention_that_it_was():
    soft, model = tiny("llama"), hardened(tiny("llama"), 3)
    paths = [name for name, module in model.named_modules() if isinstance(module, HardAttention)]
    apart = output(model(**inputs(model)))
    auxin.apply(Plan(method="soft", promise="none", edits=[MergeModule(module=path) for path in paths]), model)
    assert torch.equal(output(model(**inputs(model))), output(soft(**inputs(soft))))
    assert not torch.equal(output(model(**inputs(model))), apart)


def test_what_can_t_be_hard_is_refused():
    falcon = tiny("falcon")
    with pytest.raises(
        PlanError, match="a FalconAttention does not hand its queries and keys to an attention function"
    ):
        HardAttention.replacing(falcon.transformer.h[0].self_attention)
    with pytest.raises(PlanError, match=r"keep = 0. A query reads 1 token or more"):
        HardAttention.replacing(attention(1, 1, "sdpa", torch.float32, 0), 0)
    model = hardened(tiny("llama"), 3)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PlanError, match=r"attention is 'flex_attention'.*Call model.set_attn_implementation\('sdpa'\)"):
        model.model.layers[0].self_attn(torch.zeros(1, 4, 16, dtype=torch.float64), None, None)
