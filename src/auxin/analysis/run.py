"""Runs measurements: one pass over the data for all of them, and none for those whose result is known already."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.accounting.executed import count_known
from auxin.accounting.inputs import without_cache
from auxin.analysis.cache import Record, Subject, cached, default_cache, store, subject_of
from auxin.analysis.effort import Effort, Tally
from auxin.analysis.fingerprint import is_known, model_fingerprint
from auxin.analysis.measurement import (
    CalibrationData,
    Found,
    Measurement,
    Needs,
    Observer,
    Tap,
    as_model_has,
    measurement,
)
from auxin.errors import DataError
from auxin.models.evaluating import evaluation_mode
from auxin.nn.autocast import without_autocast
from auxin.nn.calls import first_argument
from auxin.objectives.calibration import Calibration


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

    The model stays as it is: weights, gradients, the mode of every module, and what a forward pass writes into configs
    and modules. What a measurement takes is counted also where it is known already: a `Calibration` hears of its
    samples, and whoever counts FLOPs (`ExecutedFlops`) of its FLOPs, as if everything that is wanted had been measured
    now. Time is that which passes.

    Args:
        wanted: measurements, or names of some with their default settings.
        model: the model, with weights.
        data: samples; None where only weights are looked at.
        cache: where results are kept and looked up: a folder, True for `default_cache()`, False for nowhere. They are
            found again under the fingerprints of model and data and the measurement's settings. What is measured on a
            model that no fingerprint knows (hooks, a forward pass put in place of a module's) is not kept.
        progress: whether a bar on standard error, where that is a terminal, shows the samples done.

    Returns:
        A record for each, in the order of `wanted`.

    Raises:
        ConfigError: an unknown measurement, no data where some are needed, or a model without weights.
        DataError: the data are no batches of the model's inputs, or not as many samples as they say.
        AuxinError: the model can't be measured so; what else a measurement raises.
    """
    asked = [measurement(item) if isinstance(item, str) else item for item in wanted]
    fingerprint, device = model_fingerprint(model), next(model.parameters()).device
    subjects = [subject_of(item, fingerprint, data, device) for item in asked]
    folder = None if cache is False or not is_known(model) else default_cache() if cache is True else Path(cache)
    known = [
        cached(folder, subject, item.result_type) if folder else None
        for item, subject in zip(asked, subjects, strict=True)
    ]
    missing = [number for number, record in enumerate(known) if record is None]
    new = _measured(asked, subjects, missing, model, data, progress) if missing else {}
    if folder:
        for record in new.values():
            store(folder, record)
    found = [new[number] if record is None else record for number, record in enumerate(known)]
    _count_known([record.effort for record in found], [record.effort for record in new.values()], data)
    return found


def _count_known(all_of_it: Sequence[Effort], executed: Sequence[Effort], data: CalibrationData | None) -> None:
    """Count what there would have been to do, less what was counted when it was done."""
    whole, done = Effort.together(all_of_it), Effort.together(executed)
    count_known(whole.flops - done.flops)
    if isinstance(data, Calibration) and whole.samples > done.samples:
        data.count_known(whole.samples - done.samples, whole.units - done.units)


def _measured(
    asked: Sequence[Measurement[Any]],
    subjects: Sequence[Subject],
    missing: Sequence[int],
    model: PreTrainedModel,
    data: CalibrationData | None,
    progress: bool,
) -> dict[int, Record]:
    """The records of the measurements that are `missing`, by their numbers."""
    tally, observers = Tally(), {}
    with without_autocast(), tally.running():
        for number in missing:
            with tally.of(number):
                observers[number] = asked[number].observe(model)
        following = [
            _Following(number, observers[number], asked[number].needs)
            for number in missing
            if asked[number].needs != "weights"
        ]
        if following:
            _follow(following, model, cast(CalibrationData, data), tally, progress)
        found = {}
        for number, observer in observers.items():
            with tally.of(number):
                found[number] = observer.result()
    return {
        number: Record(subject=subjects[number], effort=tally.effort(number, asked[number].needs), result=result)
        for number, result in found.items()
    }


class _Following(NamedTuple):
    """An observer that follows a pass."""

    number: int
    observer: Observer[Any]
    needs: Needs


def _follow(
    following: Sequence[_Following], model: PreTrainedModel, data: CalibrationData, tally: Tally, progress: bool
) -> None:
    """One pass over the data that all observers follow. What models draw at random on the way nobody misses."""
    forward = _forward(model, {one.needs for one in following}, tally)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with (
        evaluation_mode(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
        _bar(data.samples, progress) as advance,
    ):
        for batch in data.batches():
            samples = _samples(batch)
            inputs = as_model_has(model, batch)
            for number, observer, _ in following:
                with tally.of(number):
                    observer.before(inputs)
            with _tapped(following, tally):
                output = forward(**inputs) if forward is not None else None
            for number, observer, needs in following:
                with tally.of(number):
                    observer.after(inputs, output if needs == "logits" else None)
            tally.samples += samples
            tally.units += data.size(batch)[1] if isinstance(data, Calibration) else 0
            advance(samples)
    if tally.samples != data.samples or not tally.samples:
        raise DataError(
            f"The data say that they hold {data.samples} samples, but gave {tally.samples}. Nothing was measured."
        )


def _forward(model: PreTrainedModel, needs: set[Needs], tally: Tally) -> Callable[..., Any] | None:
    """How the model is run; None: not at all.

    Where nobody needs logits, the head and its loss are left out: with a large vocabulary they cost more memory than
    the rest. An encoder-decoder runs as a whole, as it makes its decoder's inputs of the labels.
    """
    if "logits" in needs:
        whole = partial(model, **without_cache(model))
        if "layers" not in needs or model.config.is_encoder_decoder:
            return whole

        def forward(**inputs: Any) -> Any:
            with tally.up_to_the_last_layer(model.base_model):
                return whole(**inputs)

        return forward
    return forward_through_layers(model) if "layers" in needs else None


def forward_through_layers(model: PreTrainedModel) -> Callable[..., Any]:
    """What runs all layers of `model` on a batch, given as keyword arguments, and where it can no head and no loss."""
    if model.config.is_encoder_decoder:
        return partial(model, **without_cache(model))
    return lambda labels=None, **inputs: model.base_model(**inputs, **without_cache(model))


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
def _tapped(following: Sequence[_Following], tally: Tally) -> Iterator[None]:
    """Within the context, taps read. Only here: an observer that runs the model itself isn't heard by others."""
    with contextlib.ExitStack() as stack:
        for number, observer, _ in following:
            for tap in observer.taps:
                told = replace(tap, read=tally.of(number)(tap.read))
                if tap.where == "input":
                    handle = tap.module.register_forward_pre_hook(partial(_read_input, told), with_kwargs=True)
                else:
                    handle = tap.module.register_forward_hook(partial(_read_output, told))
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
