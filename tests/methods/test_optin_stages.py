"""OPTIN on networks of stages: limits are met, stages lose alike where that is asked, what is left loads again, and
what goes is missed less than what chance takes."""

import copy
import statistics
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

import auxin
from auxin.accounting import flops_per_token
from auxin.analysis import run
from auxin.edits import Plan, apply
from auxin.edits.structure import structural_edits
from auxin.errors import ConfigError, PlanError
from auxin.models.anatomy import anatomy
from auxin.objectives.calibration import Calibration
from capabilities import labelled
from tiny_models import logits, tiny


def plan(model: Any, **settings: Any) -> Plan:
    data = settings.pop("data", None) or Calibration.of_batches(model, [labelled(model)])
    return auxin.plan(model, "optin", data=data, tokens=16, **settings)


def changed(model: Any, made: Plan) -> Any:
    other = copy.deepcopy(model)
    apply(made, other)
    return other


def flops(model: Any) -> float:
    return flops_per_token(model, 1).forward


def test_a_limit_is_met_and_no_channel_more_could_stay():
    model = tiny("resnet")
    left = changed(model, plan(model, target={"flops": 0.8}, uniform=False))
    # A channel that a convolution of 3 x 3 gives and another reads, at 16 places, of eight channels each.
    assert 0 <= 0.8 * flops(model) - flops(left) < 2 * 9 * 16 * (8 + 8)


def test_layers_of_a_stage_keep_as_many_and_stages_the_same_share():
    model = tiny("segformer")
    left = changed(model, plan(model, ffn=0.75))
    sizes = anatomy(left).sizes
    layers = [f"segformer.stages.{place}" for place in ("0.blocks.0", "0.blocks.1", "1.blocks.0")]
    assert [sizes.units("ffn", layer) for layer in layers] == [12, 12, 9]


def test_what_layers_lose_is_said_layer_by_layer_and_comes_back_when_it_is_loaded(tmp_path):
    model = tiny("segformer")
    made = plan(model, heads=0.5, ffn=0.5, uniform=False)
    left = changed(model, made)
    assert {edit.kind for edit in structural_edits(left.config)} == {"resize_module"}
    left.save_pretrained(tmp_path)
    assert torch.equal(logits(type(left).from_pretrained(tmp_path, dtype=torch.float64)), logits(left))
    # And once more, from what is there.
    again = changed(left, plan(left, ffn=0.5, uniform=False))
    assert again.num_parameters() < left.num_parameters()
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(left).from_pretrained(tmp_path / "again", dtype=torch.float64)), logits(again))


def test_a_stage_of_one_head_keeps_it():
    model = tiny("segformer", num_attention_heads=[1, 3])
    left = changed(model, plan(model, target={"flops": 0.97}, streams=["heads"]))
    sizes = anatomy(left).sizes
    assert sizes.units("query", "segformer.stages.0.blocks.0") == 1
    assert sizes.units("query", "segformer.stages.1.blocks.0") < 3


def test_a_plan_is_for_another_model_of_the_same_shape_too():
    model, other = tiny("resnet"), tiny("resnet", seed=5)
    made = plan(model, target={"flops": 0.8})
    assert flops(changed(other, made)) == flops(changed(model, made)) <= 0.8 * flops(model)


def test_what_can_t_be_is_refused_before_the_model_is_run(monkeypatch):
    monkeypatch.setattr(run, "_follow", lambda *_: pytest.fail("the model was run"))
    model = tiny("segformer")
    with pytest.raises(PlanError, match=r"segformer is no encoder of patches .*Leave tokens as they are\."):
        plan(model, target={"flops": 0.7}, token_share=0.5)
    with pytest.raises(PlanError, match=r"the smallest that optin can reach here is .*Ask for at least that\."):
        plan(model, target={"flops": 0.1})
    with pytest.raises(PlanError, match=r"this model has several sizes of it \(\[12, 16\]\)\. Give a share\."):
        plan(model, ffn=4)
    with pytest.raises(PlanError, match=r"heads: the resnet model has no such units\. Leave it out\."):
        plan(tiny("resnet"), heads=0.5)
    with pytest.raises(ConfigError, match=r"ffn = 1\.5 is no share"):
        plan(model, ffn=1.5)


def bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bars that lie, stand or lean either way somewhere in an image of noise, and which they do."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, 16, 16, generator=draw)
    classes = torch.randint(4, (count,), generator=draw)
    steps = torch.tensor([[0, 1], [1, 0], [1, 1], [1, -1]])
    for image, kind in zip(images, classes, strict=True):
        row, column = torch.randint(5, 11, (2,), generator=draw).tolist()
        for step in range(-4, 5):
            down, right = (step * steps[kind]).tolist()
            image[0, row + down, column + right] += 1.5
    return images, classes


def test_a_resnet_misses_what_optin_takes_less_than_what_chance_takes():
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4,
        image_size=16,
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    pixels, classes = bars(600, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.randint(600, (32,), generator=torch.Generator().manual_seed(step))
        model(pixel_values=pixels[rows], labels=classes[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    others = dict(zip(("pixel_values", "labels"), bars(300, seed=1), strict=True))

    @torch.no_grad()
    def loss(made: Plan | None = None) -> float:
        return float((model if made is None else changed(model, made))(**others).loss)

    data = Calibration.of_batches(model, [{"pixel_values": pixels[:16], "labels": classes[:16]}])
    target = {"target": {"flops": 0.8}, "uniform": False}
    chance = [loss(auxin.plan(model, "random", seed=seed, **target)) for seed in range(5)]
    assert loss() < 0.7
    assert loss(plan(model, data=data, normalised=True, **target)) < statistics.median(chance)
