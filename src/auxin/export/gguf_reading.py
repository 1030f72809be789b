"""What transformers' own reader finds in a GGUF file, which judges it: the model's config, and every weight of it."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from auxin.errors import CheckpointError, ConfigError
from auxin.export.gguf_families import Family, not_carried
from auxin.foreign import offline
from auxin.models.loading import REFUSALS, skeleton

HALF_STEP = 2.0**-11
"""What rounding to float16 changes, of a value, at most; below 2^-14 it is 2^-25."""


@dataclass(frozen=True)
class _Rounding:
    """By how much a type may change a weight: a share of the largest of its block, and so much whatever that is."""

    share: float
    floor: float
    block: int = 1


_ROUNDING = {
    "F32": _Rounding(0.0, 0.0),
    "F16": _Rounding(HALF_STEP, 2.0**-25),
    "BF16": _Rounding(2.0**-8, 2.0**-126),
    # Half a step of the grid, whose own step is a float16.
    "Q8_0": _Rounding(0.5 / 127 + HALF_STEP, 127 * 2.0**-25, 32),
    # From -8 to 7 steps, the largest entry at -8: one as large with the other sign loses a whole step.
    "Q4_0": _Rounding(1 / 8 + HALF_STEP, 8 * 2.0**-25, 32),
}
_FLOAT64 = _Rounding(2.0**-24, 2.0**-150)
"""What a model in float64 loses on its way into any of them."""
_LOST = 2
"""A tensor that changes by so many times what its type makes of numbers of a usual size is too small for it."""


def refuse_uncarried(folder: Path, name: str, model: PreTrainedModel) -> None:
    """ConfigError where the config that transformers reads in the file is another one than the model's."""
    try:
        with offline():
            read = AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)
    except (*REFUSALS, OSError, StrictDataclassError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"The model has no GGUF form that transformers reads: {why}. Change those sizes.") from error
    reasons = list(not_carried(model.config, read))
    if not reasons:
        shapes = {key: value.shape for key, value in skeleton(read, model.__class__).named_parameters()}
        reasons = [
            f"{key} has the shape {tuple(value.shape)}, and would be read as {tuple(shapes[key])}"
            for key, value in model.named_parameters()
            if key != "lm_head.weight" and value.shape != shapes[key]
        ][:3]
    if reasons:
        raise ConfigError(
            f"The model has no GGUF form that transformers reads as it is: {'; '.join(reasons)}. llama.cpp's own "
            "convert_hf_to_gguf.py, on the checkpoint's folder, may know a key that transformers does not read."
        )


def changes(
    folder: Path, name: str, model: PreTrainedModel, family: Family, types: dict[str, str]
) -> tuple[float, list[str]]:
    """How the weights that transformers reads in the file differ from the model's.

    Args:
        folder: where the file lies.
        name: of the file.
        model: what was written.
        family: of the model.
        types: of each tensor, by its name in the file.

    Returns:
        The largest change of a weight, of the largest in its tensor, and a note for each tensor whose entries are so
        small that its type loses more of them than of others.

    Raises:
        CheckpointError: a weight differs by more than rounding to the tensor's type can make, or is not there.
    """
    reader: Any = model.__class__
    # The reader draws a bar of its own, whatever transformers is told about bars.
    with offline(), contextlib.redirect_stderr(io.StringIO()):
        read, found = reader.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    theirs = {key: value for _, key, value in family.tensors(cast(PreTrainedModel, read))}
    missing = sorted(found["missing_keys"])
    largest, notes = 0.0, []
    for place, key, value in family.tensors(model):
        missing += [] if key in theirs else [key]
        if missing:
            raise CheckpointError(
                f"transformers finds no {missing[0]} in the file that was written. Nothing is kept of it: the versions "
                "of gguf and transformers that are installed don't agree."
            )
        share = _share_changed(key, value, theirs[key], types[place])
        if share > _LOST * (_ROUNDING[types[place]].share + _FLOAT64.share):
            notes.append(
                f"The entries of {key} are so small that {types[place]} changes them by up to {share:.0%} of the "
                "largest. bf16 and f32 don't."
            )
        largest = max(largest, share)
    return largest, notes


def _share_changed(key: str, value: Tensor, read: Tensor, type: str) -> float:
    """The largest change of an entry, of the largest there is; CheckpointError where `type` does not explain it."""
    exact, rounding = value.dtype == torch.float64, _ROUNDING[type]
    ours = value.to("cpu", torch.float64 if exact else torch.float32).reshape(-1, rounding.block)
    change, size = (read.to(ours.dtype).reshape(ours.shape) - ours).abs(), ours.abs()
    share, floor = rounding.share, rounding.floor
    if exact:
        share, floor = share + _FLOAT64.share, floor + _FLOAT64.floor
    explained = change <= size.amax(1, keepdim=True).mul_(share).add_(floor)
    if not explained.all():  # so that NaN fails
        by = change[~explained].max().item()
        raise CheckpointError(
            f"{key} as transformers reads it differs by {by:.3g}, more than {type} rounds. Nothing is kept of the "
            "file: the versions of gguf and transformers that are installed don't agree."
        )
    scale = size.max().item()
    return change.max().item() / scale if scale else 0.0
