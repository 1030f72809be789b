"""Second moments of what linear layers read, C = sum over tokens of x x^T: by them one knows how far a changed weight
moves what a layer gives, |(W' - W) X|^2 = tr (W' - W) C (W' - W)^T."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.measurement import CalibrationData, as_model_has, kept_by_decoder, result_of
from auxin.errors import PlanError
from auxin.models.evaluating import evaluation_mode
from auxin.models.places import DECODER_LENGTH, running_on_shapes
from auxin.nn.autocast import without_autocast
from auxin.nn.calls import first_argument

MOST = 2**31
"""Bytes of moments that are added up at once; where there are more, the data is gone through several times."""


def read_together(model: PreTrainedModel, paths: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Of each layer that runs, the first of those that read the same tensor, and whether what it reads has the tokens
    of an encoder-decoder's decoder; seen in a run on shapes. Layers that do not run are left out.

    Args:
        model: weights are not looked at.
        paths: of modules that take one tensor.
    """
    read: dict[str, Tensor] = {}

    def note(path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        read.setdefault(path, first_argument(arguments, named))

    with running_on_shapes(model) as (fake, inputs), torch.no_grad():
        for path in paths:
            fake.get_submodule(path).register_forward_pre_hook(partial(note, path), with_kwargs=True)
        result_of(fake, inputs)
        first: dict[int, str] = {}
        found = {path: first.setdefault(id(x), path) for path, x in read.items()}
        decoder = model.config.is_encoder_decoder
        return {path: (found[path], decoder and x.shape[1:2] == (DECODER_LENGTH,)) for path, x in read.items()}


def input_moments(
    model: PreTrainedModel, data: CalibrationData, together: Mapping[str, tuple[str, bool]]
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The layers that read one tensor, and the sum of x x^T over its tokens, (in, in), float64, on the model's device;
    for each such tensor. Padding does not count.

    Args:
        model: with weights; stays as it is.
        data: samples.
        together: of `read_together`.

    Raises:
        PlanError: something that is read is not finite, or no token reaches a layer.
    """
    readers: dict[str, list[str]] = {}
    for path, (first, _) in together.items():
        readers.setdefault(first, []).append(path)
    left = list(readers)
    while left:
        some, taken = [left.pop(0)], 0
        while left and (taken := taken + _bytes(model, left[0])) <= MOST:
            some.append(left.pop(0))
        for path, moments in _pass(model, data, {path: together[path][1] for path in some}).items():
            yield tuple(readers[path]), moments


def _bytes(model: PreTrainedModel, path: str) -> int:
    return 8 * max(model.get_submodule(path).get_parameter("weight").shape) ** 2


def _pass(model: PreTrainedModel, data: CalibrationData, of_decoder: Mapping[str, bool]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    kept: dict[bool, Tensor | None] = {}

    def add(path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden, mask = first_argument(arguments, named).detach(), kept[of_decoder[path]]
        if mask is not None and hidden.shape[:2] == mask.shape:
            hidden = hidden[mask]
        hidden = hidden.flatten(0, -2).double()
        if path not in sums:
            sums[path] = hidden.new_zeros(hidden.shape[1], hidden.shape[1])
        sums[path].addmm_(hidden.mT, hidden)

    with evaluation_mode(model), torch.no_grad(), without_autocast(), contextlib.ExitStack() as stack:
        for path in of_decoder:
            hook = model.get_submodule(path).register_forward_pre_hook(partial(add, path), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in data.batches():
            inputs = as_model_has(model, batch)
            kept.update(kept_by_decoder(model, inputs))
            result_of(model, inputs)
    for path in of_decoder:
        if path not in sums or not sums[path].isfinite().all():
            why = "no token of these samples reaches it" if path not in sums else "it reads what is not finite"
            raise PlanError(f"{path}: {why}, so that nothing is known of its inputs. Give other samples, or keep it.")
    return sums
