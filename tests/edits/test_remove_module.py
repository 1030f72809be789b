"""Whatever module of a layer goes, the model runs, writes and reloads without it; what others need can't go."""

import pytest
import torch
from transformers import PreTrainedModel

from auxin.edits import Plan, RemoveModule, apply, apply_to_checkpoint
from auxin.edits.structure import structural_edits
from auxin.errors import PlanError
from auxin.models.loading import load_model
from tiny_models import inputs, tiny

SILENCED = {
    "llama": ("model.layers.0.self_attn", ["o_proj"]),
    "qwen3": ("model.layers.1.self_attn", ["o_proj"]),
    "gpt2": ("transformer.h.0.attn", ["c_proj"]),
    "gpt_neox": ("gpt_neox.layers.0.attention", ["dense"]),
    "t5": ("decoder.block.1.layer.0.SelfAttention", ["o"]),
    "vit": ("vit.layers.0.attention", ["o_proj"]),
}
"""By family an attention, and what in it must be zero for the attention to be nothing."""


def removal(module: str, leaves: str = "zeros", promise: str = "none") -> Plan:
    return Plan(method="by hand", promise=promise, edits=[RemoveModule(module=module, leaves=leaves)])


def silent(family: str) -> tuple[PreTrainedModel, str]:
    """A model one of whose attentions gives zeros, and its path."""
    model = tiny(family)
    path, outputs = SILENCED[family]
    with torch.no_grad():
        for name in outputs:
            for parameter in model.get_submodule(f"{path}.{name}").parameters():
                parameter.zero_()
    return model, path


@pytest.mark.parametrize("family", SILENCED)
def test_without_an_attention_that_gives_zeros_the_model_is_the_same(family, tmp_path):
    model, path = silent(family)
    model.save_pretrained(tmp_path / "old")
    assert apply(removal(path, promise="exact"), model).max_relative_change == 0
    assert apply_to_checkpoint(removal(path, promise="exact"), tmp_path / "old", tmp_path / "new").parameters_after == (
        model.num_parameters()
    )
    loaded = load_model(tmp_path / "new")
    (stored,) = structural_edits(loaded.config)
    assert stored.returns[:1] == ["hidden"]
    for batch in (1, 2, 3):
        sample = {name: torch.cat([value] * 3)[:batch] for name, value in inputs(model).items()}
        with torch.no_grad():
            wanted = silent(family)[0](**sample).logits
            assert torch.equal(model(**sample).logits, wanted)
            assert torch.equal(loaded(**sample).logits, wanted)


@pytest.mark.parametrize("family", [family for family in SILENCED if family != "vit"])
def test_it_writes_the_same_with_and_without_a_cache(family):
    model, path = silent(family)
    ids = inputs(model)["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, use_cache=False, **settings)
    apply(removal(path), model)
    assert torch.equal(model.generate(ids, use_cache=True, **settings), wanted)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), wanted)


def test_all_attentions_of_a_bert_may_go():
    model = tiny("bert")
    apply(removal("bert.encoder.layer.*.attention.self"), model)
    for batch in (1, 2, 3):
        sample = {name: torch.cat([value] * 3)[:batch] for name, value in inputs(model).items()}
        assert model(**sample).logits.shape[0] == batch


@pytest.mark.parametrize(
    ("family", "module", "words"),
    [
        ("t5", "decoder.block.0.layer.0.SelfAttention", "can't be removed: .* needs what it returns"),
        ("llama", "model.layers.0.self_attn.k_proj", "can't be removed: it makes a tensor of shape"),
        ("llama", "model.layers.*.mlpp", "no module has this path"),
    ],
)
def test_what_others_need_can_not_go(family, module, words):
    with pytest.raises(PlanError, match=words):
        apply(removal(module), tiny(family))
