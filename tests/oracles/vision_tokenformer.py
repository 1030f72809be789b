"""A TokenFormer of images in NumPy, float64, written from the paper's equations and ViT's: patches are cut by hand, and
nothing of torch is used.

`fake` names what an implementation may have in the place of the paper's layer, and gives what that computes: tests see
by it that they would tell.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
Fake = Literal["", "no sqrt(n)", "softmax", "causal", "two feed-forward layers", "gains in the layers"]


def logits(
    weights: Weights,
    pixels: Array,
    *,
    heads: int,
    patch: tuple[int, int],
    layers: int,
    groups: Mapping[str, Sequence[int]],
    tau: Mapping[str, Sequence[float]],
    functions: Mapping[str, str],
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    fake: Fake = "",
) -> Array:
    """Logits (images, classes) of pixels (images, channels, height, width).

    Args:
        weights: by the names of the model's state dict, "model." left out.
        pixels: the images.
        heads, patch, layers: of the config; a patch has height and width.
        groups, tau, functions: sizes and scales of each group, and score functions, by slot.
        eps: beside the norm of scores.
        norm_eps: of layer norms.
        fake: what to compute instead.
    """
    x = np.stack([_tokens(weights, image, patch) for image in pixels])

    def tokens(name: str, slot: str, rows: Array) -> Array:
        function = "softmax" if fake == "softmax" else functions[slot]
        scale = np.ones(len(tau[slot])) if fake == "no sqrt(n)" else np.asarray(tau[slot])
        keys, values = weights[f"{name}.key_tokens"], weights[f"{name}.value_tokens"]
        scores, first, added = rows @ keys.T, 0, np.zeros((*rows.shape[:-1], values.shape[1]))
        for size, t in zip(groups[slot], scale, strict=True):
            part = slice(first, first + size)
            added += _weights(scores[..., part], float(t), function, eps) @ values[part]
            first += size
        return added

    def norm(name: str, rows: Array) -> Array:
        normed = _normed(rows, norm_eps)
        if f"{name}.weight" in weights:
            return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return normed * np.linspace(0.5, 1.5, rows.shape[-1]) if fake == "gains in the layers" else normed

    for number in range(layers):
        at = f"layers.{number}"
        normed = norm(f"{at}.attention_norm", x)
        query, key, value = (tokens(f"{at}.attention.{part}", "qkv", normed) for part in ("query", "key", "value"))
        attended = _attend(query, key, value, heads, causal=fake == "causal")
        x = x + tokens(f"{at}.attention.proj", "proj", attended)
        hidden = tokens(f"{at}.mlp", "ffn", norm(f"{at}.mlp_norm", x))
        x = x + (tokens(f"{at}.mlp", "ffn", hidden) if fake == "two feed-forward layers" else hidden)
    last = _normed(x, norm_eps) * weights["norm.weight"] + weights["norm.bias"]
    return last[:, 0] @ weights["classifier.weight"].T + weights["classifier.bias"]


def _tokens(weights: Weights, image: Array, patch: tuple[int, int]) -> Array:
    """The class token and the patches of one image, row by row, with their positions: (1 + patches, width)."""
    filters, bias = (weights[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
    rows = [weights["embeddings.cls_token"][0, 0]]
    _, height, width = image.shape
    for top in range(0, height, patch[0]):
        for left in range(0, width, patch[1]):
            cut = image[:, top : top + patch[0], left : left + patch[1]]
            rows.append(np.array([(one * cut).sum() for one in filters]) + bias)
    return np.stack(rows) + weights["embeddings.position_embeddings"][0]


def _weights(scores: Array, tau: float, function: str, eps: float) -> Array:
    """What a group's scores weigh, (..., tokens)."""
    if function == "softmax":
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return tau**2 * powers / powers.sum(-1, keepdims=True)
    if function == "gelu":
        return _gelu(scores)
    assert function == "l2_norm_gelu"
    return _gelu(tau * scores / (np.sqrt((scores**2).sum(-1, keepdims=True)) + eps))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def _normed(x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def _attend(query: Array, key: Array, value: Array, heads: int, causal: bool) -> Array:
    width = query.shape[-1] // heads
    output = np.zeros_like(query)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].swapaxes(-1, -2) / np.sqrt(width)
        if causal:
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        output[..., part] = powers / powers.sum(-1, keepdims=True) @ value[..., part]
    return output
