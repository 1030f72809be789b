"""What a config says of layers by their numbers follows a change of depth: against the old layers themselves, moved."""

import copy
import math

import pytest
import torch

from auxin.edits import Plan, apply, inverse_plan
from auxin.edits.diff import diff_checkpoints
from auxin.edits.kinds.edit import ArrangeLayers, SetConfig
from auxin.edits.resolution import resolve
from auxin.errors import PlanError
from auxin.models.loading import skeleton
from layered_models import FULL, LINEAR, SLIDING, ids, layered, llava, logits, moved, pair
from tiny_models import inputs, tiny


def plan(*edits, promise="none"):
    return Plan(method="by hand", promise=promise, edits=list(edits))


def arrange(order, path="model.layers"):
    return ArrangeLayers(layers=path, order=order)


CASES = [
    ("qwen3_moe", [0, 0, 1, 2, 3], {"mlp_only_layers": [0, 1, 3], "decoder_sparse_step": 1}),
    ("qwen3_moe", [0, 1, 2, 3, 0, 1], {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    ("dots1", [0, 0, 1, 2, 3], {"first_k_dense_replace": 2, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]}),
    ("dots1", [2, 3, 1], {"first_k_dense_replace": 0, "layer_types": [SLIDING, FULL, FULL]}),
    ("deepseek_v3", [0, 0, 0, 1, 2, 3], {"first_k_dense_replace": 3}),
    (
        "ernie4_5_moe",
        [0, 0, 1, 2, 3, 3],
        {"moe_layer_start_index": 2, "moe_layer_end_index": 5, "moe_layer_interval": 1},
    ),
    ("ernie4_5_moe", [1, 2, 0], {"moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 1}),
    (
        "llama4_text",
        [0, 1, 1, 2, 3],
        {"moe_layers": [1, 2, 4], "no_rope_layers": [1, 1, 1, 1, 0], "layer_types": [*["chunked_attention"] * 4, FULL]},
    ),
    ("jamba", [0, 0, 1], {"attn_layer_period": 3, "attn_layer_offset": 2, "expert_layer_period": 3}),
    ("bamba", [1, 0, 1, 2, 3], {"attn_layer_indices": [0, 2]}),
    ("qwen3_next", [1, 0, 2, 3, 3], {"layer_types": [FULL, LINEAR, LINEAR, FULL, FULL], "mlp_only_layers": [0]}),
    ("recurrent_gemma", [0, 0, 1, 3], {"block_types": ["recurrent", "recurrent", "attention", "attention"]}),
    ("gpt_neo", [0, 2, 1], {"attention_layers": ["global", "global", "local"]}),
    ("minicpm3", [0, 1, 1, 2, 3], {"scale_depth": pytest.approx(1.4 * math.sqrt(5 / 4), rel=1e-15)}),
    ("lfm2", [0, 1, 1, 3], {"layer_types": ["conv", FULL, FULL, FULL]}),
    ("gemma3_text", [0, 0, 1, 2, 3], {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]}),
]


@pytest.mark.parametrize(("name", "order", "said"), CASES)
def test_layers_stay_what_they_are_in_another_order(name, order, said):
    model = layered(name)
    path = "transformer.h" if name == "gpt_neo" else "model.layers"
    runs_by = {"num_hidden_layers": len(order), "layer_types": said.get("layer_types", [])}
    expected = logits(moved(model, path, order, runs_by))
    apply(plan(arrange(order, path)), model, probe=ids(model))
    assert {key: getattr(model.config, key) for key in said} == said
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["dots1", "bamba", "recurrent_gemma", "gpt_neo", "gemma4_text"])
def test_the_saved_model_is_read_again(name, tmp_path):
    """Also special numbers in a config (Bamba's limits are infinite)."""
    model = layered(name, torch.float32)
    apply(
        plan(arrange([0, 0, 1, 2, 3], "transformer.h" if name == "gpt_neo" else "model.layers")),
        model,
        probe=ids(model),
    )
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    again.set_experts_implementation("eager")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("name", "order", "message"),
    [
        (
            "dots1",
            [0, 1, 0, 2],
            r"first_k_dense_replace = 1 these of 4 layers are dense: 0\. In .*be 0, 2, and no value",
        ),
        (
            "jamba",
            [0, 1, 1, 2],
            r"attn_layer_period = 2, attn_layer_offset = 1 these of 4 layers are of attention: 1, 3",
        ),
        ("ernie4_5_moe", [1, 0, 2], "moe_layer_start_index = 1, moe_layer_end_index = 3, moe_layer_interval = 1"),
        ("gemma4_text", [0, 1, 3, 2], r"layer_types\[3\] would have to be 'sliding_attention'.*makes 'full_attention'"),
        ("zamba2", [0, 1, 2, 3, 1], r"layers 1, 3 of model\.layers hold one tensor \(shared_transformer.*each once"),
    ],
)
def test_what_a_config_cannot_say_is_refused_by_name(name, order, message):
    with pytest.raises(PlanError, match=message):
        resolve([arrange(order)], skeleton(layered(name).config, type(layered(name))))


def test_layers_around_shared_ones_are_copied_and_dropped():
    """Zamba2's tables by number are right in a model that is built with these layers, its tensors renamed."""
    model = layered("zamba2")
    order = [0, 0, 1, 3]
    built = layered("zamba2", num_hidden_layers=4, layers_block_type=[LINEAR, LINEAR, "hybrid", "hybrid"])
    old = model.state_dict()
    for new, source in enumerate(order):
        for key in [key for key in old if key.startswith(f"model.layers.{source}.")]:
            built.state_dict()[key.replace(f".{source}.", f".{new}.", 1)].copy_(old[key])
    for key in old.keys() - {key for key in old if key.startswith("model.layers.")}:
        built.state_dict()[key].copy_(old[key])
    apply(plan(arrange(order)), model, probe=ids(model))
    assert torch.equal(logits(model), logits(built))


def test_tensors_with_entries_of_every_layer_are_arranged_with_them():
    """Gemma 4's embeddings per layer: the layer on top is left out when its entries, and those of no other, go."""
    model = layered("gemma4_text")
    table, order = model.model.embed_tokens_per_layer.weight.detach().clone(), [0, 2, 1, 1, 3]
    apply(plan(arrange(order)), model, probe=ids(model))
    new = model.model.embed_tokens_per_layer.weight
    assert new.shape == (table.shape[0], 5 * 8)
    for place, source in enumerate(order):
        assert torch.equal(new[:, 8 * place : 8 * place + 8], table[:, 8 * source : 8 * source + 8])
    back = copy.deepcopy(model)
    apply(plan(arrange([0, 1, 2, 3, 4])), back, probe=ids(back))
    assert torch.equal(back.model.embed_tokens_per_layer.weight, new)


@pytest.mark.parametrize(
    ("make", "path", "key"),
    [
        (llava, "model.language_model.layers", "text_config.num_hidden_layers"),
        (llava, "model.vision_tower.encoder.layers", "vision_config.num_hidden_layers"),
        (pair, "encoder.encoder.layer", "encoder.num_hidden_layers"),
        (pair, "decoder.transformer.h", "decoder.n_layer"),
    ],
)
def test_the_config_within_that_counts_the_layers_is_the_one_that_changes(make, path, key):
    model = make()
    part, _, name = key.partition(".")
    held = getattr(model.config, part)
    old, others = getattr(held, name), {k: v for k, v in model.config.to_dict().items() if k != part}
    before, inner = logits(model), moved(model, path, [0, 0, *range(1, old)], {name: old + 1})
    change = plan(arrange([0, 0, *range(1, old)], path))
    back = inverse_plan(change, model)
    apply(change, model, probe=ids(model))
    assert getattr(model.config, part) is held
    assert getattr(held, name) == old + 1
    assert {k: v for k, v in model.config.to_dict().items() if k != part} == others
    assert torch.equal(logits(model), logits(inner))
    apply(back, model, probe=ids(model))
    assert getattr(held, name) == old
    assert torch.equal(logits(model), before)


def test_the_hidden_states_of_an_image_that_are_read_stay_those_of_their_layer():
    model = llava()
    assert model.config.vision_feature_layer == -2, "what layer 1 of 3 makes"
    resolved = resolve([arrange([0, 1, 1, 2, 2], "model.vision_tower.encoder.layers")], model)
    assert resolved.after.config.vision_feature_layer == -3
    with pytest.raises(PlanError, match=r"vision_feature_layer = -2: what layer 1 makes is read, which is gone"):
        resolve([arrange([0, 2], "model.vision_tower.encoder.layers")], model)


def test_values_of_configs_within_have_dotted_names(tmp_path):
    model = llava(torch.float32)
    old = model.config.text_config.rms_norm_eps
    model.save_pretrained(tmp_path / "old")
    change = plan(SetConfig(values={"text_config.rms_norm_eps": 0.5}))
    back = inverse_plan(change, model)
    assert back.edits == [SetConfig(values={"text_config.rms_norm_eps": old})]
    apply(change, model, probe=ids(model))
    assert model.model.language_model.config.rms_norm_eps == model.config.text_config.rms_norm_eps == 0.5
    assert {layer.input_layernorm.variance_epsilon for layer in model.model.language_model.layers} == {0.5}
    model.save_pretrained(tmp_path / "new")
    assert diff_checkpoints(tmp_path / "old", tmp_path / "new").config == {"text_config.rms_norm_eps": (old, 0.5)}
    for key, message in (
        ("text_config.nonsense", "LlamaConfig has no value 'nonsense'"),
        ("speech_config.num_hidden_layers", r"LlavaConfig has no config 'speech_config' within; it has .*text_config"),
        ("text_config.num_attention_heads", r"text_config\.num_attention_heads = 3|hidden_size|refuses"),
    ):
        with pytest.raises(PlanError, match=message):
            resolve([SetConfig(values={key: 3})], model)
    with pytest.raises(PlanError, match=r"set dtype = float99\): the config refuses it: .*float99"):
        resolve([SetConfig(values={"dtype": "float99"})], model)


def test_a_config_that_keeps_another_value_is_found_out():
    model = layered("gemma4_text")
    with pytest.raises(PlanError, match=r"layer_types\[3\] would have to be 'sliding_attention'"):
        resolve([SetConfig(values={"layer_types": [SLIDING, FULL, SLIDING, SLIDING]})], model)


def test_a_factor_of_the_number_of_a_layer_breaks_a_promise_only():
    model = tiny("gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    apply(plan(arrange([0, 1, 1, 2], "transformer.h")), model, probe=inputs(model))
    assert [layer.attn.layer_idx for layer in model.transformer.h] == [0, 1, 2, 3]
    scales = [layer.attn.scaling * (number + 1) for number, layer in enumerate(model.transformer.h)]
    assert scales == pytest.approx([scales[0]] * 4)
