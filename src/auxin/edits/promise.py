"""Checking that an edited model computes what it computed before."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.accounting.inputs import example_inputs
from auxin.edits.plan import Plan
from auxin.errors import PlanError, PromiseError
from auxin.models.evaluating import evaluation_mode

PROBE_SEQUENCES = 3
"""Two would hide a module that returns one tensor where a pair is unpacked."""
PROBE_LENGTH = 64
TOLERANCE = 1e-5


def tolerance(model: nn.Module) -> float:
    """How far the logits of a kept promise may move, relative to the largest logit.

    1e-5 in float32, and in float64 too, since constants and norms of most architectures stay in float32; eight units in
    the last place of the coarsest parameter type below that: 0.0625 in bfloat16, 0.0078 in float16.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max([TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize < 4)])


Probe = Tensor | Mapping[str, Tensor]
"""Token ids (batch, sequence), or inputs of the model by name."""


def default_probe(plan: Plan, model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs drawn with the plan's seed: sequences of at most 64 token ids, or images."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or PROBE_LENGTH
    inputs = example_inputs(model, PROBE_SEQUENCES, min(PROBE_LENGTH, limit), seed=plan.seed)
    if plan.vocabulary is None:
        return inputs
    return {name: ids % plan.vocabulary for name, ids in inputs.items()}


def probe_logits(model: PreTrainedModel, probe: Probe, vocabulary: int | None = None) -> Tensor:
    """The logits on `probe` in evaluation mode, the first `vocabulary` of them if given; training flags are put back.

    Under autocast or with TF32 products two exact models would differ by the rounding of the shorter type, so both are
    off here, whatever the caller's settings.
    """
    inputs = {"input_ids": probe} if isinstance(probe, Tensor) else dict(probe)
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    extra = {"use_cache": False} if model.can_generate() else {}
    with evaluation_mode(model), torch.no_grad(), full_precision(model.device.type):
        return cast(Tensor, model(**inputs, **extra).logits[..., :vocabulary])


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within the context, products are computed in the type of their factors."""
    # One by one: torch refuses to read its summary of them where a caller has set one.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def relative_change(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|: 0 when nothing moved, infinite if shapes differ or values aren't finite."""
    if before.shape != after.shape:
        return float("inf")
    dtype = torch.promote_types(before.dtype, torch.float32)
    largest, moved = before.to(dtype).abs().max().item(), (after.to(dtype) - before.to(dtype)).abs().max().item()
    if moved == 0:
        return 0.0
    return moved / largest if 0 < largest < float("inf") and moved == moved else float("inf")


def edited_logits(plan: Plan, model: PreTrainedModel, probe: Probe) -> Tensor:
    """The logits after the edits, `probe_logits`.

    Raises:
        PlanError: the edited model does not run.
    """
    try:
        return probe_logits(model, probe, plan.vocabulary)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise PlanError(
            f"The model that the plan of {plan.method} makes does not run on the probe: {error!r}. "
            "Nothing was changed. What its edits of modules put somewhere does not do what that place needs."
        ) from error


def measured_change(plan: Plan, before: Tensor, after: Tensor, allowed: float) -> float | None:
    """How far the logits moved, `relative_change`, where that is a number.

    None, for plans that promise nothing, where the outputs have another shape than before or were all zero: nothing is
    to be compared.

    Args:
        plan: what was done.
        before, after: the logits.
        allowed: the change up to which an exact plan counts as kept.

    Raises:
        PlanError: the logits were not finite before the edit.
        PromiseError: they are not finite after it, they moved farther than an exact plan may move them, or there is
            nothing to compare and the plan promised something.
    """
    for when, logits in (("before", before), ("after", after)):
        if not logits.isfinite().all():
            bad = int((~logits.isfinite()).sum())
            message = (
                f"{bad} of {logits.numel()} logits are not finite on the probe {when} the edits of {plan.method}. "
                "Nothing was changed. "
            )
            if when == "before":
                raise PlanError(message + "Mend the model, or probe it with other inputs.")
            raise PromiseError(message + "Correct the plan: some of its factors or values are too large.")
    change = relative_change(before, after)
    if change != float("inf"):
        if plan.promise == "exact" and change > allowed:
            raise PromiseError(
                f"The plan of {plan.method} promised to keep the function, but the logits moved by {change:.3g} of the "
                f"largest one (allowed: {allowed:.3g}). Nothing was changed. Correct the plan, or let it promise less."
            )
        return change
    if plan.promise == "none":
        return None
    shapes = f"have shape {list(after.shape)} and had {list(before.shape)}"
    what = shapes if before.shape != after.shape else "were all zero"
    raise PromiseError(
        f"The plan of {plan.method} promises {plan.promise!r}, but the outputs {what}: no telling how far they "
        "moved. Nothing was changed. Let the plan promise 'none', or give a probe on which it can be told."
    )
