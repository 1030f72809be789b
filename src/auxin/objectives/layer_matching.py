"""Layers of two models side by side: which belong together, what they give in a run, and how far that is apart.

Hidden states are what a layer leaves in the residual stream, before any norm that stands behind the last one.
Attentions are the maps after the softmax, and after the dropout of a model that trains, as transformers gives them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.accounting.flops import countable_kernels
from auxin.accounting.shapes import shape_only_copy, without_data
from auxin.errors import ConfigError, PlanError
from auxin.models.eager import EAGER
from auxin.models.layers import layer_paths
from auxin.nn.autocast import without_autocast


@dataclass(frozen=True)
class Layers:
    """What the layers of a model gave in one run, by their numbers."""

    hidden: dict[int, Tensor]
    """(samples, places, width) each."""
    attentions: dict[int, Tensor]
    """(samples, heads, places, places looked at) each."""

    def of_units(self, units: Sequence[int] | None) -> Self:
        """The same with these units of the hidden states alone, in this order; None: all."""
        if units is None:
            return self
        return replace(self, hidden={number: states[..., list(units)] for number, states in self.hidden.items()})


def paired_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    asked: Mapping[int, int] | None,
    known: Mapping[int, int] | None,
) -> dict[int, int]:
    """Which layer of the teacher each layer of the student is compared with, by their numbers; the others with none.

    Args:
        student, teacher: the models; skeletons will do.
        asked: what somebody wants; None: nothing is asked for.
        known: which layers of the teacher those of the student were made from; None: not known.

    Raises:
        ConfigError: an architecture whose layers are not known, a layer that does not exist, or nothing to go by.
    """
    try:
        ours, theirs = len(layer_paths(student)), len(layer_paths(teacher))
    except PlanError as error:
        raise ConfigError(f"hidden_states, attentions: {error} Leave them at 0.") from error
    pairs = asked if asked is not None else known
    if pairs is None:
        if ours != theirs:
            raise ConfigError(
                f"layers: the student has {ours} layers and the teacher {theirs}, and no changes are known that made "
                "one of the other. Say which belong together, student's first: {0: 0, 1: 3}."
            )
        return {layer: layer for layer in range(ours)}
    for whose, count, numbers in (("student", ours, pairs), ("teacher", theirs, pairs.values())):
        if beyond := [number for number in numbers if not 0 <= number < count]:
            raise ConfigError(f"layers: the {whose} has no layer {beyond[0]}; its layers are 0 to {count - 1}.")
    if not pairs:
        raise ConfigError(
            "layers: no layer of the student was made from one of the teacher's. Say which belong together, student's "
            "first: {0: 0, 1: 3}."
        )
    return dict(pairs)


@contextlib.contextmanager
def watched_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within the context, what the numbered layers left in the last run of `model`; whoever has read it clears it."""
    seen: dict[int, Tensor] = {}
    paths = layer_paths(model)

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(paths[number]).register_forward_hook(keep(number)) for number in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_maps(output: Any) -> tuple[Tensor, ...]:
    """The maps of all layers in a model's output, an encoder's before those of its decoder."""
    if getattr(output, "encoder_attentions", None) is not None:
        return (*output.encoder_attentions, *output.decoder_attentions)
    return tuple(output.attentions or ())


def check_shapes(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Mapping[int, int],
    inputs: Mapping[str, Any],
    hidden: bool,
    attentions: bool,
    units: Sequence[int] | None = None,
    projected: bool = False,
) -> float:
    """Refuse models whose paired layers can't be subtracted from each other; nothing is computed.

    Args:
        student, teacher: the models; skeletons will do.
        pairs: by a layer's number in the student, the teacher's.
        inputs: keyword arguments of a call of either.
        hidden, attentions: what is compared.
        units: by a unit of the student's hidden states that of the teacher's which it is compared with; None: its own.
        projected: whether hidden states are mapped before, so that widths may differ.

    Returns:
        The FLOPs of the maps, their fit and the way back through them included.

    Raises:
        ConfigError: widths, numbers of heads or numbers of places differ, or a model gives no maps.
    """
    ours = _shapes(student, list(pairs), inputs, attentions, "student")
    theirs = _shapes(teacher, list(pairs.values()), inputs, attentions, "teacher")
    flops = 0.0
    for layer, other in pairs.items():
        told = tuple(theirs.hidden[other].shape)
        found = tuple(ours.hidden[layer].shape), told if units is None or projected else (*told[:-1], len(units))
        if projected and found[0][:-1] == found[1][:-1]:
            width, wanted = found[0][-1], found[1][-1]
            # For the fit both products with the states, then the map and the way back through it.
            flops += 2.0 * math.prod(found[0][:-1]) * width * (3 * wanted + width)
        elif hidden and found[0] != found[1]:
            mend = "map the student's (projected: true), or ask for relations, which no width has a part in."
            if projected:
                mend = "which have as many places."
            raise ConfigError(
                f"hidden_states: layer {layer} of the student gives {_states(found[0])}, and layer {other} of the "
                f"teacher {_states(found[1])}: only equal ones can be compared. Set hidden_states: 0, give a "
                f"teacher of the student's width, pair other layers, {mend}"
            )
        if not attentions:
            continue
        maps = tuple(ours.attentions[layer].shape), tuple(theirs.attentions[other].shape)
        if maps[0] != maps[1]:
            raise ConfigError(
                f"attentions: layer {layer} of the student has {maps[0][1]} heads over {maps[0][2]} places, and layer "
                f"{other} of the teacher {maps[1][1]} heads over {maps[1][2]}: only equal ones can be compared. Set "
                "attentions: 0, give a teacher with as many heads, or pair other layers."
            )
    return flops


def _states(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]} numbers at each of {shape[-2]} places"


def _shapes(
    model: PreTrainedModel, layers: Sequence[int], inputs: Mapping[str, Any], attentions: bool, whose: str
) -> Layers:
    """What the numbered layers give, without data."""
    with shape_only_copy(model) as copy, countable_kernels(copy):
        assert isinstance(copy, PreTrainedModel)
        copy.eval()
        if attentions:
            copy.set_attn_implementation(EAGER)
        with watched_layers(copy, layers) as seen:
            output = copy(**without_data(inputs), **({"output_attentions": True} if attentions else {}))
        return layers_of(copy, seen, output if attentions else None, layers, whose)


def layers_of(
    model: PreTrainedModel, seen: dict[int, Tensor], output: Any, layers: Sequence[int], whose: str
) -> Layers:
    """What the numbered layers of `model` gave in the run of which `seen` was kept, which is emptied, and `output` is
    the result; None where its maps are not asked for.

    Raises:
        ConfigError: `model`, which is `whose`, has another number of maps than layers.
    """
    hidden = dict(seen)
    seen.clear()
    if output is None:
        return Layers(hidden, {})
    maps = attention_maps(output)
    if len(maps) != len(layer_paths(model)) or any(maps[number] is None for number in layers):
        raise ConfigError(
            f"attentions: the {whose} has {len(layer_paths(model))} layers and gives {len(maps)} maps, so that it is "
            "not known whose they are. Set attentions: 0."
        )
    return Layers(hidden, {number: maps[number] for number in layers})


def mean_squared_distance(
    ours: Mapping[int, Tensor],
    theirs: Mapping[int, Tensor],
    pairs: Mapping[int, int],
    weights: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The mean squared difference of paired tensors, the mean over the pairs, float32.

    Args:
        ours, theirs: by a layer's number, (samples, places, width) or (samples, heads, places, places looked at).
        pairs: by a layer's number on our side, that on theirs.
        weights, mask: see `mean_by_sample`.
    """
    parts = []
    for layer, other in pairs.items():
        squared = (ours[layer].float() - theirs[other].float()).square()
        # The mean over all but samples and places, whatever comes between.
        by_place = squared.mean(-1) if squared.dim() == 3 else squared.mean((1, 3))
        parts.append(mean_by_sample(by_place, weights, mask))
    return torch.stack(parts).mean()


def fitted(
    ours: Mapping[int, Tensor],
    theirs: Mapping[int, Tensor],
    pairs: Mapping[int, int],
    weights: Tensor,
    mask: Tensor | None,
) -> dict[int, Tensor]:
    """What the best affine map makes of each of our hidden states, beside those of theirs that it is paired with:

        W, b = argmin sum over places of v |s W + b - t|^2 + EPSILON tr(S^T V S) / width |W|^2,

    v the weight of a place in `mean_by_sample`, S the centred states; float32, also under autocast. It is found anew
    from what is there, by the normal equations in float64, and no gradient goes through it: at a minimum there is none,
    but for the ridge's share, which is small where places are many and states fill their directions.

    Args:
        ours, theirs: by a layer's number, (samples, places, width).
        pairs: by a layer's number on our side, that on theirs.
        weights, mask: see `mean_by_sample`.

    Raises:
        ConfigError: a map has as many numbers as there are places, and so makes whatever is asked for of any states.
    """
    found = {}
    for layer, other in pairs.items():
        states = ours[layer].float()
        values, told = (x.detach().double().flatten(0, 1) for x in (states, theirs[other]))
        if len(values) <= states.shape[-1]:
            raise ConfigError(
                f"projected: a part of a batch has {len(values)} places, which a map of {states.shape[-1]} units fits "
                "whatever they hold, so that nothing would be learnt. Give several times as many: raise "
                "micro_batch_size, batch_size or data.context_length."
            )
        of_places = torch.ones_like(states[..., 0], dtype=torch.float64)
        if mask is not None and mask.shape == of_places.shape:
            of_places = mask.to(of_places)
        of_places = of_places / of_places.sum(1, keepdim=True) * weights.to(of_places)[:, None]
        share = (of_places / of_places.sum()).flatten()[:, None]
        means = (share * values).sum(0), (share * told).sum(0)
        centred, wanted = values - means[0], told - means[1]
        gram = (share * centred).mT @ centred
        ridge = EPSILON * gram.diagonal().mean()
        gram.diagonal().add_(ridge.clamp(min=torch.finfo(gram.dtype).tiny / EPSILON))
        with without_autocast():
            slope = torch.linalg.solve(gram, (share * centred).mT @ wanted)
            found[layer] = (states - means[0].float()) @ slope.float() + means[1].float()
    return found


EPSILON = 1e-6
"""Of the mean variance: the ridge of the map's fit, for directions in which our states have none."""


def mean_by_sample(by_place: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of what there is at each place, in which every sample weighs as much as `weights` says and every place
    of it the same, so that parts of a batch, weighed by the sum of their weights, make up the whole.

    Args:
        by_place: (samples, places).
        weights: (samples,).
        mask: (samples, places), 0 at places that are padding; None: none is. Tensors of another number of places, such
            as a decoder's beside an encoder's mask, have none either.
    """
    if mask is None or mask.shape != by_place.shape:
        by_sample = by_place.mean(1)
    else:
        real = mask.to(by_place.dtype)
        by_sample = (by_place * real).sum(1) / real.sum(1)
    return (by_sample * weights).sum() / weights.sum()
