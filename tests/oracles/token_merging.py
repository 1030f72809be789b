"""Bipartite matching one token at a time, in loops over lists of tokens, and a layer on what is left of them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Groups = list[list[int]]
"""Numbers of the tokens of each group; those that are left alone first."""


def cosine(a: Array, b: Array) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(float(a @ a) * float(b @ b)))


def groups(tokens: Array, merged: int, kept: int) -> Groups:
    """The groups of (sequence, d), `merged` fewer than there are tokens."""
    alone = [[number] for number in range(kept)]
    others = [[number] for number in range(kept, len(tokens))]
    while merged:
        odd = [others[place] for place in range(1, len(others), 2)]
        pairs = []
        for place in range(0, len(others), 2):
            mean = tokens[others[place]].mean(0)
            alike = [cosine(mean, tokens[other].mean(0)) for other in odd]
            best = max(range(len(odd)), key=lambda other: (alike[other], -other))
            pairs.append((-alike[best], place, best))
        joined = [[*group] for group in odd]
        gone = set()
        for _, place, best in sorted(pairs)[:merged]:
            if not odd:
                break
            joined[best] += others[place]
            gone.add(place)
        others = [others[place] for place in range(0, len(others), 2) if place not in gone] + joined
        merged -= len(gone)
    return alone + others


def attention(tokens: Array, sizes: Sequence[int], weights: dict[str, Array], heads: int) -> Array:
    """Softmax attention of (sequence, d) in which key k counts as if it came sizes[k] times."""
    q, k, v = (
        tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")
    )
    dim, out = q.shape[1] // heads, np.zeros_like(q)
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        for one in range(len(tokens)):
            scores = [
                size * math.exp(float(q[one, part] @ k[other, part]) / math.sqrt(dim))
                for other, size in enumerate(sizes)
            ]
            for other, score in enumerate(scores):
                out[one, part] += score / sum(scores) * v[other, part]
    return out @ weights["o_proj.weight"].T + weights["o_proj.bias"]


def layer(tokens: Array, merged: int, kept: int, module: Any) -> Array:
    """What a ViT's layer gives for (sequence, d) where tokens are merged before it."""
    found = groups(tokens, merged, kept)
    stream = np.stack([tokens[group].mean(0) for group in found])
    weights = {name: value.detach().numpy() for name, value in module.attention.named_parameters()}
    stream = stream + attention(
        norm(stream, module.layernorm_before),
        [len(group) for group in found],
        weights,
        module.attention.num_attention_heads,
    )
    hidden = norm(stream, module.layernorm_after)
    up, down = module.mlp.fc1, module.mlp.fc2
    hidden = hidden @ up.weight.detach().numpy().T + up.bias.detach().numpy()
    hidden = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)(hidden)
    stream = stream + hidden @ down.weight.detach().numpy().T + down.bias.detach().numpy()
    whole = np.zeros((len(tokens), stream.shape[1]))
    for number, group in enumerate(found):
        whole[group] = stream[number]
    return whole


def norm(x: Array, module: Any) -> Array:
    centred = x - x.mean(1, keepdims=True)
    spread = np.sqrt((centred**2).mean(1, keepdims=True) + module.eps)
    return centred / spread * module.weight.detach().numpy() + module.bias.detach().numpy()
