"""What is left of a Llama without some of its sublayers, and which of them a greedy search takes, in NumPy, float64."""

import numpy as np
from numpy.typing import NDArray

from oracles.similarity import attend, linear, rms, rotate, silu, softmax, split

Array = NDArray[np.float64]
Weights = dict[str, Array]
Gate = tuple[int, str]
"""A layer's number, and "self_attn" or "mlp"."""


def llama(w: Weights, ids: list[int], heads: int, keys: int, eps: float, layers: int, closed: set[Gate]) -> Array:
    """Logits (tokens, vocabulary) with the gates `closed` at zero, the others at one."""
    x = w["model.embed_tokens.weight"][ids]
    for n in range(layers):
        p = f"model.layers.{n}"
        normed = rms(x, w[f"{p}.input_layernorm.weight"], eps)
        q, k, v = (linear(w, f"{p}.self_attn.{part}_proj", normed) for part in "qkv")
        q, k, v = split(q, heads), split(k, keys), split(v, keys)
        q, k = rotate(q, q.shape[-1]), rotate(k, k.shape[-1])
        attention = linear(w, f"{p}.self_attn.o_proj", attend(q, k, v, causal=True))
        x = x + attention * ((n, "self_attn") not in closed)
        normed = rms(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        inner = silu(linear(w, f"{p}.mlp.gate_proj", normed)) * linear(w, f"{p}.mlp.up_proj", normed)
        x = x + linear(w, f"{p}.mlp.down_proj", inner) * ((n, "mlp") not in closed)
    return rms(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def distances(reference: Array, changed: Array, ids: list[int]) -> dict[str, float]:
    """Of the logits of one text, by name."""
    p, q = softmax(reference), softmax(changed)
    m = (p + q) / 2
    lengths = np.linalg.norm(reference, axis=-1) * np.linalg.norm(changed, axis=-1)
    cosines = (reference * changed).sum(-1) / lengths
    right = np.arange(len(ids) - 1), ids[1:]
    return {
        "js": float(np.mean((p * np.log(p / m)).sum(-1) / 2 + (q * np.log(q / m)).sum(-1) / 2)),
        "kl": float(np.mean((p * np.log(p / q)).sum(-1))),
        "angular": float(np.mean(np.arccos(np.clip(cosines, 0, 1)))),
        "norm": float(np.sqrt(((reference - changed) ** 2).sum())),
        "perplexity": float(np.mean(np.log(p[:-1][right]) - np.log(q[:-1][right]))),
    }


def greedy(
    w: Weights, texts: list[list[int]], heads: int, keys: int, eps: float, layers: int, steps: int, name: str = "js"
) -> list[tuple[Gate, float]]:
    """The gates that are closed one after the other, and how far the output is from the whole model's then."""

    def outputs(closed: set[Gate]) -> list[Array]:
        return [llama(w, ids, heads, keys, eps, layers, closed) for ids in texts]

    def far(closed: set[Gate]) -> float:
        pairs = zip(whole, outputs(closed), texts, strict=True)
        return float(np.mean([distances(one, other, ids)[name] for one, other, ids in pairs]))

    whole, found = outputs(set()), list[tuple[Gate, float]]()
    for _ in range(steps):
        closed = {gate for gate, _ in found}
        open_gates = [(n, part) for n in range(layers) for part in ("self_attn", "mlp") if (n, part) not in closed]
        found.append(min(((gate, far(closed | {gate})) for gate in open_gates), key=lambda pair: pair[1]))
    return found
