"""Edits of entries and of blocks: values, moments, the way back, refusals."""

import pytest
import torch
from pydantic import ValidationError

from auxin.edits import SliceParameter
from auxin.edits.kinds.entry_edits import RouteParameter, ScaleEntries
from auxin.errors import PlanError


def matrix(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_entries_are_multiplied_and_their_moments_divided():
    old = matrix(3, 5)
    edit = ScaleEntries(parameter="w", axis=1, index=[0, 3], factor=2.5)
    new = edit.map_parameter(old, 0, "w")
    factors = torch.tensor([2.5, 1, 1, 2.5, 1], dtype=torch.float64)
    assert torch.equal(new, old * factors)
    assert torch.allclose(edit.map_moment(old, 1), old / factors, rtol=1e-15)
    assert torch.allclose(edit.map_moment(old, 2), old / factors**2, rtol=1e-15)
    assert torch.allclose(edit.restore_parameter(new, (3, 5)), old, rtol=1e-15)
    (back,) = edit.inverse((3, 5))
    assert torch.allclose(back.map_parameter(new, 0, "w"), old, rtol=1e-15)
    assert not edit.rate((3, 5)).exact
    assert "2 entries along axis 1" in str(edit)


@pytest.mark.parametrize(("axis", "index"), [(2, [0]), (0, [3]), (0, [-1, 1])])
def test_entries_that_do_not_exist_are_refused(axis, index):
    edit = ScaleEntries(parameter="w", axis=axis, index=index, factor=2.0)
    with pytest.raises(PlanError, match=r"do not all exist in shape \[3, 5\]"):
        edit.new_shape((3, 5))


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_that_read_their_own_copy_are_a_block_diagonal(copies):
    first, second = matrix(2, 4), matrix(3, 4)
    old = torch.cat([first.repeat(copies, copies), second.repeat(copies, copies)]) / copies
    edit = RouteParameter(parameter="w", output_axis=0, input_axis=1, copies=copies, stretches=[2 * copies, 3 * copies])
    assert edit.new_shape(tuple(old.shape)) == tuple(old.shape)
    eye = torch.eye(copies, dtype=torch.float64)
    expected = torch.cat([torch.kron(eye, first), torch.kron(eye, second)])
    assert torch.allclose(edit.map_parameter(old, 0, "w"), expected, rtol=1e-15)
    turned = RouteParameter(
        parameter="w", output_axis=1, input_axis=0, copies=copies, stretches=[2 * copies, 3 * copies]
    )
    assert torch.allclose(turned.map_parameter(old.T.contiguous(), 0, "w"), expected.T, rtol=1e-15)
    assert torch.equal(edit.map_moment(old, 2), old)
    assert edit.rate(tuple(old.shape)).exact
    assert edit.inverse(tuple(old.shape)) is None


def test_the_gradient_of_the_blocks_of_zero_is_that_of_the_others():
    weight, inputs, target = matrix(3, 2), matrix(6, 2), matrix(6, 3)
    wide = torch.block_diag(weight, weight).requires_grad_()
    # A reader that averages the copies.
    outputs = inputs.repeat(1, 2) @ wide.T
    ((outputs[:, :3] + outputs[:, 3:]) / 2 - target).square().sum().backward()
    small = weight.clone().requires_grad_()
    (inputs @ small.T - target).square().sum().backward()
    mapped = SliceParameter(parameter="w", axis=0, index=[0, 0], unit=3).map_moment(small.grad, 1)
    assert torch.allclose(wide.grad, mapped.repeat(1, 2), rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 5), (4,)])
def test_a_shape_without_such_copies_is_refused(shape):
    edit = RouteParameter(parameter="w", output_axis=0, input_axis=1, copies=2, stretches=[4])
    with pytest.raises(PlanError, match="does not hold 2 copies"):
        edit.new_shape(shape)


def test_nonsense_is_refused_at_once():
    with pytest.raises(ValidationError, match="give two axes"):
        RouteParameter(parameter="w", output_axis=1, input_axis=1, copies=2, stretches=[4])
    with pytest.raises(ValidationError, match="5 is no whole number of 2 copies"):
        RouteParameter(parameter="w", output_axis=0, input_axis=1, copies=2, stretches=[4, 5])
    with pytest.raises(ValidationError, match="greater than 0"):
        ScaleEntries(parameter="w", axis=0, index=[0], factor=0)
