"""Batch norms of several processes: alone they are torch's; together, tests/training/test_ranks.py."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from auxin.training.batch_norms import normed_together
from auxin.training.ranks import Ranks


class Two(Ranks):
    """Two processes that have the same samples, as one of them sees them."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 2

    def add_up(self, values: Tensor) -> None:
        values.mul_(2)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str
)
@given(
    shape=st.one_of(
        st.tuples(st.integers(2, 5), st.integers(1, 4)),
        st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    momentum=st.sampled_from([0.1, 1.0, None]),
    affine=st.booleans(),
    running=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_the_norm_of_the_samples_of_both(dtype, near, shape, momentum, affine, running, seed):
    torch.manual_seed(seed)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    norm = kind(shape[1], eps=0.5, momentum=momentum, affine=affine, track_running_stats=running)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if dtype == torch.float64:
        norm.double()
    other = copy.deepcopy(norm)
    x = (3 * torch.randn(shape) + 2).to(dtype).requires_grad_()
    twice = torch.cat([x.detach()] * 2).requires_grad_()
    weight = torch.randn(shape).to(dtype)
    for _ in range(2):
        expected = other(twice)
        with normed_together(norm, Two()):
            found = norm(x)
    assert found.dtype == expected.dtype == dtype
    assert torch.allclose(found, expected[: len(x)], atol=near, rtol=near)
    for name, value in other.state_dict().items():
        assert torch.allclose(norm.state_dict()[name].double(), value.double(), atol=near, rtol=near), name
    (found * weight).sum().backward()
    (expected * torch.cat([weight] * 2)).sum().backward()
    assert torch.allclose(x.grad, twice.grad[: len(x)], atol=8 * near, rtol=8 * near)
    if affine:  # of the own samples, which are half of all
        assert torch.allclose(2 * norm.weight.grad, other.weight.grad, atol=99 * near, rtol=99 * near)


def test_afterwards_and_in_evaluation_it_is_its_own_again():
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    with normed_together(norm, Two()):
        norm(x)
        norm.eval()
        inside = norm(x)
    assert "forward" not in vars(norm)
    assert torch.equal(norm(x), inside)
