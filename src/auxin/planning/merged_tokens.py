"""From scores of tokens to how many of them each layer merges: what every method does once it has such scores.

A score is what is lost when the token at one position does not enter one layer, nor those behind it. In the order of
score / (layers from that one on), the lowest first, of equal ones those of later layers and positions, positions leave:
each layer counts alike there, since a token that goes early costs as many layers less as it is missed by, so that the
order is that of what is lost for what is saved. A position that was to leave at a later layer leaves earlier then. Of
the positions only the numbers count: layer l merges as many tokens as have left before or at l, whichever these are.

The first states of this order that meet a limit are taken. No layer is left with a tenth of its patches or less, and
the first one keeps all.

Steps 3 and 5 of OPTIN (arXiv 2403.17921), where tokens go by their scores alone.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from auxin.accounting.inputs import example_inputs
from auxin.accounting.shapes import shape_only_copy, without_data
from auxin.edits.kinds.edit import ReplaceModule
from auxin.errors import PlanError
from auxin.planning.target import Gauge, Removal, least_removal

LEAST = 0.1
"""More than this share of its patches is left to every layer."""


def merged_counts(scores: Sequence[Sequence[float]]) -> list[list[int]]:
    """Ever more merged tokens by layer, a position and a layer further at a time.

    Args:
        scores: by layer, from the second one on, and position, what is lost without the token from that layer on.
    """
    layers, patches = len(scores), len(scores[0])
    places = [(layer, position) for layer in range(layers) for position in range(patches)]
    order = sorted(places, key=lambda at: (scores[at[0]][at[1]] / (layers - at[0]), -at[0], -at[1]))
    most = ceil((1 - LEAST) * patches) - 1
    counts, states = [0] * layers, []
    leaves: dict[int, int] = {}
    for layer, position in order:
        before = leaves.get(position, layers)
        if layer >= before or (position not in leaves and len(leaves) == most):
            continue
        leaves[position] = layer
        counts = [count + (layer <= number < before) for number, count in enumerate(counts)]
        states.append(counts)
    return states


def tokens_of_layers(model: PreTrainedModel, layers: str) -> int:
    """How many tokens go through the layers at a path of `model`, an encoder of patches, on images of its config's
    size; the model is run on shapes alone."""
    lengths: list[int] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        lengths.append(arguments[0].shape[1])

    with shape_only_copy(model) as copy, torch.no_grad():
        copy.get_submodule(f"{layers}.0").register_forward_pre_hook(note)
        copy(**without_data(example_inputs(model, batch=1, length=1, decoder_length=1)))
    return lengths[0]


def fewer_tokens(
    gauge: Gauge, scores: Mapping[str, Sequence[float]], first: int, before: Sequence[Any], method: str
) -> Removal:
    """The fewest merged tokens with which a limit is met.

    Args:
        gauge: of the model, an encoder of patches, and how small it shall be.
        scores: see `merged_counts`, by the paths of layers in their order.
        first: how many tokens come before those of patches and are left alone.
        before: edits of the model that come first, if any.
        method: its name, for messages.

    Returns:
        The removal, whose edits are those of `before` and of layers that merge.

    Raises:
        PlanError: scores of images of another size than the config's, at which FLOPs are counted; the limit can't be
            met, or is met already; edits do not fit.
    """
    layers, scored = next(iter(scores)).rpartition(".")[0], len(next(iter(scores.values())))
    if scored != (patches := tokens_of_layers(gauge.model, layers) - first):
        raise PlanError(
            f"The samples are images of {scored} patches, and FLOPs are counted on images of {patches}, the config's "
            "size. Give images of that size."
        )
    states = merged_counts(list(scores.values()))
    merged = [sum(counts) for counts in states]  # FLOPs fall about evenly with these, so that few states are tried

    def edits(amount: int) -> list[Any]:
        counts = zip(scores, states[bisect_left(merged, amount)], strict=True)
        return [*before, *(_merging(path, count, first) for path, count in counts if count)]

    return least_removal(gauge, edits, merged[-1], method)


def _merging(path: str, count: int, first: int) -> ReplaceModule:
    return ReplaceModule(module=path, brick="token_merging_layer", settings={"merged": count, "kept": first})
