"""Second moments of what modules read, C = sum over tokens of x x^T. By them one knows how far a changed weight moves
what a linear layer gives, |(W' - W) X|^2 = tr (W' - W) C (W' - W)^T."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.measurement import CalibrationData, as_model_has, kept_by_decoder, result_of
from auxin.errors import DataError, PlanError
from auxin.models.evaluating import evaluation_mode
from auxin.models.places import DECODER_LENGTH, running_on_shapes
from auxin.nn.autocast import without_autocast
from auxin.nn.calls import first_argument
from auxin.nn.linear import widths

MOST = 2**31
"""Bytes of moments that are added up at once; where there are more, the data is gone through several times."""


@dataclass(frozen=True)
class Read:
    """Linear layers that read the same tensors, in all their calls."""

    paths: tuple[str, ...]
    of_decoder: bool
    """Whether these have the tokens of an encoder-decoder's decoder."""


def read_together(model: PreTrainedModel, paths: Sequence[str]) -> list[Read]:
    """Which layers read the same, as a run on shapes shows it. Layers that do not run are left out.

    Args:
        model: weights are not looked at.
        paths: of modules that take one tensor.
    """
    read: dict[str, list[Tensor]] = {}

    def note(path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        read.setdefault(path, []).append(first_argument(arguments, named))

    with running_on_shapes(model) as (fake, inputs), torch.no_grad():
        for path in paths:
            fake.get_submodule(path).register_forward_pre_hook(partial(note, path), with_kwargs=True)
        result_of(fake, inputs)
        found: dict[tuple[int, ...], list[str]] = {}
        for path, tensors in read.items():
            found.setdefault(tuple(map(id, tensors)), []).append(path)
        decoder = model.config.is_encoder_decoder
        return [
            Read(tuple(same), decoder and read[same[0]][0].shape[1:2] == (DECODER_LENGTH,)) for same in found.values()
        ]


def input_moments(
    model: PreTrainedModel, data: CalibrationData, reads: Sequence[Read]
) -> Iterator[tuple[Read, Tensor]]:
    """C of what layers read, (in, in), float64, on the model's device; see `second_moments`. Each token is divided by
    its length, so that all count alike: in some layers of trained models a few are far larger than all others, and
    would be all that C tells of (benchmarks/greenformers_tokens.py has what that costs).

    Args:
        model: with weights; stays as it is.
        data: samples.
        reads: of `read_together`.

    Raises:
        PlanError: something that is read is not finite.
    """
    left = list(reads)
    while left:
        some = [left.pop(0)]
        taken = _bytes(model, some[0])
        while left and (taken := taken + _bytes(model, left[0])) <= MOST:
            some.append(left.pop(0))
        of_decoder = {read.paths[0]: read.of_decoder for read in some}
        found = second_moments(model, data, of_decoder, prepared=_of_length_one)
        for read in some:
            moments = found.pop(read.paths[0])
            if not moments.isfinite().all():
                raise PlanError(
                    f"{read.paths[0]} reads what is not finite on these samples, so that nothing is known of its "
                    "inputs. Give other samples, or keep it."
                )
            yield read, moments


def _of_length_one(hidden: Tensor) -> Tensor:
    return hidden / hidden.norm(dim=1, keepdim=True).clamp(min=torch.finfo(hidden.dtype).tiny)


def _bytes(model: PreTrainedModel, read: Read) -> int:
    inputs, _ = widths(model.get_submodule(read.paths[0]))
    return 8 * inputs**2


def second_moments(
    model: PreTrainedModel,
    data: CalibrationData,
    of_decoder: Mapping[str, bool],
    run: Callable[..., Any] | None = None,
    prepared: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    together: bool = False,
) -> dict[str, Tensor]:
    """C of what modules are given, over all their calls, float64, on the model's device. Padding does not count.

    Args:
        model: with weights; stays as it is.
        data: samples.
        of_decoder: by path of the modules, whether they are given the tokens of an encoder-decoder's decoder.
        run: (inputs by name) -> anything, what the model is run by; None: the whole model.
        prepared: what is made of hidden states (tokens, width), float64, before.
        together: whether there is one C of all modules, under the path "".

    Raises:
        DataError: there are tokens with a mask, and a module is given other ones.
    """
    sums: dict[str, Tensor] = {}
    kept: dict[bool, Tensor | None] = {}

    def add(path: str, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = prepared(_tokens(path, first_argument(arguments, named).detach(), kept[of_decoder[path]]).double())
        key = "" if together else path
        if key not in sums:
            sums[key] = hidden.new_zeros(hidden.shape[1], hidden.shape[1])
        sums[key].addmm_(hidden.mT, hidden)

    with evaluation_mode(model), torch.no_grad(), without_autocast(), contextlib.ExitStack() as stack:
        for path in of_decoder:
            hook = model.get_submodule(path).register_forward_pre_hook(partial(add, path), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in data.batches():
            inputs = as_model_has(model, batch)
            kept.update(kept_by_decoder(model, inputs))
            _ = result_of(model, inputs) if run is None else run(**inputs)
    return sums


def _tokens(path: str, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Those of hidden states that are no padding, (tokens, width)."""
    flat = hidden.flatten(0, -2)
    if mask is not None and len(flat) == mask.numel():  # in a row or by samples
        return flat[mask.flatten()]
    if mask is not None and hidden.dim() > 2 and len(hidden) == len(mask):
        raise DataError(
            f"{path} is given {hidden.shape[1]} places of each sample, and there is a mask of {mask.shape[1]}, so that "
            "it is not known which of them are padding. Give samples without padding, or keep it."
        )
    return flat  # one row for each sample, or none: positions, say
