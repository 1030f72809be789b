"""The loss of each sample without some sublayers and units: what a search over removals looks at again and again.

A sublayer that is gone adds zeros, units that are gone give zeros (`auxin.models.sublayers`, `auxin.analysis.units`).
Attentions may be hard, too.
What the layers below the first one that differs give is remembered from the run of the whole model, for as many batches
as there is room for; each later run begins there.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.layer_outputs import LayerOutputs
from auxin.analysis.measurement import Batch, as_model_has, without_loss
from auxin.analysis.parts import StackParts, stack_parts
from auxin.analysis.sample_losses import output_losses
from auxin.analysis.unit_masks import Mask, Streams, maskable, masked
from auxin.analysis.units import Group, units_of
from auxin.errors import PlanError
from auxin.models.evaluating import evaluation_mode
from auxin.models.sublayers import Sublayer, about_none, add_nothing, refuse_run_again, refuse_shared, sublayers
from auxin.nn.attention_functions import calls_a_function
from auxin.nn.autocast import without_autocast
from auxin.nn.reading_few import reading_few

ROOM = 2**30
"""Bytes of what layers gave that are kept."""
TWELFTHS, ROUND = 12, 8


@dataclass(frozen=True)
class Piece:
    """What can go on its own: a sublayer, or some units of one."""

    sublayer: Sublayer
    group: Group | None = None
    """Of the units; None: the whole sublayer."""
    units: tuple[int, ...] = ()
    """Their numbers in the group."""

    @property
    def layer(self) -> str:
        """The path of its layer."""
        return self.sublayer.layer

    def __str__(self) -> str:
        if self.group is None:
            return self.sublayer.path
        numbers = f"{self.units[0]}..{self.units[-1]}" if len(self.units) > 1 else str(self.units[0])
        return f"{self.sublayer.path} {self.group[0]} {numbers}"


@dataclass(frozen=True)
class Hard:
    """An attention whose queries read the most probable tokens alone (`auxin.nn.reading_few`)."""

    layer: str
    """The path of its layer."""
    path: str
    """Of its module."""
    keep: int
    """How many tokens a query reads."""

    def __str__(self) -> str:
        return f"{self.path} hard"


@dataclass(frozen=True)
class Branch:
    """A sublayer, and the pieces of it that are looked at where it stays as a whole."""

    whole: Piece
    finer: tuple[Piece, ...]


def branches(model: PreTrainedModel, streams: Sequence[Streams], group_size: int | None) -> list[Branch]:
    """The sublayers of `model` and their units, stack by stack and layer by layer.

    Heads go by key-value groups, or one by one where all read a single key-value head; feed-forward units by groups of
    neighbours, of experts in all of them at once. Where a layer has two attentions or two feed-forward parts, units are
    not told apart, and there are none.

    Args:
        model: the model, with weights.
        streams: of which of them units are looked at.
        group_size: feed-forward units of a group; None: a twelfth of them, rounded up to a multiple of 8, since kernels
            want rows of whole 16 bytes. The last group of a layer may have fewer.

    Raises:
        PlanError: the architecture is not known, has several towers, or layers that share a module.
    """
    refuse_run_again(model)
    every = sublayers(model)
    if not every:
        raise PlanError(about_none(model))
    refuse_shared(model, [one.output for one in every])
    units = units_of(model)
    of_layer: dict[tuple[str, bool], list[Group]] = {}
    for group in maskable(units, streams) if streams else []:
        of_layer.setdefault((group[1], group[0] in ("query", "key_value")), []).append(group)
    found = []
    for one in every:
        heads = one.kind != "feed-forward"
        alone = sum(other.layer == one.layer and (other.kind != "feed-forward") == heads for other in every) == 1
        finer: list[Piece] = []
        for group in of_layer.get((one.layer, heads), []) if alone else []:
            count = units.counts[group]
            size = 1 if heads else group_size or ROUND * -(-count // (TWELFTHS * ROUND))
            finer += [
                Piece(one, group, tuple(range(first, min(first + size, count)))) for first in range(0, count, size)
            ]
        found.append(Branch(Piece(one), tuple(finer)))
    return found


def attentions(model: PreTrainedModel, keep: int) -> list[Hard]:
    """The attentions of `model` that can be made hard, stack by stack and layer by layer; none where the architecture
    computes them without an attention function of transformers.

    Args:
        model: on any device; weights are not looked at.
        keep: how many tokens a query is to read.

    Raises:
        PlanError: the architecture is not known.
    """
    return [
        Hard(layer, f"{layer}.{name}", keep)
        for layer, module in _layers(stack_parts(model)).items()
        for name, inner in module.named_modules()
        if calls_a_function(inner)
    ]


class MaskedLosses:
    """Runs a model without some of its pieces, or with attentions that are hard.

    Args:
        model: the model, with weights; it is left as it is.
        batches: its inputs with labels, of any device.
        asked_by: what looks at the losses, for messages.

    Raises:
        PlanError: the architecture is not known.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], asked_by: str) -> None:
        self._model, self._asked_by, self._units = model, asked_by, units_of(model)
        self._batches = [as_model_has(model, batch) for batch in batches]
        layers = _layers(stack_parts(model))
        self._given = [LayerOutputs(layers) for _ in self._batches]
        self.order: list[str] = []
        """The paths of the layers as they run, once the whole model has."""
        self.runs = 0
        """How often the samples were looked at."""

    def whole(self) -> Tensor:
        """The losses of the model as it is, float64, (samples,), on the CPU; later runs begin with what it gave.

        Raises:
            DataError: there is no loss for each sample.
            PlanError: the model has no logits, or runs a layer several times.
        """
        found, kept = [], 0
        with self._running():
            for batch, given in zip(self._batches, self._given, strict=True):
                with given.noted():
                    found.append(self._losses(batch))
                self.order = self.order or list(given.outputs)
                kept += sum(map(_bytes, given.outputs.values()))
                if kept > ROOM:
                    given.outputs = {}
        return torch.cat(found)

    def without(self, gone: Collection[Piece | Hard]) -> Tensor:
        """The losses without some pieces, and with attentions that are hard, float64, (samples,), on the CPU. They are
        compared with those of the whole model, which has to have been run."""
        changed = {piece.layer for piece in gone}
        first = next((layer for layer in self.order if layer in changed), None)
        found = []
        with self._running(), self._masked(gone):
            for batch, given in zip(self._batches, self._given, strict=True):
                known = contextlib.nullcontext() if first is None else given.given_before(first)
                with known:
                    found.append(self._losses(batch))
        return torch.cat(found)

    def _losses(self, batch: Batch) -> Tensor:
        output = self._model(**without_loss(self._model, batch))
        return output_losses(self._model, batch, output, self._asked_by).cpu()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Within the context, the model runs as in evaluation; what it draws on the way nobody misses."""
        self.runs += 1
        device = next(self._model.parameters()).device
        with (
            evaluation_mode(self._model),
            torch.no_grad(),
            without_autocast(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            yield

    @contextlib.contextmanager
    def _masked(self, gone: Collection[Piece | Hard]) -> Iterator[None]:
        of_group: dict[Group, list[int]] = {}
        with contextlib.ExitStack() as stack:
            for piece in gone:
                if isinstance(piece, Hard):
                    stack.enter_context(reading_few(self._model.get_submodule(piece.path), piece.keep))
                elif piece.group is None:
                    output = self._model.get_submodule(piece.sublayer.output)
                    stack.callback(output.register_forward_hook(add_nothing).remove)
                else:
                    of_group.setdefault(piece.group, []).extend(piece.units)
            for group, numbers in of_group.items():
                stack.enter_context(masked(self._units, [Mask(group, tuple(sorted(numbers)))]))
            yield


def _layers(stacks: Sequence[StackParts]) -> dict[str, nn.Module]:
    return {path: layer for parts in stacks for path, layer in parts.layers.items()}


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
