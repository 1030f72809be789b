"""Runs measurements: one pass over the data for all of them, and none for those whose result is known already."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.cache import Record, cached, default_cache, model_fingerprint, store, subject_of
from auxin.analysis.measurement import (
    CalibrationData,
    Found,
    Measurement,
    Needs,
    Observer,
    Result,
    Tap,
    measurement,
)
from auxin.errors import DataError
from auxin.models.evaluating import evaluation_mode
from auxin.nn.calls import first_argument


@overload
def measure(
    wanted: Measurement[Found],
    model: PreTrainedModel,
    data: CalibrationData | None = None,
    *,
    cache: str | Path | bool = True,
    progress: bool = False,
) -> Found: ...


@overload
def measure(
    wanted: str,
    model: PreTrainedModel,
    data: CalibrationData | None = None,
    *,
    cache: str | Path | bool = True,
    progress: bool = False,
) -> Any: ...


def measure(
    wanted: Measurement[Any] | str,
    model: PreTrainedModel,
    data: CalibrationData | None = None,
    *,
    cache: str | Path | bool = True,
    progress: bool = False,
) -> Any:
    """What one measurement finds; see `measure_all`."""
    (record,) = measure_all([wanted], model, data, cache=cache, progress=progress)
    return record.result


def measure_all(
    wanted: Sequence[Measurement[Any] | str],
    model: PreTrainedModel,
    data: CalibrationData | None = None,
    *,
    cache: str | Path | bool = True,
    progress: bool = False,
) -> list[Record]:
    """Measure a model: all that is not known yet in one pass over the data, in evaluation mode.

    The model stays as it is: weights, gradients, and the mode of every module.

    Args:
        wanted: measurements, or names of some with their default settings.
        model: the model, with weights.
        data: samples; None where only weights are looked at.
        cache: where results are kept and looked up: a folder, True for `default_cache()`, False for nowhere. They are
            found again under the fingerprints of model and data and the measurement's settings.
        progress: whether a bar on standard error, where that is a terminal, shows the samples done.

    Returns:
        A record for each, in the order of `wanted`.

    Raises:
        ConfigError: an unknown measurement, no data where some are needed, or a model without weights.
        DataError: the data are no batches of the model's inputs, or not as many samples as they say.
        AuxinError: the model can't be measured so; what else a measurement raises.
    """
    asked = [measurement(item) if isinstance(item, str) else item for item in wanted]
    fingerprint = model_fingerprint(model)
    subjects = [subject_of(item, fingerprint, data) for item in asked]
    folder = None if cache is False else default_cache() if cache is True else Path(cache)
    found: dict[int, Result] = {}
    for number, (item, subject) in enumerate(zip(asked, subjects, strict=True)):
        known = cached(folder, subject, item.result_type) if folder else None
        if known is not None:
            found[number] = known
    missing = [number for number in range(len(asked)) if number not in found]
    observers = {number: asked[number].observe(model) for number in missing}
    following = [(observer, asked[number].needs) for number, observer in observers.items()]
    if following := [(observer, needs) for observer, needs in following if needs != "weights"]:
        _follow(following, model, cast(CalibrationData, data), progress)
    for number, observer in observers.items():
        found[number] = observer.result()
        if folder:
            store(folder, Record(subject=subjects[number], result=found[number]))
    return [Record(subject=subject, result=found[number]) for number, subject in enumerate(subjects)]


def _follow(
    following: Sequence[tuple[Observer[Any], Needs]], model: PreTrainedModel, data: CalibrationData, progress: bool
) -> None:
    """One pass over the data that all observers follow."""
    forward = _forward(model, {needs for _, needs in following})
    taps = [tap for observer, _ in following for tap in observer.taps]
    device, dtype = next(model.parameters()).device, model.dtype
    done = 0
    with evaluation_mode(model), torch.no_grad(), _bar(data.samples, progress) as advance:
        for batch in data.batches():
            samples = _samples(batch)
            inputs = {
                name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in batch.items()
            }
            for observer, _ in following:
                observer.before(inputs)
            with _tapped(taps):
                output = forward(**inputs) if forward is not None else None
            for observer, needs in following:
                observer.after(inputs, output if needs == "logits" else None)
            done += samples
            advance(samples)
    if done != data.samples or not done:
        raise DataError(f"The data say that they hold {data.samples} samples, but gave {done}. Nothing was measured.")


def _forward(model: PreTrainedModel, needs: set[Needs]) -> Callable[..., Any] | None:
    """How the model is run; None: not at all.

    Where nobody needs logits, the head and its loss are left out: with a large vocabulary they cost more memory than
    the rest. An encoder-decoder runs as a whole, as it makes its decoder's inputs of the labels.
    """
    if "logits" in needs:
        return partial(model, **_constant(model))
    return forward_through_layers(model) if "layers" in needs else None


def forward_through_layers(model: PreTrainedModel) -> Callable[..., Any]:
    """What runs all layers of `model` on a batch, given as keyword arguments, and where it can no head and no loss."""
    if model.config.is_encoder_decoder:
        return partial(model, **_constant(model))
    return lambda labels=None, **inputs: model.base_model(**inputs, **_constant(model))


def _constant(model: PreTrainedModel) -> dict[str, Any]:
    # A cache of keys and values is for generation.
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def _samples(batch: Any) -> int:
    """How many samples a batch holds; DataError when it is none."""
    lengths = {
        name: len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else None for name, tensor in batch.items()
    }
    sizes = set(lengths.values())
    if len(sizes) != 1 or sizes & {None, 0}:
        raise DataError(
            f"A batch of the data has along the first axis of its tensors {lengths} (None: it is no tensor). Give "
            "tensors of the same number of samples."
        )
    return cast(int, sizes.pop())


@contextlib.contextmanager
def _tapped(taps: Sequence[Tap]) -> Iterator[None]:
    """Within the context, taps read. Only here: an observer that runs the model itself isn't heard by others."""
    with contextlib.ExitStack() as stack:
        for tap in taps:
            if tap.where == "input":
                handle = tap.module.register_forward_pre_hook(partial(_read_input, tap), with_kwargs=True)
            else:
                handle = tap.module.register_forward_hook(partial(_read_output, tap))
            stack.callback(handle.remove)
        yield


def _read_input(tap: Tap, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    tap.read(first_argument(arguments, named))


def _read_output(tap: Tap, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    tap.read(output if isinstance(output, Tensor) else output[0])


@contextlib.contextmanager
def _bar(samples: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    # Standard output belongs to what the caller prints.
    console = Console(stderr=True)
    with Progress(console=console, disable=not (enabled and console.is_terminal), transient=True) as bars:
        task = bars.add_task("samples", total=samples)
        yield lambda more: bars.advance(task, more)
