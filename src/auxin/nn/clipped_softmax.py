"""Clipped softmax (Bondarenko et al. 2023, arXiv 2306.12929, equation 4): attention weights that can be just 0 and 1,

    P' = clip((zeta - gamma) P + gamma, 0, 1),      P = softmax(Q K^T / sqrt(d) + mask),    gamma <= 0, zeta >= 1.

A probability below -gamma / (zeta - gamma) becomes 0, one above (1 - gamma) / (zeta - gamma) becomes 1, and neither has
a gradient any more, so that scores have no reason to grow further. Rows are not renormalised: with zeta = 1, a row
whose m weights that are left hold S of the probability sums up to (1 - gamma) S + gamma m, and a row whose weights are
all clipped reads nothing, which is what the clipping is for.

Dropout of weights, where a model is trained with some, comes behind the clipping. Where nothing is clipped (gamma = 0,
zeta = 1) the model's own implementation computes what it always does; compiled code treats all limits alike.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from auxin.errors import PlanError
from auxin.nn.attention_functions import handed, handing_to, reading, refuse_others
from auxin.nn.bricks import Brick, NothingMade, brick, wide_type
from auxin.nn.extension import extended

CLIPPED = "auxin_clipped_softmax"
"""What the function is called in transformers' table of attention functions."""
STRENGTH = "strength"


@brick("clipped_softmax")
class ClippedSoftmax(Brick):
    """An attention module of transformers whose weights are clipped. It takes and gives the same; the map that it gives
    is P'.

    The buffer `strength` a (), saved with the model, stands between softmax (0) and the clipping that the settings say
    (1): gamma and zeta - 1 are multiplied by it. It is in float32 at least.
    """

    making = NothingMade()
    wide = (STRENGTH,)
    gamma: float
    zeta: float
    begin: float
    strength: Tensor

    @classmethod
    def replacing(cls, module: nn.Module, gamma: float, zeta: float = 1.0, begin: float = 1.0) -> Self:
        """`module`, an attention of one of transformers' models, so extended.

        Args:
            module: also on the meta device.
            gamma: 0 or less.
            zeta: 1 or more.
            begin: the strength to begin with, from 0 to 1.

        Raises:
            PlanError: a number is out of range, or the module computes its attention by itself, where no other can be
                put in.
        """
        if not gamma <= 0 or not zeta >= 1 or not 0 <= begin <= 1:
            raise PlanError(
                f"clipped_softmax: gamma = {gamma}, zeta = {zeta}, begin = {begin}. Give a gamma of 0 or less, a zeta "
                "of 1 or more, and a strength from 0 to 1 to begin with."
            )
        refuse_others(module, "clipped_softmax", "its weights can't be had")
        new = extended(module, cls, gamma=gamma, zeta=zeta, begin=begin)
        if STRENGTH not in new._buffers:
            like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
            new.register_buffer(STRENGTH, torch.full((), begin, device=like.device, dtype=wide_type(like.dtype)))
        return new

    def set_strength(self, strength: float) -> None:
        """Let the clipping have `strength`, 0 (softmax) to 1."""
        self.strength.fill_(strength)

    def reset_buffers(self) -> None:
        """As at the start. A new tensor: one that was loaded may be kept."""
        self.strength = torch.full_like(self.strength, self.begin)

    def limits(self) -> tuple[float | Tensor, float | Tensor]:
        """Gamma and zeta at the present strength: numbers, on shapes alone those of the settings; while torch compiles
        tensors (), of which a graph needs no values."""
        if torch.compiler.is_compiling():
            return self.strength * self.gamma, 1 + self.strength * (self.zeta - 1)
        known = not (self.strength.is_meta or isinstance(self.strength, FakeTensor))
        strength = float(self.strength) if known else 1.0
        return strength * self.gamma, 1 + strength * (self.zeta - 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention.

        Raises:
            PlanError: the model's implementation of attention is one that makes masks of its own kind.
        """
        with handing_to(self, CLIPPED, self.limits(), "clipped_softmax computes attention probabilities"):
            return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """Gamma and zeta at full strength, and how large that is."""
        return f"gamma={self.gamma:.6g}, zeta={self.zeta:.6g}, begin={self.begin:.6g}"


def clipped(probabilities: Tensor, gamma: float | Tensor, zeta: float | Tensor = 1.0) -> Tensor:
    """P' of P, of any shape; the sum is made in float32 at least."""
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    return ((zeta - gamma) * wide + gamma).clamp(0, 1).to(probabilities.dtype)


def clipped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in the place of an attention function; see `reading`.

    Returns:
        What the heads give, (samples, queries, heads, head width), and P', (samples, heads, queries, keys).
    """
    (gamma, zeta), attend = handed(module)
    if isinstance(gamma, float) and gamma == 0 and zeta == 1:
        return attend(module, query, key, value, attention_mask, **named)
    dropout = named.pop("dropout", None) or 0.0

    def change(probabilities: Tensor) -> Tensor:
        return F.dropout(clipped(probabilities, gamma, zeta), p=dropout, training=module.training)

    return reading(module, query, key, value, attention_mask, change, dropout=0.0, **named)


ALL_ATTENTION_FUNCTIONS.register(CLIPPED, clipped_attention)
