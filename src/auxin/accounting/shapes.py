"""A copy of a model that has shapes and no data, on which costs are counted without doing the work."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers.pytorch_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from auxin.errors import ConfigError


@contextmanager
def shape_only_copy(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Within the context, a structural copy of `model` on fake CPU tensors; whatever runs on it allocates nothing.

    Its parameters have the type `dtype`; None: that of the model's.

    Fake tensors serve where the meta device does not: transformers asks for values while it builds its masks, except
    of tensors it knows to be fake. Copying through deepcopy's memo keeps whatever surgery the model went through (a
    rebuilt `type(model)(config)` would not) and keeps tied parameters tied. `model` is not touched.

    Raises:
        ConfigError: what runs within the context looks at values.
    """
    with FakeTensorMode(), _caches_passed_by():
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            data = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
            memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
        for tensor in (*model.buffers(), *plain):
            memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        try:
            yield copy.deepcopy(model, memo)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"{type(model).__name__} can't be counted on shapes alone: its code looks at values ({error}). Count "
                "what it executes on inputs of yours, `auxin.accounting.ExecutedFlops`."
            ) from error


@contextmanager
def _caches_passed_by() -> Iterator[None]:
    """Within the context, transformers' cached functions compute anew and keep nothing, as while torch compiles: a
    tensor without data that one of them kept (BEiT's index of relative positions) would be given to real models
    afterwards."""
    module: Any = transformers.pytorch_utils
    asked = module.is_torchdynamo_compiling
    module.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        module.is_torchdynamo_compiling = asked


def without_data(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with tensors of the same shapes and types in place of theirs: within `shape_only_copy`, fake zeros."""
    return {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
