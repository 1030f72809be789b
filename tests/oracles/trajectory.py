"""Trajectories one unit and one pair of tokens at a time: a copy of the model without the weights that read the unit
runs from its first layer to its last, and cosines are held against each other in loops, in float64."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def run(model: Any, layers: Sequence[str], batch: Mapping[str, Tensor]) -> tuple[list[Array], Array]:
    """What leaves each of `layers`, (samples, tokens, width), and the logits; of maps the places are tokens."""
    kept: dict[str, Array] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, given, output, path=path: kept.__setitem__(
                path, (output[0] if isinstance(output, tuple) else output).numpy().copy()
            )
        )
        for path in layers
    ]
    with torch.no_grad():
        logits = model(**batch).logits.numpy()
    for handle in handles:
        handle.remove()
    return [by_place(kept[path]) for path in layers], by_place(logits)


def by_place(values: Array) -> Array:
    """(samples, places, channels) of maps (samples, channels, height, width); others as they are."""
    if values.ndim != 4:
        return values
    samples, channels, height, width = values.shape
    rows = [[values[s, :, y, x] for y in range(height) for x in range(width)] for s in range(samples)]
    return np.array(rows).reshape(samples, height * width, channels)


def without(model: Any, weights: Mapping[str, tuple[int, Sequence[int]]]) -> Any:
    """A copy of `model` with zeros in some entries along an axis of some parameters."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, (axis, entries) in weights.items():
            made.get_parameter(name).index_fill_(axis, torch.tensor(list(entries)), 0)
    return made


def manifold(before: Array, after: Array) -> float:
    """L_MD of (rows, width): the sum over all pairs of rows of the squared difference of their cosines."""

    def cosine(rows: Array, a: int, b: int) -> float:
        lengths = math.sqrt(float(rows[a] @ rows[a]) * float(rows[b] @ rows[b]))
        return float(rows[a] @ rows[b]) / lengths if lengths else 0.0  # channels may all be zero behind a ReLU

    pairs = [(a, b) for a in range(len(before)) for b in range(len(before))]
    return sum((cosine(after, *pair) - cosine(before, *pair)) ** 2 for pair in pairs)


def knowledge(before: Array, after: Array, temperature: float) -> float:
    """L_KD of (rows, classes): T^2 times the sum over rows of KL(softmax(before / T), softmax(after / T))."""
    total = 0.0
    for z, changed in zip(before / temperature, after / temperature, strict=True):
        log_p, log_q = (logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()) for logits in (z, changed))
        total += sum(float(math.exp(a) * (a - b)) for a, b in zip(log_p, log_q, strict=True))
    return temperature**2 * total


def score(
    model: Any,
    layers: Sequence[str],
    first: int,
    batch: Mapping[str, Tensor],
    kept: Sequence[Array],
    kept_logits: Array,
    weights: Mapping[str, tuple[int, Sequence[int]]],
    weight: float,
    temperature: float,
) -> float:
    """I of a unit of the layer with number `first`.

    Args:
        model: in float64.
        layers: all, in the order in which they run.
        first: the unit's layer.
        batch: all samples.
        kept: by layer which of its tokens count, (samples, tokens) boolean.
        kept_logits: which of the logits count, (samples, tokens) or (samples,).
        weights: what reads the unit, see `without`.
        weight: lambda.
        temperature: T.
    """
    streams, logits = run(model, layers, batch)
    others, changed = run(without(model, weights), layers, batch)
    moved = sum(manifold(streams[z][kept[z]], others[z][kept[z]]) for z in range(first, len(layers)))
    return moved + weight * knowledge(logits[kept_logits], changed[kept_logits], temperature)


def mean_gram(tokens: Array) -> Array:
    """Of (samples, tokens, width) the cosines of all pairs of samples, token by token, and their means over tokens."""
    samples, count, _ = tokens.shape
    gram = np.zeros((samples, samples))
    for t in range(count):
        for a in range(samples):
            for b in range(samples):
                x, y = tokens[a, t], tokens[b, t]
                gram[a, b] += float(x @ y / math.sqrt(float(x @ x) * float(y @ y))) / count
    return gram


def token_score(
    vit: Any, head: Any, batch: Mapping[str, Tensor], layer: int, position: int, weight: float, temperature: float
) -> float:
    """I of the token at `position` that enters the layer with number `layer` of a ViT, whose layers are run by hand;
    `head` makes logits of what leaves them."""

    def streams(drop: bool) -> tuple[list[Array], Array]:
        hidden, found = vit.embeddings(**batch), []
        for number, module in enumerate(vit.layers):
            if drop and number == layer:
                hidden = torch.cat([hidden[:, :position], hidden[:, position + 1 :]], dim=1)
            hidden = module(hidden)
            found.append(hidden.numpy())
        return found, head(hidden).numpy()

    with torch.no_grad():
        (before, logits), (after, changed) = streams(False), streams(True)
    moved = sum(float(((mean_gram(after[z]) - mean_gram(before[z])) ** 2).sum()) for z in range(layer, len(vit.layers)))
    return moved + weight * knowledge(logits, changed, temperature)


def least_lost(
    heads: Sequence[float], units: Sequence[float], head_cost: float, unit_cost: float, save: float
) -> tuple[int, int]:
    """How many heads and units of the lowest scores go, at least one of each staying: of all pairs of numbers that save
    enough the one that keeps the largest sum of scores."""
    heads, units = sorted(heads), sorted(units)
    best = max(
        (sum(heads[h:]) + sum(units[u:]), h, u)
        for h in range(len(heads))
        for u in range(len(units))
        if h * head_cost + u * unit_cost >= save
    )
    return best[1:]
