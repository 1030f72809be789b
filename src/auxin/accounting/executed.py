"""FLOPs of what is really executed: counted operation by operation, whatever the code around them says it does.

As in `auxin.accounting.flops` a multiply-add is two FLOPs; matrix products, convolutions and attention count,
elementwise work does not. Attention's backward pass counts twice its forward pass on every kernel: that fused ones
compute the scores again is a property of the kernel. What runs on shapes alone (the meta device, fake tensors)
costs nothing and counts nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class ExecutedFlops(TorchDispatchMode):
    """Within the context, counts the FLOPs of this process's tensor operations, backward passes included.

    Operations of compiled code are seen as far as torch shows them to a dispatch mode.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0
        """FLOPs so far."""
        self._whole: set[Any] = set()
        """Operations that are found to be made of no others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet not in FORMULAS and func not in self._whole:
            # In inference mode operations come whole that are made of several products.
            if getattr(func, "namespace", "") == "aten":
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            self._whole.add(func)
        result = func(*args, **kwargs)
        if packet in FORMULAS and not any(map(_without_data, tree_leaves(result))):
            self.total += int(FORMULAS[packet](*args, **kwargs, out_val=result))
        return result


def count_known(flops: int) -> None:
    """Count FLOPs that were executed before, in all counters that run now: what they led to was kept and is taken from
    there, and the books are to say what it costs, not what happened to be known."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, ExecutedFlops):
            mode.total += flops


def _without_data(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Scores and their products with the values, over the whole square; all (batch, heads, tokens, entries)."""
    batch, heads, tokens, entries = query.shape
    return 2 * batch * heads * tokens * key.shape[-2] * (entries + value.shape[-1])


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)


def _grouped(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    """Products of the experts' tokens with their matrices; either side, or both, may hold all groups in one axis."""
    groups = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return 2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # Torch's own table knows neither of the CPU's two, and no grouped product.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_cudnn_attention_backward,
        ),
        _attention_backward,
    ),
}
"""FLOPs of an operation by its arguments and result."""
