"""Masked growth in plain numpy float64, written from the paper's description: weighted norms, and whole forwards of a
BERT (norms after the residual sum) and a GPT-2 (norms before) with masks at any strength."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


def weighted_norm(
    x: np.ndarray, mask: np.ndarray, gain: np.ndarray | None, bias: np.ndarray | None, eps: float, kind: str
) -> np.ndarray:
    """A norm over the last axis, entry i counted mask[i] times, its result masked; loops over rows."""
    result = np.zeros_like(x)
    for row in np.ndindex(*x.shape[:-1]):
        values = x[row]
        total = math.fsum(mask)
        mean = math.fsum(m * v for m, v in zip(mask, values, strict=True)) / total if kind == "layer" else 0.0
        variance = math.fsum(m * (v - mean) ** 2 for m, v in zip(mask, values, strict=True)) / total
        for i, value in enumerate(values):
            normed = (value - mean) / math.sqrt(variance + eps)
            normed = normed * (1 if gain is None else gain[i]) + (0 if bias is None else bias[i])
            result[(*row, i)] = mask[i] * normed
    return result


def mask(old: int, new: int, strength: float) -> np.ndarray:
    return np.array([1.0 if unit < old else strength for unit in range(new)])


def erf_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, head_dim: int, causal: bool) -> np.ndarray:
    """Scaled dot-product attention, (batch, length, heads * head_dim) each, head by head."""
    result = np.zeros_like(v)
    length = q.shape[1]
    for batch in range(q.shape[0]):
        for start in range(0, q.shape[2], head_dim):
            part = slice(start, start + head_dim)
            scores = q[batch, :, part] @ k[batch, :, part].T / math.sqrt(head_dim)
            if causal:
                scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -np.inf)
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            result[batch, :, part] = scores / scores.sum(axis=1, keepdims=True) @ v[batch, :, part]
    return result


def bert_logits(w: Weights, ids: np.ndarray, types: np.ndarray, sizes: dict[str, Any], c: float) -> np.ndarray:
    """The masked language model's logits at strength `c`.

    Args:
        w: the plain grown model's weights by their names.
        ids, types: token and segment ids (batch, length).
        sizes: old and new (hidden, ffn, layers), head_dim, eps.
        c: strength of the masks.
    """
    (hidden, new_hidden), (ffn, new_ffn), (layers, new_layers) = sizes["hidden"], sizes["ffn"], sizes["layers"]
    residual, units, eps = mask(hidden, new_hidden, c), mask(ffn, new_ffn, c), sizes["eps"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return weighted_norm(x, residual, w[f"{name}.weight"], w[f"{name}.bias"], eps, "layer")

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    e = "bert.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.token_type_embeddings.weight"][types]
    x = norm(f"{e}.LayerNorm", x + w[f"{e}.position_embeddings.weight"][: ids.shape[1]])
    for layer in range(new_layers):
        p = f"bert.encoder.layer.{layer}"
        # The hidden size is heads times head_dim, so that heads are masked as the residual is.
        q, k, v = (linear(f"{p}.attention.self.{name}", x) * residual for name in ("query", "key", "value"))
        attended = attention(q, k, v, sizes["head_dim"], causal=False)
        h = norm(f"{p}.attention.output.LayerNorm", linear(f"{p}.attention.output.dense", attended) + x)
        inner = erf_gelu(linear(f"{p}.intermediate.dense", h)) * units
        out = norm(f"{p}.output.LayerNorm", linear(f"{p}.output.dense", inner) + h)
        x = out if layer < layers else c * out + (1 - c) * x
    p = "cls.predictions"
    x = norm(f"{p}.transform.LayerNorm", erf_gelu(linear(f"{p}.transform.dense", x) * residual))
    return x @ w[f"{e}.word_embeddings.weight"].T + w[f"{p}.bias"]


def gpt2_logits(w: Weights, ids: np.ndarray, sizes: dict[str, Any], c: float) -> np.ndarray:
    """The language model's logits at strength `c`; arguments as of `bert_logits`."""
    (hidden, new_hidden), (ffn, new_ffn), (layers, new_layers) = sizes["hidden"], sizes["ffn"], sizes["layers"]
    residual, units, eps = mask(hidden, new_hidden, c), mask(ffn, new_ffn, c), sizes["eps"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return weighted_norm(x, residual, w[f"{name}.weight"], w[f"{name}.bias"], eps, "layer")

    def conv(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = (w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]) * residual
    for layer in range(new_layers):
        p = f"transformer.h.{layer}"
        qkv = conv(f"{p}.attn.c_attn", norm(f"{p}.ln_1", x))
        q, k, v = (part * residual for part in np.split(qkv, 3, axis=-1))
        h = x + conv(f"{p}.attn.c_proj", attention(q, k, v, sizes["head_dim"], causal=True)) * residual
        inner = tanh_gelu(conv(f"{p}.mlp.c_fc", norm(f"{p}.ln_2", h))) * units
        out = h + conv(f"{p}.mlp.c_proj", inner) * residual
        x = out if layer < layers else c * out + (1 - c) * x
    return norm("transformer.ln_f", x) @ w["transformer.wte.weight"].T
