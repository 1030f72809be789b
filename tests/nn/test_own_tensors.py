"""A head that shared its tensor with the embedding has one of its own, and nothing else changes."""

import torch

from auxin.edits import MakeParameters, Plan, ScaleParameter, SetConfig, apply
from tiny_models import logits, tiny

UNTIED = [
    SetConfig(values={"tie_word_embeddings": False}),
    MakeParameters(module="lm_head", making="own_tensors"),
]


def test_the_head_is_the_embedding_no_more():
    model = tiny("gemma")
    before, table = logits(model), model.model.embed_tokens.weight.detach().clone()
    apply(Plan(method="own head", promise="exact", edits=UNTIED), model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, table)
    assert torch.equal(logits(model), before)


def test_later_edits_change_one_of_the_two():
    model = tiny("gemma")
    before, table = logits(model), model.model.embed_tokens.weight.detach().clone()
    edits = [*UNTIED, ScaleParameter(parameter="lm_head.weight", factor=2)]
    apply(Plan(method="own head", promise="none", edits=edits), model)
    assert torch.equal(model.model.embed_tokens.weight, table)
    torch.testing.assert_close(logits(model), 2 * before, rtol=1e-12, atol=0)
