"""Numbers that move in the course of a training have all their steps, whatever type the model has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import auxin
from auxin.edits import Plan, ReplaceModule, WrapModule, apply_to_checkpoint
from auxin.models.loading import load_model
from auxin.nn.bricks import Brick
from tiny_models import inputs, output, tiny

ONE, ATTENTION = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn"
PUT: dict[str, Any] = {
    "guided": ReplaceModule(
        module=ONE, brick="guided", settings={"product": "low_rank_linear", "guide": "weight", "rank": 2}
    ),
    "clipped": ReplaceModule(module=ATTENTION, brick="clipped_softmax", settings={"gamma": -0.25, "begin": 0.3}),
    "masked": WrapModule(module=ONE, brick="masked", settings={"output_size": 16, "new_outputs": [[12, 16]]}),
    "masked norm": WrapModule(
        module="model.layers.1.input_layernorm",
        brick="masked_norm",
        settings={"kind": "rms", "eps": 1e-6, "size": 16, "new": [[12, 16]]},
    ),
    "masked block": WrapModule(module="model.layers.1", brick="masked_block"),
}
BEGIN = {"clipped": 0.3, "guided": 1.0}
THIRD = 1 / 3


def put(kind: str, model: nn.Module) -> nn.Module:
    auxin.apply(Plan(method="x", promise="none", edits=[PUT[kind]]), model)
    return model


def strength(model: nn.Module) -> Tensor:
    """Of the one brick that has some: the tensor."""
    (found,) = [module for module in model.modules() if isinstance(module, Brick) and module.wide]
    (name,) = [name for name in found.wide if found._buffers.get(name) is not None]
    return found._buffers[name]


def value(model: nn.Module) -> float:
    return strength(model).flatten()[-1].item()


def moved(model: nn.Module, to: float) -> float:
    """What the strength is when it was set."""
    next(module for module in model.modules() if isinstance(module, Brick) and module.wide).set_strength(to)
    return value(model)


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_rounds_no_strength(kind, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    model = put(kind, tiny("llama", dtype=torch.float32))
    third = moved(model, THIRD)
    for cast in (model.to(dtype), model.to(torch.bfloat16)):
        assert value(cast) == third
    model.to(dtype)
    assert strength(model).dtype == wide
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert len({moved(model, step / 1000) for step in range(1001)}) == 1001
    made = put(kind, tiny("llama", dtype=dtype))  # put into a model that has the type already
    assert strength(made).dtype == wide
    assert value(made) == pytest.approx(BEGIN.get(kind, 0.0), abs=1e-7)


@pytest.mark.parametrize("kind", PUT)
def test_a_strength_is_saved_and_loaded_whole(kind, tmp_path: Path):
    plain = tiny("llama", dtype=torch.bfloat16)
    auxin.save(plain, tmp_path / "plain")
    apply_to_checkpoint(
        Plan(method="x", promise="none", edits=[PUT[kind]]), tmp_path / "plain", tmp_path / "on the disk"
    )
    on_the_disk = load_model(tmp_path / "on the disk")
    assert strength(on_the_disk).dtype == torch.float32
    assert value(on_the_disk) == value(put(kind, plain))
    third = moved(plain, THIRD)
    auxin.save(plain, tmp_path / "saved")
    for loaded in (
        load_model(tmp_path / "saved"),
        load_model(tmp_path / "saved", dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float16),
    ):
        assert value(loaded) == third
        assert strength(loaded).dtype == torch.float32
    with torch.no_grad():
        again = load_model(tmp_path / "saved").eval()
        assert torch.equal(output(again(**inputs(again))), output(plain.eval()(**inputs(plain))))
        assert output(again(**inputs(again))).dtype == torch.bfloat16


def test_a_loaded_guide_that_has_faded_is_known_to_be_gone(tmp_path: Path):
    model = put("guided", tiny("llama", dtype=torch.float32))
    counted = []
    for strength_saved in (0.5, 0.0):
        moved(model, strength_saved)
        auxin.save(model, tmp_path / str(strength_saved))
        counted.append(auxin.accounting.flops_per_token(load_model(tmp_path / str(strength_saved)), 8).forward)
    layer = tiny("llama").get_submodule(ONE)
    assert counted[0] - counted[1] == 2 * layer.weight.numel()
