"""Pattention on a GPU's kernels, beside itself in double precision on the CPU."""

import pytest
import torch

from auxin.nn.pattention import Pattention
from on_gpu.devices import on_either, on_gpu

ROWS, WIDTH, OUT = 300, 64, 48
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far off results may be, relative to their norm: some units of each type's last place."""
SCORE_FUNCTIONS = ["l2_norm_gelu", "gelu_l2_norm", "gelu", "linear", "softmax"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(groups, score_function, device, dtype, compiled=False) -> list[torch.Tensor]:
    """The output, and the gradients of the input, the keys and the values, as they come out, in double precision."""
    layer = Pattention(WIDTH, OUT, groups, score_function=score_function, dtype=torch.float64)
    with torch.no_grad():
        layer.key_tokens.copy_(drawn(sum(groups), WIDTH, seed=1))
        layer.value_tokens.copy_(drawn(sum(groups), OUT, seed=2))
    layer = layer.to(device, dtype)
    x = drawn(ROWS, WIDTH, seed=3).to(device, dtype).requires_grad_()
    output = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    output.backward(drawn(ROWS, OUT, seed=4).to(device, dtype))
    found = [output.detach(), x.grad, layer.key_tokens.grad, layer.value_tokens.grad]
    return [tensor.double().cpu() for tensor in found]


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance


@on_either
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_the_layer_computes_what_it_does_in_double_precision(score_function, dtype, device):
    groups = [96, 32, 160]
    wanted = results(groups, score_function, "cpu", torch.float64)
    assert_near(results(groups, score_function, device, dtype), wanted, TOLERANCE[dtype])


@on_gpu
@pytest.mark.parametrize("groups", [[256], [64, 64, 64, 64], [96, 32, 160]], ids=["one", "equal", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_for_a_gpu_the_layer_computes_the_same(dtype, groups):
    torch.compiler.reset()
    wanted = results(groups, "l2_norm_gelu", "cpu", torch.float64)
    assert_near(results(groups, "l2_norm_gelu", "cuda", dtype, compiled=True), wanted, TOLERANCE[dtype])
