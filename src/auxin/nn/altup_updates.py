"""Alternating updates (AltUp): a residual stream of K blocks through layers that see one of them each.

Streams are tensors X of shape (K, ..., d). A layer L, norms and residual sums included, with active block a, does

    predict   xh_i = sum_j p_ij x_j                for every block i
    compute   y    = L(x_a)                        the block as it was, not xh_a
    correct   x'_i = xh_i + g_i (y - xh_a)

with p = I + C and g = 1 + c; C (K, K) and c (K,) are what is stored, so that weight decay pulls to the identity, where
every block simply gets what the layer adds. The sum is computed as M X + g y with M = p - g p_a: row i of M is
e_i - e_a at the identity, and blocks that are equal cancel to exactly zero, so that x' is y to the last bit. In the
order in which the equations are written, the rounding of y - x_a and of the sum would stay.

Gemma 3n's form feeds xh_a to the layer and computes C and c from the active block (before and after the layer).

Source: arXiv 2301.13310, algorithm 1. The form whose coefficients depend on the data: Gemma 3n as transformers
publishes it (`Gemma3nTextAltUp`).
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from auxin.nn.autocast import without_autocast


class PredictCorrect(nn.Module):
    """What all ways of mixing blocks share."""

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """What `correct` needs, and what the layer sees, (..., d)."""
        raise NotImplementedError

    def correct(self, state: Tensor, output: Tensor) -> Tensor:
        """The new streams (K, ..., d), from what `predict` gave and the layer's output (..., d)."""
        raise NotImplementedError

    def forward(self, streams: Tensor, output: Tensor | None = None) -> Any:
        """`predict`, or with the layer's output `correct`. Call the module: whoever brings a module's tensors when it
        is called (offloading to a disk, say) has to see it."""
        return self.predict(streams) if output is None else self.correct(streams, output)


class AltUp(PredictCorrect):
    """Predict and correct with coefficients that all tokens share: K K + K parameters.

    Args:
        blocks: K.
        active: the block a that the layer sees.
        device, dtype: of the parameters.

    Parameters: `prediction` C (K, K) and `correction` c (K,), deviations from the identity; zero at first.
    """

    mixing: ClassVar[tuple[str, ...]] = ("prediction",)
    """The parameters which, at zero, mix no blocks in the prediction."""

    def __init__(
        self,
        blocks: int,
        active: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks, self.active = blocks, active
        self.prediction = nn.Parameter(torch.zeros(blocks, blocks, device=device, dtype=dtype))
        self.correction = nn.Parameter(torch.zeros(blocks, device=device, dtype=dtype))

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """What `correct` needs, here the streams as they are, and what the layer sees, (..., d)."""
        return streams, streams[self.active]

    def correct(self, streams: Tensor, output: Tensor) -> Tensor:
        """The new streams (K, ..., d), from the old ones and the layer's output (..., d)."""
        mixing, gains = self.coefficients(torch.promote_types(streams.dtype, torch.float32))
        mix = mixed_by_sums if _products_are_short(streams) else mixed_by_product
        return mix(mixing, gains, streams.to(mixing.dtype), output.to(mixing.dtype)).to(streams.dtype)

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """M (K, K) and g (K,). In the type of the streams at least float32: what lies near 1 would be rounded away."""
        deviations, gains = self.prediction.to(dtype), 1 + self.correction.to(dtype)
        identity = torch.eye(self.blocks, device=deviations.device, dtype=dtype)
        return identity + deviations - torch.outer(gains, identity[self.active] + deviations[self.active]), gains

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, active={self.active}"


class DynamicAltUp(PredictCorrect):
    """Predict and correct with coefficients computed from each token, as in Gemma 3n: K^3 + K^2 + d (K + 1) parameters.

    m(x) = tanh(W_r RMSNorm(x) / d), K numbers; C = W_p m(x_a) as a K x K matrix; the layer sees xh_a = (x + C x)_a;
    c = W_c m(y). With W_p and W_c at zero, as at first here, the coefficients are the identity. What Gemma 3n does
    beside that, per-layer inputs and a scale on them, is no part of it.

    Args:
        blocks: K.
        active: the block a that the layer sees.
        hidden_size: d.
        eps: of the router's norm.
        clip: bound of the entries of W_p and W_c wherever they are used; None: none. (Gemma 3n clips at 120, in
            training alone.)
        device, dtype: of the parameters.
    """

    mixing: ClassVar[tuple[str, ...]] = ("prediction.weight",)

    def __init__(
        self,
        blocks: int,
        active: int,
        hidden_size: int,
        eps: float = 1e-6,
        clip: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.blocks, self.active, self.eps, self.clip = blocks, active, eps, clip
        self.router_norm = nn.RMSNorm(hidden_size, eps=eps, device=device, dtype=dtype)
        self.router = nn.Linear(hidden_size, blocks, bias=False, device=device, dtype=dtype)
        self.prediction = _Clipped(blocks, blocks**2, clip, device, dtype)
        self.correction = _Clipped(blocks, blocks, clip, device, dtype)
        nn.init.zeros_(self.prediction.weight)
        nn.init.zeros_(self.correction.weight)

    def predict(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted streams (K, ..., d), and what the layer sees, (..., d)."""
        deviations = self._projected(self.prediction, streams[self.active]).unflatten(-1, (self.blocks, self.blocks))
        # Block by block in memory, as the layer without streams would see it: a product's last bit depends on that.
        predicted = (streams + torch.einsum("...ij,j...d->i...d", deviations, streams)).contiguous()
        return predicted, predicted[self.active]

    def correct(self, predicted: Tensor, output: Tensor) -> Tensor:
        """The new streams (K, ..., d), from the predicted ones and the layer's output (..., d)."""
        gains = self._projected(self.correction, output).movedim(-1, 0).unsqueeze(-1)
        gains = 1 + gains.to(torch.promote_types(predicted.dtype, torch.float32))
        return ((predicted - gains * predicted[self.active]) + gains * output).to(predicted.dtype)

    def _projected(self, projection: nn.Module, x: Tensor) -> Tensor:
        modalities = self.router(self.router_norm(x) / x.shape[-1])
        modalities = torch.tanh(modalities.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        return cast(Tensor, projection(modalities))

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, active={self.active}, eps={self.eps:g}, clip={self.clip}"


class _Clipped(nn.Linear):
    """An `nn.Linear` without bias whose weight's entries are bounded by `clip` where it is used; None: by nothing."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        clip: float | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight if self.clip is None else self.weight.clamp(-self.clip, self.clip))


# The update of AltUp is computed in one of two ways, which benchmarks/altup_arithmetic.py compares, eager on a CPU: in
# float32 both are within 1.1e-7 of float64; training takes the sums 3.0 to 8.4 times as long as the product, one token
# 1.2 to 2.9 times. So eager it is the product. But where float32 products are short (TF32, bfloat16) it would round the
# stream, by 5e-3 with bfloat16's digits; and compilers make one kernel of the sums, but not of the product.


def mixed_by_product(mixing: Tensor, gains: Tensor, streams: Tensor, output: Tensor) -> Tensor:
    """M X + g y, streams (K, ..., d), as a product of matrices, also under autocast in the type of all four."""
    with without_autocast():
        mixed = mixing @ streams.reshape(len(gains), -1)
        return torch.addr(mixed, gains, output.reshape(-1)).view(streams.shape)


def mixed_by_sums(mixing: Tensor, gains: Tensor, streams: Tensor, output: Tensor) -> Tensor:
    """The same block by block. The blocks are added up first, for theirs is the sum that cancels."""
    rows = []
    for i in range(len(gains)):
        row = mixing[i, 0] * streams[0]
        for j in range(1, len(gains)):
            row = torch.addcmul(row, mixing[i, j], streams[j])
        rows.append(torch.addcmul(row, gains[i], output))
    return torch.stack(rows)


def _products_are_short(x: Tensor) -> bool:
    """Whether products of float32 matrices lose digits, or the code is being compiled."""
    if torch.compiler.is_compiling():
        return True
    backend = torch.backends.cuda if x.device.type == "cuda" else torch.backends.mkldnn
    settings = (backend.matmul.fp32_precision, torch.backends.fp32_precision)  # type: ignore[attr-defined]
    return not all(setting in ("ieee", "none") for setting in settings)
