"""A model without a sublayer is the model with that sublayer masked, and nothing of it is left."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from auxin.edits import ArrangeLayers, Plan, RemoveModule, apply, apply_to_checkpoint
from auxin.errors import PlanError
from auxin.models.loading import load_model
from auxin.models.sublayers import Sublayer, sublayers
from auxin.planning.removed_sublayers import layers_to_leave_out, refusals, without_layers, without_sublayers
from outputs import output
from tiny_models import FAMILIES, inputs, tiny

MORE = ("mixtral", "gptj", "bart", "opt", "modernbert", "falcon", "gemma2")
every_family = pytest.mark.parametrize("family", dict.fromkeys([*FAMILIES, *MORE]))


NORMED = {"self_attn": ["input_layernorm"], "mlp": ["post_attention_layernorm"]}
ALONG: dict[str, dict[str, list[str]]] = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mixtral"], NORMED),
    "olmo": {"self_attn": [], "mlp": []},  # norms without gains
    "tokenformer": {"attention": [], "mlp": []},  # the same
    "olmo2": {"post_attention_layernorm": ["self_attn"], "post_feedforward_layernorm": ["mlp"]},
    "gemma2": {
        "post_attention_layernorm": ["self_attn", "input_layernorm"],
        "post_feedforward_layernorm": ["mlp", "pre_feedforward_layernorm"],
    },
    "gpt2": {"attn": ["ln_1"], "mlp": ["ln_2"]},
    "gptj": {"attn": [], "mlp": []},  # both read one norm
    "gpt_neox": {"attention": ["input_layernorm"], "mlp": ["post_attention_layernorm"]},
    "falcon": {"self_attention": ["ln_attn"], "mlp": ["ln_mlp"]},
    "t5": {
        "layer.0.SelfAttention": ["layer.0.layer_norm"],
        "layer.1.EncDecAttention": ["layer.1.layer_norm"],
        "layer.1.DenseReluDense": ["layer.1.layer_norm"],
        "layer.2.DenseReluDense": ["layer.2.layer_norm"],
    },
    "bert": {"attention.output.dense": ["attention.self"], "output.dense": ["intermediate"]},  # norms behind sums
    "bart": {"self_attn": [], "encoder_attn": [], "fc2": ["fc1"]},  # the same
    "opt": {"self_attn": ["self_attn_layer_norm"], "fc2": ["fc1", "final_layer_norm"]},
    "vit": {"attention": ["layernorm_before"], "mlp": ["layernorm_after"]},
    "modernbert": {"attn": ["attn_norm"], "mlp": ["mlp_norm"]},  # the first layer's first one is none
}
"""What goes beside a sublayer, by its path in the layer: read off the modeling code of each architecture."""


def plan(edits: list[Any]) -> Plan:
    return Plan(method="by hand", promise="none", edits=edits)


def masked(model: Any, gone: list[Sublayer], **given: Any) -> Tensor:
    """The output with the sublayers' results set to zero."""
    handles = [
        model.get_submodule(sublayer.output).register_forward_hook(
            lambda module, arguments, result: (
                (torch.zeros_like(result[0]), *result[1:]) if isinstance(result, tuple) else torch.zeros_like(result)
            )
        )
        for sublayer in gone
    ]
    with torch.no_grad():
        found = output(model(**(given or inputs(model))))
    for handle in handles:
        handle.remove()
    return found


def without(model: Any, edits: list[Any]) -> Any:
    smaller = copy.deepcopy(model)
    apply(plan(edits), smaller)
    return smaller


@every_family
def test_removed_is_masked_to_the_bit(family):
    model = tiny(family)
    refused = refusals(model)
    known = sublayers(model)
    for sublayer in known:
        if sublayer.path in refused:
            continue
        smaller = without(model, without_sublayers(model, [sublayer.path]))
        with torch.no_grad():
            assert torch.equal(output(smaller(**inputs(model))), masked(model, [sublayer]))
        # Everything goes that had a part in this alone, and nothing else.
        inside = sublayer.path.removeprefix(f"{sublayer.layer}.")
        paths = [inside, *ALONG[family][inside]]
        wanted = {n for n, _ in model.named_parameters() for path in paths if n.startswith(f"{sublayer.layer}.{path}.")}
        left = {name for name, _ in smaller.named_parameters()}
        assert {name for name, _ in model.named_parameters()} - left == wanted
        entries = sum(model.get_parameter(name).numel() for name in wanted)
        assert model.num_parameters() - smaller.num_parameters() == entries > 0
        left = {one.path for one in sublayers(smaller)}
        assert left == {one.path for one in known} - {sublayer.path}


@every_family
def test_several_are_masked_to_the_bit_and_a_whole_layer_is_said_by_the_config(family):
    model = tiny(family)
    refused = refusals(model)
    of_last = [one for one in sublayers(model) if one.number == 1 and one.path not in refused]
    first = next(one for one in sublayers(model) if one.number == 0 and one.path not in refused)
    gone = [*of_last, first]
    edits = without_sublayers(model, [one.path for one in gone])
    smaller = without(model, edits)
    with torch.no_grad():
        assert torch.equal(output(smaller(**inputs(model))), masked(model, gone))
    if first.stack.norm_position != "after_residual" and not model.config.is_encoder_decoder:
        order = next(edit for edit in edits if isinstance(edit, ArrangeLayers)).order
        assert 1 not in order
        assert all(".1." not in edit.module for edit in edits if isinstance(edit, RemoveModule)) or len(order) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "olmo2", "tokenformer"])
def test_it_writes_with_a_cache_and_padding_and_comes_back(family, tmp_path):
    """Without the first layer's attention, which elsewhere counts the tokens, and another part."""
    model = tiny(family, dtype=torch.float32)
    refused = refusals(model)
    parts = [one for one in sublayers(model) if one.path not in refused]
    gone = [next(one.path for one in parts if one.kind == "attention"), parts[-1].path]
    model.save_pretrained(tmp_path / "old")
    made = plan(without_sublayers(model, gone))
    wanted = masked(model, [one for one in parts if one.path in gone])
    apply_to_checkpoint(made, tmp_path / "old", tmp_path / "new")
    loaded = load_model(tmp_path / "new")
    with torch.no_grad():
        assert torch.equal(output(loaded(**inputs(model))), wanted)
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(
        loaded.generate(ids, use_cache=True, **settings), loaded.generate(ids, use_cache=False, **settings)
    )
    # Padding on the left changes nothing of the text beside it, which is written on as alone.
    told = {"output_logits": True, "return_dict_in_generate": True}
    padded = loaded.generate(ids, use_cache=True, **settings, **told)
    alone = loaded.generate(ids[:1, 2:], use_cache=True, **{**settings, "attention_mask": mask[:1, 2:]}, **told)
    assert torch.equal(padded.sequences[0, -5:], alone.sequences[0, -5:])
    for one, other in zip(padded.logits, alone.logits, strict=True):
        torch.testing.assert_close(one[:1], other, rtol=1e-4, atol=1e-4)
    loaded.train()
    gradients = []
    for again in (False, True):
        if again:
            loaded.gradient_checkpointing_enable()
        loaded.zero_grad()
        loaded(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in loaded.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-2


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "llama", "bert"])
def test_a_model_that_lost_all_parts_of_a_kind_knows_the_others(family):
    model = tiny(family)
    known = sublayers(model)
    for kind in ("attention", "feed-forward"):
        gone = [one.path for one in known if one.kind == kind]
        left = [one for one in known if one.kind != kind]
        smaller = without(model, without_sublayers(model, gone))
        assert [(one.path, one.output, one.kind) for one in sublayers(smaller)] == [
            (one.path, one.output, one.kind) for one in left
        ]


def test_what_all_layers_need_stays():
    model = tiny("t5")
    first = "encoder.block.0.layer.0.SelfAttention"
    assert first in refusals(model)
    with pytest.raises(PlanError, match="needs what it returns"):
        without_sublayers(model, [first])


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ([], "nothing to remove"),
        (["model.layers.7.mlp"], "no sublayer 'model.layers.7.mlp'"),
        ([f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn", "mlp")], "nothing would be left"),
    ],
)
def test_impossible_removals_are_refused(gone, words):
    with pytest.raises(PlanError, match=words):
        without_sublayers(tiny("llama"), gone)


@every_family
def test_a_layer_left_out_passes_on_what_it_gets(family):
    model = tiny(family)
    layers = layers_to_leave_out(model)
    last = list(layers)[-1]
    smaller = without(model, without_layers(model, [last]))
    handle = model.get_submodule(last).register_forward_hook(
        lambda module, arguments, named, result: (
            (hidden := arguments[0] if arguments else named["hidden_states"]),
            (hidden, *result[1:]) if isinstance(result, tuple) else hidden,
        )[1],
        with_kwargs=True,
    )
    with torch.no_grad():
        assert torch.equal(output(smaller(**inputs(model))), output(model(**inputs(model))))
    handle.remove()


def test_layers_are_refused_where_none_would_be_left():
    model = tiny("llama")
    with pytest.raises(PlanError, match="nothing would be left"):
        without_layers(model, ["model.layers.0", "model.layers.1"])
    with pytest.raises(PlanError, match=r"no layer 'model\.layers\.5'"):
        without_layers(model, ["model.layers.5"])
