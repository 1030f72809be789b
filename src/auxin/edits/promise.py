"""Checking that an edited model computes what it computed before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.edits.plan import Plan
from auxin.errors import PromiseError

PROBE_SEQUENCES = 2
PROBE_LENGTH = 64
TOLERANCE = 1e-5


def tolerance(model: nn.Module) -> float:
    """How far the logits of a kept promise may move, relative to the largest logit.

    1e-5 in float32, and in float64 too, since constants and norms stay in float32; eight units in the last place of the
    coarsest parameter type below that: 0.0625 in bfloat16, 0.0078 in float16.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max([TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize < 4)])


def default_probe(plan: Plan, model: PreTrainedModel) -> Tensor:
    """Two sequences of token ids drawn with the plan's seed, (2, at most 64)."""
    limit = getattr(model.config, "max_position_embeddings", None) or PROBE_LENGTH
    generator = torch.Generator().manual_seed(plan.seed)
    shape = (PROBE_SEQUENCES, min(PROBE_LENGTH, limit))
    return torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator)


def probe_logits(model: PreTrainedModel, probe: Tensor) -> Tensor:
    """The logits on `probe`, (batch, sequence, vocabulary), in evaluation mode; training flags are put back."""
    with evaluation_mode(model), torch.no_grad():
        return cast(Tensor, model(input_ids=probe.to(model.device), use_cache=False).logits)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the context, all modules are in evaluation mode; afterwards each has its own flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def relative_change(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|; infinite when the shapes differ or a value is not finite."""
    if before.shape != after.shape:
        return float("inf")
    dtype = torch.promote_types(before.dtype, torch.float32)
    change = ((after.to(dtype) - before.to(dtype)).abs().max() / before.to(dtype).abs().max()).item()
    return change if change == change else float("inf")


def check_promise(plan: Plan, change: float, allowed: float) -> None:
    """Raise PromiseError when the plan promised an exact edit and the logits moved more than rounding explains."""
    if plan.promise == "exact" and change > allowed:
        raise PromiseError(
            f"The plan of {plan.method} promised to keep the function, but the logits moved by {change:.3g} of the "
            f"largest one (allowed: {allowed:.3g}). Nothing was changed. Correct the plan, or let it promise less."
        )
