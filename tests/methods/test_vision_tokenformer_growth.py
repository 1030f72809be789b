"""Growth of a TokenFormer of images by parameter tokens: what is exact, what of the optimizer follows, and where."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import auxin
from auxin.errors import PlanError
from auxin.methods.grow.tokenformer import (
    REGIMES,
    OldTokenRates,
    Regime,
    TauAnneal,
    TokenGrowth,
    plan_token_growth,
    token_growth_to,
)
from auxin.models.tokenformer import preset_config
from auxin.models.tokenformer.slots import SLOTS
from auxin.nn.pattention import Pattention
from tiny_models import inputs, tiny

EXACT: tuple[Regime, ...] = ("grouped", "zero_keys", "annealed", "duplicate", "padding")
START, GROWN = (10, 9, 14), (20, 18, 28)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).logits
    return found


def change(before: Tensor, after: Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(**inputs(model), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()


def trained(model: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        step(model, optimizer)
    return optimizer


@pytest.mark.parametrize("norm_parameters", [False, True])
@pytest.mark.parametrize("score_function", ["l2_norm_gelu", "gelu", "softmax"])
@pytest.mark.parametrize("regime", EXACT)
def test_exact_regimes_keep_the_function_of_a_trained_model(
    regime: Regime, score_function: str, norm_parameters: bool
) -> None:
    model: Any = tiny(
        "vision_tokenformer",
        score_function=score_function,
        proj_score_function=score_function,
        norm_parameters=norm_parameters,
    )
    optimizer = trained(model)
    before = logits(model)
    if score_function == "softmax" and regime in ("zero_keys", "annealed", "padding"):
        with pytest.raises(PlanError, match="under the softmax score function a zero key has weight"):
            auxin.grow(model, *GROWN, regime)
        return
    receipt = auxin.grow(model, *GROWN, regime, optimizer)
    assert receipt.plan.promise == "exact"
    assert change(before, logits(model)) < 1e-10
    assert tuple(sum(model.config.group_sizes(slot)) for slot in SLOTS) == GROWN
    assert model.config.num_parameters() == model.num_parameters()
    step(model, optimizer)
    assert change(before, logits(model)) > 1e-6


def test_every_exact_regime_is_tried() -> None:
    """Those of which the module's table says so."""
    rest = {"random_keys_zero_values": "approximate", "official": "none"}
    assert {*EXACT, *rest} == set(REGIMES)
    for regime, promise in rest.items():
        model: Any = tiny("vision_tokenformer", proj_score_function="l2_norm_gelu")
        receipt = auxin.grow(model, *GROWN, regime)  # type: ignore[arg-type] # from the keys of a dictionary
        assert (receipt.plan.promise, receipt.max_relative_change > 0.01) == (promise, True)


def test_moments_stay_with_their_tokens_and_start_at_zero_for_new_ones() -> None:
    model: Any = tiny("vision_tokenformer")
    optimizer = trained(model)
    names = [name for name, _ in model.named_parameters()]
    before = {name: optimizer.state[dict(model.named_parameters())[name]]["exp_avg"].clone() for name in names}
    auxin.grow(model, *GROWN, optimizer=optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    grown = 0
    for name, parameter in model.named_parameters():
        moment, old = optimizer.state[parameter]["exp_avg"], before[name]
        assert id(parameter) in held
        assert torch.equal(moment[: len(old)], old)
        assert moment.shape == parameter.shape
        assert not moment[len(old) :].any()
        grown += len(moment) > len(old)
    assert grown == 2 * 5 * 2
    step(model, optimizer)


PROGRAM = """
import sys
import torch
import auxin
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
probe = load_file(sys.argv[1] + "/probe.safetensors")
with torch.no_grad():
    assert torch.equal(model(pixel_values=probe["pixel_values"]).logits, probe["logits"])
receipt = auxin.grow(model, 30, 27, 42)
print(model.config.ffn_tokens, receipt.max_relative_change < 1e-5)
"""


def test_a_grown_model_loads_in_a_new_process_and_grows_on(tmp_path: Path) -> None:
    model: Any = tiny("vision_tokenformer", dtype=torch.float32)
    auxin.grow(model, *GROWN)
    receipt = auxin.grow(model, ffn_tokens=40, probe=inputs(model, batch=5))
    assert receipt.max_relative_change < 1e-5
    model.save_pretrained(tmp_path)
    save_file({**inputs(model), "logits": logits(model)}, tmp_path / "probe.safetensors")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "[14, 14, 12, 2] True\n", done.stderr


def test_a_model_without_a_head_grows_too() -> None:
    model: Any = tiny("vision_tokenformer base")
    with torch.no_grad():
        before = model(**inputs(model)).last_hidden_state
    auxin.grow(model, *GROWN)
    plan = auxin.plan(model, "tokenformer", ffn_tokens=40)
    assert {edit.parameter for edit in plan.edits[1:]} == {f"layers.*.mlp.{kind}_tokens" for kind in ("key", "value")}  # type: ignore[union-attr]
    auxin.apply(plan, model)
    with torch.no_grad():
        assert change(before, model(**inputs(model)).last_hidden_state) < 1e-10
    assert model.config.ffn_tokens == [14, 14, 12]


def test_growing_to_a_preset() -> None:
    config = preset_config("vit-b16-86m")
    growth = token_growth_to(config, "vit-b16-115m")
    assert (growth.qkv_tokens, growth.proj_tokens, growth.ffn_tokens) == (768, 768, 3072)
    plan = plan_token_growth(config, growth)
    assert plan.promise == "exact"
    assert "86,447,848 -> 114,759,400" in str(plan)
    config.num_labels, config.image_size = 10, 32
    assert token_growth_to(config, "vit-b16-115m") == growth
    with pytest.raises(PlanError, match="num_hidden_layers 12 against 24"):
        token_growth_to(config, "vit-l16-405m")
    with pytest.raises(PlanError, match="the preset is a tokenformer"):
        token_growth_to(config, "354m")
    with pytest.raises(PlanError, match="growth can't shrink"):
        plan_token_growth(config, TokenGrowth(ffn_tokens=64))


def test_hooks_know_it() -> None:
    model: Any = tiny("vision_tokenformer", proj_score_function="l2_norm_gelu")
    optimizer = trained(model)
    auxin.grow(model, *GROWN, "annealed", optimizer)
    anneal = TauAnneal(2)
    anneal.attach(model, optimizer)
    assert model.config.group_tau("ffn") == [math.sqrt(14)]
    anneal.move(2)
    assert model.model.layers[1].mlp.tau.item() == pytest.approx(math.sqrt(28))
    auxin.grow(model, 30, 27, 42, optimizer=optimizer)
    rates = OldTokenRates(0.0, dict(zip(SLOTS, GROWN, strict=True)))
    rates.attach(model, optimizer)
    modules = [module for module in model.modules() if isinstance(module, Pattention)]
    kept = [module.value_tokens.detach().clone() for module in modules]
    rates.before_step(0)
    step(model, optimizer)
    rates.after_step(0)
    for module, old in zip(modules, kept, strict=True):
        count = {30: 20, 27: 18, 42: 28}[len(old)]
        assert torch.equal(module.value_tokens[:count], old[:count])
        assert not torch.equal(module.value_tokens[count:], old[count:])


@torch.no_grad()
def test_patches_that_are_alike_merge_without_a_change() -> None:
    """Their tokens are told apart by their place alone, which here says nothing; optin's merging counts them."""
    model: Any = tiny("vision_tokenformer", image_size=16)
    model.model.embeddings.position_embeddings.zero_()
    batch = {"pixel_values": torch.randn(2, 3, 4, 4, dtype=torch.float64).repeat(1, 1, 4, 4)}
    before = model(**batch).logits
    data = [{**batch, "labels": torch.tensor([0, 1])}]
    plan = auxin.plan(model, "optin", data=data, token_share=1.0, target={"flops": 0.9})
    auxin.apply(plan, model)
    assert model.model.layers[1].token_merging.merged == 4
    assert change(before, model(**batch).logits) < 1e-12
