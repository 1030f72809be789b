"""The official TokenFormer's forward pass, derived again from the paper and the released PyTorch code's conventions.

It works on the official state dict (`sequential.2.attention.query.key_param_tokens`, ...) in the official layout
[sequence, batch, heads, head dimension], in the dtype it is asked for, and shares nothing with the package under test.
The rotation is written with complex numbers, norms and softmax are written out.

Why not an existing port: kroggen/tokenformer-minimal, the best-known one, must not be used as an oracle. It hands query
and key as [batch, sequence, heads, dim] to a GPT-NeoX helper that expects [sequence, batch, heads, dim], so that the
rotary angle of an entry depends on its index in the batch and not on its position. With a batch of one it rotates
nothing at all. It is right about the key names and Pattention only.
"""

import math

import torch

LAYER_NORM_EPS = 1e-5
ROTARY_FRACTION = 0.25
ROTARY_BASE = 10000.0


def random_state(*, layers, width, tokens, ffn_tokens, vocabulary, seed, out_std=1.0, dtype=torch.float32):
    """Random weights in the official format.

    `out_std` sets the standard deviation of each Pattention's output. The official initialisation (0.1 to 0.2) leaves
    attention almost uniform, so that errors in query and key would hardly show; 1 is what trained weights look like.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.empty(shape, dtype=dtype).normal_(0, std, generator=generator)

    state = {"sequential.0.word_embeddings.weight": normal(vocabulary, width, std=1.0)}
    for stage in range(2, layers + 2):
        for part in ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp"):
            count = ffn_tokens if part == "mlp" else tokens
            state[f"sequential.{stage}.{part}.key_param_tokens"] = normal(count, width, std=0.02)
            # For z ~ N(0, 1), E[gelu(z)^2] = 0.426.
            value_std = out_std / math.sqrt(0.426 * count)
            state[f"sequential.{stage}.{part}.value_param_tokens"] = normal(count, width, std=value_std)
    state[f"sequential.{layers + 3}.norm.weight"] = 1 + normal(width, std=0.2)
    state[f"sequential.{layers + 3}.norm.bias"] = normal(width, std=0.2)
    return state


def normalise(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + LAYER_NORM_EPS).sqrt()


def pattention(x, keys, values):
    """GELU(tau A / ||A||) V with A = x K^T and tau = sqrt(number of tokens): first the norm, then the GELU (eq. 16)."""
    scores = x @ keys.T
    z = scores * math.sqrt(keys.shape[0]) / torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    return (0.5 * z * (1 + torch.erf(z / math.sqrt(2)))) @ values


def rotate(x):
    """Turn the first quarter of each head, [sequence, batch, heads, dim], by its position.

    GPT-NeoX pairs dimension j with j + r/2 of the r rotated ones and turns the pair by position * base^(-2j/r).
    """
    rotated = int(ROTARY_FRACTION * x.shape[-1])
    half = rotated // 2
    frequency = ROTARY_BASE ** (-2 * torch.arange(half, dtype=torch.float64) / rotated)
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None, None, None] * frequency
    pairs = torch.complex(x[..., :half].double(), x[..., half:rotated].double())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real.to(x.dtype), turned.imag.to(x.dtype), x[..., rotated:]], dim=-1)


def attend(query, key, value, rotary=True):
    """Causal attention over [sequence, batch, heads, dim]."""
    if rotary:
        query, key = rotate(query), rotate(key)
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) / math.sqrt(query.shape[-1])
    length = scores.shape[-1]
    for position in range(length):
        scores[:, :, position, position + 1 :] = -math.inf
    exponentials = (scores - scores.max(-1, keepdim=True).values).exp()
    weights = exponentials / exponentials.sum(-1, keepdim=True)
    return torch.einsum("bhij,jbhd->ibhd", weights, value)


def logits(state, input_ids, heads, dtype=torch.float64):
    """Logits [batch, sequence, vocabulary] of token ids [batch, sequence]."""
    layers = sum(name.endswith("mlp.key_param_tokens") for name in state)
    embedding = state["sequential.0.word_embeddings.weight"].to(dtype)
    hidden = embedding[input_ids.T]  # [sequence, batch, width]
    length, batch, width = hidden.shape
    for stage in range(2, layers + 2):

        def patt(part, x, stage=stage):
            prefix = f"sequential.{stage}.{part}"
            return pattention(
                x, state[f"{prefix}.key_param_tokens"].to(dtype), state[f"{prefix}.value_param_tokens"].to(dtype)
            )

        normed = normalise(hidden)
        query, key, value = (
            patt(f"attention.{part}", normed).reshape(length, batch, heads, width // heads)
            for part in ("query", "key", "value")
        )
        context = attend(query, key, value).reshape(length, batch, width)
        hidden = hidden + patt("attention.proj", context)
        hidden = hidden + patt("mlp", normalise(hidden))
    final = f"sequential.{layers + 3}.norm"
    hidden = normalise(hidden) * state[f"{final}.weight"].to(dtype) + state[f"{final}.bias"].to(dtype)
    return (hidden @ embedding.T).transpose(0, 1)
