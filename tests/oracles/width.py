"""Wider models derived from the equations: dense encoders R and decoders C in numpy, float64, one family at a time.

With y = W x + b, activations R a and readers C with C R = 1:

    E' = E R^T    W' = R_out W C_in    b' = R b    untied head W' = W C    tied head: last gain and offset times C^T 1/R
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]


def encoder(index: list[int], old: int) -> Array:
    """R: row j is the unit vector of index[j]; -1 is a row of zeros."""
    rows = np.zeros((len(index), old))
    for new, source in enumerate(index):
        if source >= 0:
            rows[new, source] = 1
    return rows


def decoder(index: list[int], old: int) -> Array:
    """C: averages the copies of every unit; columns of units that copy none are zero."""
    rows = encoder(index, old)
    return (rows / np.maximum(rows.sum(axis=0), 1)).T


def mean_encoder(copies: int, padding: int, old: int) -> Array:
    """R of LEMON: whole copies, and then the mean of all units, over and over."""
    return np.concatenate([np.tile(np.eye(old), (copies, 1)), np.full((padding, old), 1 / old)])


def blocks(matrix: Array, unit: int) -> Array:
    """The same map of units of `unit` consecutive entries."""
    return np.kron(matrix, np.eye(unit))


class Maps:
    """R and C of every stream: r(esidual), q(uery), k(ey-value), f(eed-forward), heads entry by entry."""

    def __init__(self, residual: list[int], query: list[int], key: list[int], ffn: list[int], sizes: dict[str, int]):
        d, heads, keys, dim, f = (sizes[name] for name in ("d", "heads", "keys", "dim", "ffn"))
        self.Rr, self.Cr = encoder(residual, d), decoder(residual, d)
        self.Rq, self.Cq = blocks(encoder(query, heads), dim), blocks(decoder(query, heads), dim)
        self.Rk = blocks(encoder(key, keys), dim)
        self.R3 = blocks(encoder(query, heads), 3 * dim)
        self.Rf, self.Cf = encoder(ffn, f), decoder(ffn, f)


def llama(old: Weights, maps: Maps, tied: bool, gain: float = 1.0) -> Weights:
    """Llama's names: separate projections (out, in), a gate, RMS gains; `gain` is eta."""
    m, new = maps, {}
    for name, w in old.items():
        stem, last = name.rsplit(".", 2)[-2:]
        bias = last == "bias"
        outputs = {"q_proj": m.Rq, "k_proj": m.Rk, "v_proj": m.Rk, "gate_proj": m.Rf, "up_proj": m.Rf}
        if stem in outputs:
            new[name] = outputs[stem] @ w if bias else outputs[stem] @ w @ m.Cr
        elif stem == "o_proj":
            new[name] = m.Rr @ w if bias else m.Rr @ w @ m.Cq
        elif stem == "down_proj":
            new[name] = m.Rr @ w if bias else m.Rr @ w @ m.Cf
        elif stem == "embed_tokens":
            new[name] = w @ m.Rr.T
        elif stem == "lm_head":
            new[name] = w @ m.Cr
        elif stem == "norm" and tied:
            new[name] = gain * (m.Cr.T @ w)
        else:
            new[name] = gain * (m.Rr @ w)
    return new


def gpt2(old: Weights, maps: Maps, tied: bool, gain: float = 1.0, offsets: Array | None = None) -> Weights:
    """GPT-2's names: Conv1D (in, out), query, key and value side by side. `offsets` is R for the norms' biases."""
    m, new = maps, {}
    encoder_of_offsets = m.Rr if offsets is None else offsets
    zero = np.zeros((m.Rq.shape[0], m.Rq.shape[1]))
    fused = np.block([[m.Rq, zero, zero], [zero, m.Rk, zero], [zero, zero, m.Rk]])
    for name, w in old.items():
        stem, last = name.rsplit(".", 2)[-2:]
        bias = last == "bias"
        if stem == "c_attn":
            new[name] = fused @ w if bias else m.Cr.T @ w @ fused.T
        elif stem == "c_fc":
            new[name] = m.Rf @ w if bias else m.Cr.T @ w @ m.Rf.T
        elif stem == "c_proj":
            reader = m.Cq if ".attn." in name else m.Cf
            new[name] = m.Rr @ w if bias else reader.T @ w @ m.Rr.T
        elif stem in ("wte", "wpe"):
            new[name] = w @ m.Rr.T
        elif stem == "lm_head":
            new[name] = w @ m.Cr
        elif stem == "ln_f" and tied:
            new[name] = (1.0 if bias else gain) * (m.Cr.T @ w)
        else:
            new[name] = encoder_of_offsets @ w if bias else gain * (m.Rr @ w)
    return new


def gpt_neox(old: Weights, maps: Maps) -> Weights:
    """GPT-NeoX's names, untied: query, key and value of one head next to each other."""
    m, new = maps, {}
    for name, w in old.items():
        stem, last = name.rsplit(".", 2)[-2:]
        bias = last == "bias"
        if stem == "query_key_value":
            new[name] = m.R3 @ w if bias else m.R3 @ w @ m.Cr
        elif stem == "dense":
            new[name] = m.Rr @ w if bias else m.Rr @ w @ m.Cq
        elif stem == "dense_h_to_4h":
            new[name] = m.Rf @ w if bias else m.Rf @ w @ m.Cr
        elif stem == "dense_4h_to_h":
            new[name] = m.Rr @ w if bias else m.Rr @ w @ m.Cf
        elif stem == "embed_in":
            new[name] = w @ m.Rr.T
        elif stem == "lm_head":
            new[name] = w @ m.Cr
        else:
            new[name] = m.Rr @ w
    return new


def adjoint(gradient: Array, R_out: Array, C_in: Array) -> Array:
    """G' = C_out^T G R_in^T with C = R^T / counts: the gradient of W' = R_out W C_in where all readers use one C."""
    C_out = (R_out / np.maximum(R_out.sum(axis=0), 1)).T
    R_in = (C_in > 0).T.astype(float)
    return C_out.T @ gradient @ R_in.T


def rotary_scores(query: Array, key: Array, base: float = 10000.0) -> Array:
    """Attention scores (length, length) of one head, rotated in halves, divided by the root of its dimension."""
    length, dim = query.shape
    angles = np.outer(np.arange(length), base ** (-np.arange(0, dim, 2) / dim))
    cos, sin = np.cos(angles), np.sin(angles)

    def turn(x: Array) -> Array:
        first, second = x[:, : dim // 2], x[:, dim // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)

    return turn(query) @ turn(key).T / np.sqrt(dim)
