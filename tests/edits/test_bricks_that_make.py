"""The bricks whose tensors come from a whole module, through edits: applied, saved, loaded, trained on, merged back."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auxin.edits import MergeModule, Plan, ReplaceModule, apply, apply_to_checkpoint, inverse_plan
from auxin.edits.structure import structural_edits
from auxin.models.loading import load_model
from tiny_models import inputs, labels, tiny

CASES: dict[str, tuple[str, str, str, dict[str, Any], float]] = {
    "low rank": ("llama", "model.layers.*.mlp.down_proj", "low_rank_linear", {"rank": 7}, 2.0),
    "full rank": ("llama", "model.layers.*.mlp.down_proj", "low_rank_linear", {"rank": 16}, 1e-12),
    "low rank, GPT-2": ("gpt2", "transformer.h.*.attn.c_attn", "low_rank_conv1d", {"rank": 5}, 2.0),
    "block dense": ("llama", "model.layers.*.mlp.down_proj", "block_dense_linear", {"blocks": 2, "rank": 6}, 2.0),
    "block dense, GPT-2": ("gpt2", "transformer.h.*.mlp.c_fc", "block_dense_conv1d", {"blocks": 4, "rank": 8}, 2.0),
    "block shuffle": ("llama", "model.layers.*.mlp.down_proj", "block_shuffle_linear", {"blocks": 2}, 2.0),
    "block shuffle, GPT-2": ("gpt2", "transformer.h.*.mlp.c_fc", "block_shuffle_conv1d", {"blocks": 4}, 2.0),
    "guided": (
        "llama",
        "model.layers.*.mlp.down_proj",
        "guided",
        {"product": "block_shuffle_linear", "blocks": 2},
        1e-12,
    ),
    "guided, GPT-2": (
        "gpt2",
        "transformer.h.*.mlp.c_fc",
        "guided",
        {"product": "low_rank_conv1d", "guide": "product", "rank": 5},
        2.0,
    ),
    "experts": ("llama", "model.layers.*.mlp", "split_feed_forward", {"num_experts": 4}, 1e-12),
    "experts, GPT-2": ("gpt2", "transformer.h.*.mlp", "split_feed_forward_conv1d", {"num_experts": 3}, 1e-12),
    "experts, T5": ("t5", "encoder.block.*.layer.1.DenseReluDense", "split_feed_forward", {"num_experts": 2}, 1e-12),
    "routed experts": (
        "llama",
        "model.layers.*.mlp",
        "split_feed_forward",
        {"num_experts": 4, "experts_per_token": 2},
        2.0,
    ),
}
"""Family, modules, brick, settings, and by how much the logits may move."""
LOSES = ("low rank", "full rank", "block dense", "block shuffle", "guided, GPT-2")
"""Beginnings of the names of those that keep something near what was there, or its rounding."""
every_case = pytest.mark.parametrize("case", CASES)


def small(family: str) -> PreTrainedModel:
    sizes = {"llama": {"intermediate_size": 24}, "gpt2": {"n_inner": 24}, "t5": {"d_ff": 24}}[family]
    return tiny(family, **sizes)


def plan_of(case: str) -> Plan:
    _, module, brick, settings, _ = CASES[case]
    return Plan(method="x", promise="none", edits=[ReplaceModule(module=module, brick=brick, settings=settings)])


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
    loss = model(**inputs(model), labels=labels(model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@every_case
def test_it_is_applied_saved_loaded_and_merged_back(case, tmp_path):
    family, module, _, _, allowed = CASES[case]
    model = small(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    weights, before, states = copy.deepcopy(model.state_dict()), logits(model), len(optimizer.state)
    model.save_pretrained(tmp_path / "old")
    change = apply(plan_of(case), model, optimizer).max_relative_change
    assert change <= allowed
    assert (change < 1e-12) == (allowed < 1)
    # On the disk the same bits come out.
    apply_to_checkpoint(plan_of(case), tmp_path / "old", tmp_path / "new")
    loaded = load_model(tmp_path / "new")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert [key for key, value in loaded.state_dict().items() if not torch.equal(value, model.state_dict()[key])] == []
    assert torch.equal(logits(loaded), logits(model))
    # Moments went along, but for a router, and the model trains on.
    assert {id(parameter) for parameter in optimizer.state} <= {id(parameter) for parameter in model.parameters()}
    new = [name for name, parameter in model.named_parameters() if parameter not in optimizer.state]
    assert all("router" in name for name in new), new
    assert states
    merged = copy.deepcopy(loaded)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    # Merged back it is an ordinary model, of the product or of the same units.
    apply(Plan(method="x", promise="none", edits=[MergeModule(module=module)]), merged)
    assert structural_edits(merged.config) == []
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    if case.startswith(LOSES):
        torch.testing.assert_close(logits(merged), logits(loaded), rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-12)
    assert all(type(part) in (nn.Linear, Conv1D) for name, part in merged.named_modules() if name.endswith("down_proj"))


@every_case
def test_the_inverse_leads_back(case):
    model = small(CASES[case][0])
    weights, plan = copy.deepcopy(model.state_dict()), plan_of(case)
    back = inverse_plan(plan, model)
    apply(plan, model)
    apply(back, model)
    assert model.state_dict().keys() == weights.keys()
    if not case.startswith(LOSES):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-14)


def test_moments_of_factors_follow_the_chain_rule():
    model = small("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    layer = model.model.layers[0].mlp
    moments = {key: optimizer.state[layer.down_proj.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    apply(plan_of("low rank"), model, optimizer)
    a, b = layer.down_proj.output_factor, layer.down_proj.input_factor
    for power, key in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        torch.testing.assert_close(optimizer.state[a][key], moments[key] @ (b.detach() ** power).T)
        torch.testing.assert_close(optimizer.state[b][key], (a.detach() ** power).T @ moments[key])
