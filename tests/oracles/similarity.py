"""The residual stream before and after every part of every layer, by forward passes written out in NumPy, float64.

One function per architecture, from the modeling files of transformers, for a single sample and without dropout. Each
gives for every stack a list of layers, for every layer the pairs (before, after), (tokens, width) each: one for each
part's addition to the stream, and the last one for the whole layer.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]
Layers = list[list[tuple[Array, Array]]]


def cosine(before: Array, after: Array) -> float:
    """The mean over tokens."""
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return float(np.mean(np.sum(before * after, axis=-1) / lengths))


def similarities(stacks: list[Layers]) -> list[list[list[float]]]:
    """By stack, layer and part the similarity of one sample; the whole layer last."""
    return [[[cosine(*pair) for pair in layer] for layer in layers] for layers in stacks]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms(x: Array, gain: Array, eps: float) -> Array:
    return gain * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def layer_norm(x: Array, gain: Array | float, offset: Array | float, eps: float) -> Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return gain * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) + offset


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def split(x: Array, heads: int) -> Array:
    """(tokens, heads * dim) -> (heads, tokens, dim)."""
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


_RECORDERS: list[list[Array]] = []


@contextlib.contextmanager
def recorded_maps() -> Iterator[list[Array]]:
    """Within the context, the maps of all attentions, (heads, queries, keys), in the order in which they are run."""
    _RECORDERS.append([])
    try:
        yield _RECORDERS[-1]
    finally:
        _RECORDERS.pop()


def attend(q: Array, k: Array, v: Array, causal: bool, scale: float | None = None, bias: Array | float = 0.0) -> Array:
    """(heads, tokens, dim) each, keys and values of fewer heads repeated -> (tokens, heads * dim)."""
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    scores = q @ k.transpose(0, 2, 1) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[1:], dtype=bool)), scores, -np.inf)
    weights = softmax(scores)
    for maps in _RECORDERS:
        maps.append(weights)
    return (weights @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)


def rotate(x: Array, rotated: int, base: float = 10000.0) -> Array:
    """Entries j and j + rotated / 2 of each head are turned by position * base^(-2 j / rotated), which transformers
    keeps in float32."""
    half = rotated // 2
    angle = np.arange(x.shape[1])[:, None] * (base ** (-np.arange(half) / half)).astype(np.float32).astype(np.float64)
    pairs = (x[..., :half] + 1j * x[..., half:rotated]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag, x[..., rotated:]], axis=-1)


def llama(w: Weights, ids: list[int], heads: int, keys: int, eps: float, after: bool = False) -> list[Layers]:
    """Norms before the parts; with `after` those of OLMo 2, behind them, and on queries and keys."""
    x, layers = w["model.embed_tokens.weight"][ids], []
    for n in range(1 + max(int(name.split(".")[2]) for name in w if name.startswith("model.layers."))):
        p, pairs, entered = f"model.layers.{n}", [], x
        normed = x if after else rms(x, w[f"{p}.input_layernorm.weight"], eps)
        q, k, v = (linear(w, f"{p}.self_attn.{part}_proj", normed) for part in "qkv")
        if after:
            q, k = (rms(y, w[f"{p}.self_attn.{part}_norm.weight"], eps) for y, part in ((q, "q"), (k, "k")))
        q, k, v = split(q, heads), split(k, keys), split(v, keys)
        q, k = rotate(q, q.shape[-1]), rotate(k, k.shape[-1])
        o = linear(w, f"{p}.self_attn.o_proj", attend(q, k, v, causal=True))
        o = rms(o, w[f"{p}.post_attention_layernorm.weight"], eps) if after else o
        pairs.append((x, x + o))
        x = x + o
        normed = x if after else rms(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        inner = silu(linear(w, f"{p}.mlp.gate_proj", normed)) * linear(w, f"{p}.mlp.up_proj", normed)
        o = linear(w, f"{p}.mlp.down_proj", inner)
        o = rms(o, w[f"{p}.post_feedforward_layernorm.weight"], eps) if after else o
        pairs += [(x, x + o), (entered, x + o)]
        x = x + o
        layers.append(pairs)
    return [layers]


def gpt2(w: Weights, ids: list[int], heads: int, eps: float) -> list[Layers]:
    """Norms before the parts, matrices stored (in, out), learned positions."""
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    layers = []

    def conv(name: str, y: Array) -> Array:
        return y @ w[f"{name}.weight"] + w[f"{name}.bias"]

    for n in range(2):
        p, entered = f"transformer.h.{n}", x
        normed = layer_norm(x, w[f"{p}.ln_1.weight"], w[f"{p}.ln_1.bias"], eps)
        q, k, v = (split(y, heads) for y in np.split(conv(f"{p}.attn.c_attn", normed), 3, axis=-1))
        a = conv(f"{p}.attn.c_proj", attend(q, k, v, causal=True))
        middle = x + a
        normed = layer_norm(middle, w[f"{p}.ln_2.weight"], w[f"{p}.ln_2.bias"], eps)
        x = middle + conv(f"{p}.mlp.c_proj", gelu_tanh(conv(f"{p}.mlp.c_fc", normed)))
        layers.append([(entered, middle), (middle, x), (entered, x)])
    return [layers]


def gpt_neox(w: Weights, ids: list[int], heads: int, eps: float, parallel: bool) -> list[Layers]:
    """Half of each head is rotated; with `parallel` both parts read, and are added to, what enters the layer."""
    x, layers = w["gpt_neox.embed_in.weight"][ids], []
    for n in range(2):
        p, entered = f"gpt_neox.layers.{n}", x
        norms = [(w[f"{p}.{name}.weight"], w[f"{p}.{name}.bias"]) for name in ("input_layernorm", _SECOND)]
        fused = linear(w, f"{p}.attention.query_key_value", layer_norm(x, *norms[0], eps))
        q, k, v = np.split(split(fused, heads), 3, axis=-1)
        q, k = (rotate(y, y.shape[-1] // 2) for y in (q, k))
        a = linear(w, f"{p}.attention.dense", attend(q, k, v, causal=True))
        read = x if parallel else x + a
        m = linear(w, f"{p}.mlp.dense_h_to_4h", layer_norm(read, *norms[1], eps))
        m = linear(w, f"{p}.mlp.dense_4h_to_h", gelu(m))
        x = x + a + m
        layers.append([(entered, entered + a), (read, read + m), (entered, x)])
    return [layers]


_SECOND = "post_attention_layernorm"


def bert(w: Weights, ids: list[int], types: list[int], heads: int, eps: float) -> list[Layers]:
    """Norms behind the sums: a part is compared before the norm of its sum, the layer behind its last norm."""
    e = "bert.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.token_type_embeddings.weight"][types]
    x = x + w[f"{e}.position_embeddings.weight"][: len(ids)]
    x, layers = layer_norm(x, w[f"{e}.LayerNorm.weight"], w[f"{e}.LayerNorm.bias"], eps), []
    for n in range(2):
        p, entered, pairs = f"bert.encoder.layer.{n}", x, []
        q, k, v = (split(linear(w, f"{p}.attention.self.{part}", x), heads) for part in ("query", "key", "value"))
        for output, o in (
            ("attention.output", lambda x, q=q, k=k, v=v: attend(q, k, v, causal=False)),
            ("output", lambda x, p=p: gelu(linear(w, f"{p}.intermediate.dense", x))),
        ):
            added = x + linear(w, f"{p}.{output}.dense", o(x))
            pairs.append((x, added))
            x = layer_norm(added, w[f"{p}.{output}.LayerNorm.weight"], w[f"{p}.{output}.LayerNorm.bias"], eps)
        layers.append([*pairs, (entered, x)])
    return [layers]


def t5(w: Weights, ids: list[int], decoder_ids: list[int], heads: int, eps: float, farthest: int) -> list[Layers]:
    """Encoder and decoder; scores are not scaled, and are biased by the distance, of the first layer's table."""
    encoded, encoder = _t5_stack(w, "encoder", w["shared.weight"][ids], None, heads, eps, farthest)
    encoded = rms(encoded, w["encoder.final_layer_norm.weight"], eps)
    _, decoder = _t5_stack(w, "decoder", w["shared.weight"][decoder_ids], encoded, heads, eps, farthest)
    return [encoder, decoder]


def _t5_stack(
    w: Weights, stack: str, x: Array, encoded: Array | None, heads: int, eps: float, farthest: int
) -> tuple[Array, Layers]:
    causal = encoded is not None
    table = w[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = np.array(
        [[table[_bucket(j - i, causal, len(table), farthest)] for j in range(len(x))] for i in range(len(x))]
    ).transpose(2, 0, 1)
    layers = []
    for n in range(2):
        p, entered, pairs = f"{stack}.block.{n}.layer", x, []
        for number, name in enumerate(["SelfAttention", *(["EncDecAttention"] if causal else []), "DenseReluDense"]):
            normed = rms(x, w[f"{p}.{number}.layer_norm.weight"], eps)
            m = f"{p}.{number}.{name}"
            if name == "DenseReluDense":
                o = linear(w, f"{m}.wo", np.maximum(linear(w, f"{m}.wi", normed), 0))
            else:
                own = name == "SelfAttention"
                read = normed if own or encoded is None else encoded
                q, k, v = (split(linear(w, f"{m}.{part}", normed if part == "q" else read), heads) for part in "qkv")
                o = linear(w, f"{m}.o", attend(q, k, v, causal and own, scale=1.0, bias=bias if own else 0.0))
            pairs.append((x, x + o))
            x = x + o
        layers.append([*pairs, (entered, x)])
    return x, layers


def _bucket(offset: int, causal: bool, buckets: int, farthest: int) -> int:
    """Of a key's position less the query's: exact for half of the buckets, then logarithmic up to `farthest`."""
    first = 0
    if not causal:
        buckets //= 2
        first = buckets if offset > 0 else 0
    distance = max(-offset, 0) if causal else abs(offset)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(farthest / exact)
    return first + min(exact + int(share * (buckets - exact)), buckets - 1)


def vit(w: Weights, image: Array, patch: int, heads: int, eps: float) -> list[Layers]:
    """Norms before the parts; the tokens are a class token and the patches, row by row."""
    e = "vit.embeddings"
    kernel, rows = w[f"{e}.patch_embeddings.projection.weight"], image.shape[1] // patch
    cut = image.reshape(len(image), rows, patch, rows, patch).transpose(1, 3, 0, 2, 4).reshape(rows * rows, -1)
    x = cut @ kernel.reshape(len(kernel), -1).T + w[f"{e}.patch_embeddings.projection.bias"]
    x, layers = np.concatenate([w[f"{e}.cls_token"][0], x]) + w[f"{e}.position_embeddings"][0], []
    for n in range(2):
        p, entered = f"vit.layers.{n}", x
        normed = layer_norm(x, w[f"{p}.layernorm_before.weight"], w[f"{p}.layernorm_before.bias"], eps)
        q, k, v = (split(linear(w, f"{p}.attention.{part}_proj", normed), heads) for part in "qkv")
        middle = x + linear(w, f"{p}.attention.o_proj", attend(q, k, v, causal=False))
        normed = layer_norm(middle, w[f"{p}.layernorm_after.weight"], w[f"{p}.layernorm_after.bias"], eps)
        x = middle + linear(w, f"{p}.mlp.fc2", gelu(linear(w, f"{p}.mlp.fc1", normed)))
        layers.append([(entered, middle), (middle, x), (entered, x)])
    return [layers]


def tokenformer(
    embedding: Array, layers: list[dict[str, tuple[Array, Array]]], ids: list[int], heads: int, rotated: int, eps: float
) -> list[Layers]:
    """Norms without parameters before the parts; by layer and projection the parameter tokens' keys and values. Scores
    have a norm but in the attention's output projection."""
    x, found = embedding[ids], []

    def pattention(tokens: tuple[Array, Array], y: Array, normed: bool = True) -> Array:
        scores = y @ tokens[0].T
        if normed:
            scores = math.sqrt(len(tokens[0])) * scores / np.linalg.norm(scores, axis=-1, keepdims=True)
        return gelu(scores) @ tokens[1]

    for w in layers:
        entered, normed = x, layer_norm(x, 1.0, 0.0, eps)
        q, k, v = (split(pattention(w[f"attention.{part}"], normed), heads) for part in ("query", "key", "value"))
        q, k = rotate(q, rotated), rotate(k, rotated)
        middle = x + pattention(w["attention.proj"], attend(q, k, v, causal=True), normed=False)
        x = middle + pattention(w["mlp"], layer_norm(middle, 1.0, 0.0, eps))
        found.append([(entered, middle), (middle, x), (entered, x)])
    return [found]
