"""Whether what a plan makes fits where it is made, told from shapes before any work starts."""

from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from auxin.accounting.machine import available_memory
from auxin.edits.kinds.edit import describe_edit
from auxin.edits.resolution import ResolvedPlan
from auxin.edits.tensor_names import shapes_of
from auxin.errors import PlanError

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def refuse_too_large(resolved: ResolvedPlan, parameters: dict[str, nn.Parameter], optimizer: Optimizer | None) -> None:
    """PlanError when what a model in memory grows by, its optimizer's state included, is more than the memory that is
    left.

    Models on other devices than the CPU are not judged: those refuse a tensor that they have no room for, while a
    system may promise memory that it has not and end the process later.

    Args:
        resolved: the plan.
        parameters: of the model, by name.
        optimizer: its optimizer.
    """
    tensors: list[Tensor] = list(parameters.values())
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return
    if optimizer is not None:
        states = [state for tensor in tensors for state in optimizer.state.get(tensor, {}).values()]
        tensors += [state for state in states if isinstance(state, Tensor)]
    old = _elements_before(resolved)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / old
    _refuse(resolved, size, old, available_memory(), "there is memory for")


def refuse_too_large_for_folder(resolved: ResolvedPlan, source: Path, output: Path) -> None:
    """PlanError when the files that a plan makes of those in `source` don't fit on the disk of `output`, or the new
    model not into the memory, where its promise is checked."""
    old = _elements_before(resolved)
    weights, training = (
        sum(path.stat().st_size for path in source.glob(p)) for p in ("*.safetensors", "*/*.safetensors")
    )
    disk = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists())
    _refuse(resolved, (weights + training) / old, 0, disk_usage(disk).free, f"the disk of {disk} has room for")
    _refuse(resolved, weights / old, 0, available_memory(), "there is memory for")


def _elements_before(resolved: ResolvedPlan) -> int:
    return max(1, sum(prod(shape) for shape in shapes_of(resolved.before).values()))


def _refuse(resolved: ResolvedPlan, size: float, there: int, room: int | None, told: str) -> None:
    """PlanError when the new model's elements, but for as many as are `there`, of `size` bytes each, need more than
    `room` bytes; None: not known."""
    elements = {name: prod(origin.shape) for name, origin in resolved.origins.items()}
    needed = (sum(elements.values()) - there) * size
    if room is None or needed <= room:
        return
    largest = max(elements, key=elements.__getitem__)
    origin = resolved.origins[largest]
    blamed = "as the plan's config values ask for"
    if origin.steps:
        last: Any = origin.steps[-1]
        blamed = f"by edit {last.index + 1} ({describe_edit(last.edit)})"
    raise PlanError(
        f"What the plan makes is too large: it needs {_in_words(needed)}, and {told} {_in_words(room)}. Its largest "
        f"tensor is {largest} {list(origin.shape)}, {blamed}. Ask for less, or go where there is more room; on the "
        "meta device sizes cost nothing."
    )


def _in_words(size: float) -> str:
    """A number of bytes, in units of which there are fewer than 1000."""
    place = 0
    while size >= 1000 and place < len(UNITS) - 1:
        size, place = size / 1000, place + 1
    return f"{size:.3g} {UNITS[place]}"
