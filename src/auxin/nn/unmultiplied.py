"""Products of matrices that are multiplied only when somebody computes with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def unmultiplied(left: Tensor, right: Tensor, transposed: bool = False, shape: tuple[int, ...] | None = None) -> Tensor:
    """The product of `left` (m, r) and `right` (r, n), or its transpose: a tensor to whoever computes with it, and
    through which gradients reach both. To ask for its shape, type or device costs nothing.

    Args:
        left, right: the factors.
        transposed: whether it is the transpose.
        shape: in which it is seen; None: that of a matrix.
    """
    if shape is None:
        shape = (right.shape[1], left.shape[0]) if transposed else (left.shape[0], right.shape[1])
    return multiplied_when_used(shape, left, lambda: _product(left, right, transposed, shape))


def multiplied_when_used(shape: tuple[int, ...], like: Tensor, product: Callable[[], Tensor]) -> Tensor:
    """What `product` gives, of `shape` and of the type and on the device of `like`; see `unmultiplied`."""
    if torch.compiler.is_compiling():  # the compiler drops what nobody uses
        return product()
    return Unmultiplied(shape, like, product)


class Unmultiplied(Tensor):
    """See `unmultiplied`."""

    product: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, product: Callable[[], Tensor]) -> "Unmultiplied":
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        new.product = product
        return new

    def __init__(self, *args: Any) -> None:
        """`__new__` has done everything."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COSTS_NOTHING:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map_only(cls, lambda one: one.product(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} did not ask for the product")


_COSTS_NOTHING = {
    Tensor.dim,
    Tensor.size,
    Tensor.is_floating_point,
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.shape.__get__,  # type: ignore[attr-defined]
}


def _product(left: Tensor, right: Tensor, transposed: bool, shape: tuple[int, ...]) -> Tensor:
    product = left @ right
    return product.mT if transposed else product.reshape(shape)
