"""W8A8 by hand: quantizers of single numbers in plain Python, and forward passes in NumPy, float64, in which every
tensor that is stored in integers goes through `store`, with the place where it arises.

From Bondarenko et al. (arXiv 2306.12929) and the modeling files of transformers; one sample, without dropout.
"""

import math
from collections.abc import Callable

import numpy as np

from oracles.similarity import Array, Weights, gelu, layer_norm, linear, rms, rotate, silu, softmax, split

Store = Callable[[str, Array], Array]
"""What is made of the tensor that arises at a place."""


def asymmetric(value: float, low: float, high: float, bits: int = 8) -> float:
    """One entry of an activation whose range is low ... high, which holds 0."""
    levels = 2**bits - 1
    delta = (high - low) / levels
    zero = round(-low / delta)
    return delta * (min(max(round(value / delta) + zero, 0), levels) - zero)


def symmetric(value: float, threshold: float, bits: int = 8) -> float:
    """One entry of a weight whose grid reaches to the threshold."""
    delta = threshold / (2 ** (bits - 1) - 1)
    return delta * min(max(round(value / delta), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)


def activation(x: Array, low: float, high: float) -> Array:
    """All entries of it."""
    return np.vectorize(lambda value: asymmetric(value, low, high))(x)


def weight(w: Array, bits: int = 8) -> Array:
    """All entries of it, up to the largest one."""
    return np.vectorize(lambda value: symmetric(value, float(np.abs(w).max()), bits))(w)


def least_error(w: Array, bits: int = 8) -> Array:
    """The same, up to that of a hundred thresholds which loses least."""
    tried = []
    for number in range(1, 101):
        threshold = (float(np.abs(w).max()) + 0.5) * number / 100
        found = np.vectorize(lambda value, threshold=threshold: symmetric(value, threshold, bits))(w)
        tried.append((float(((found - w) ** 2).sum()), number, found))
    return min(tried, key=lambda one: one[:2])[2]


def percentiles(x: Array, percentile: float) -> tuple[float, float]:
    """The range between two percentiles of the nearest rank, and 0."""
    entries = sorted(x.flat)
    rank = max(math.ceil(len(entries) * percentile / 100), 1)
    return min(entries[len(entries) - rank], 0.0), max(entries[rank - 1], 0.0)


def running(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    """r <- 0.9 r + 0.1 new."""
    low, high = ranges[0]
    for one, other in ranges[1:]:
        low, high = 0.9 * low + 0.1 * one, 0.9 * high + 0.1 * other
    return low, high


def _attention(q: Array, k: Array, v: Array, scale: float, causal: bool, name: str, store: Store) -> Array:
    scores = store(f"{name}.scores", q @ k.transpose(0, 2, 1)) * scale
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[1:], dtype=bool)), scores, -np.inf)
    read = store(f"{name}.probabilities", softmax(scores))
    return store(f"{name}.context", read @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)


def bert(w: Weights, head: Array, ids: list[int], types: list[int], heads: int, eps: float, store: Store) -> Array:
    """The logits of a BertForMaskedLM of two layers.

    Args:
        w: its weights, quantized or not.
        head: the output head, which stays.
    """

    def norm(name: str, x: Array) -> Array:
        return store(name, layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps))

    def dense(name: str, x: Array) -> Array:
        return store(name, linear(w, name, x))

    e = "bert.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.token_type_embeddings.weight"][types]
    x = norm(f"{e}.LayerNorm", store(f"{e}.embeddings", x + w[f"{e}.position_embeddings.weight"][: len(ids)]))
    for n in range(2):
        p = f"bert.encoder.layer.{n}"
        own = f"{p}.attention.self"
        q, k, v = (split(dense(f"{own}.{part}", x), heads) for part in ("query", "key", "value"))
        a = _attention(q, k, v, q.shape[-1] ** -0.5, False, own, store)
        a = dense(f"{p}.attention.output.dense", a)
        x = norm(f"{p}.attention.output.LayerNorm", store(f"{p}.attention.output.dense.sum", a + x))
        inner = store(f"{p}.intermediate.dense", gelu(linear(w, f"{p}.intermediate.dense", x)))
        o = dense(f"{p}.output.dense", inner)
        x = norm(f"{p}.output.LayerNorm", store(f"{p}.output.dense.sum", o + x))
    t = "cls.predictions.transform"
    x = norm(f"{t}.LayerNorm", store(f"{t}.dense", gelu(linear(w, f"{t}.dense", x))))
    return x @ head.T + w["cls.predictions.bias"]


def llama(w: Weights, head: Array, ids: list[int], heads: int, keys: int, eps: float, store: Store) -> Array:
    """The logits of a LlamaForCausalLM of two layers; arguments as of `bert`."""

    def norm(name: str, x: Array) -> Array:
        return store(name, rms(x, w[f"{name}.weight"], eps))

    def dense(name: str, x: Array) -> Array:
        return store(name, linear(w, name, x))

    x = store("model.embed_tokens", w["model.embed_tokens.weight"][ids])
    for n in range(2):
        p = f"model.layers.{n}"
        own, read = f"{p}.self_attn", norm(f"{p}.input_layernorm", x)
        q, k, v = (
            split(dense(f"{own}.{part}_proj", read), count) for part, count in (("q", heads), ("k", keys), ("v", keys))
        )
        k, v = (np.repeat(y, heads // keys, axis=0) for y in (rotate(k, k.shape[-1]), v))
        q = store(f"{own}.scores.left.input", rotate(q, q.shape[-1]))
        k = store(f"{own}.scores.right.input", k)
        a = dense(f"{own}.o_proj", _attention(q, k, v, q.shape[-1] ** -0.5, True, own, store))
        x = store(f"{own}.sum", x + a)
        read = norm(f"{p}.post_attention_layernorm", x)
        gate = store(f"{p}.mlp.gate_proj", silu(linear(w, f"{p}.mlp.gate_proj", read)))
        inner = store(f"{p}.mlp.down_proj.input", gate * dense(f"{p}.mlp.up_proj", read))
        x = store(f"{p}.mlp.sum", x + dense(f"{p}.mlp.down_proj", inner))
    return norm("model.norm", x) @ head.T
