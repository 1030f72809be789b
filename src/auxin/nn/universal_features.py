"""Universal random features ("Scalable Neural Network Kernels", Sehanobish et al., ICLR 2024, arXiv 2310.13225):
f(w x + b) ~ Phi(x) Psi(w, b), unbiased for an f that is a mixture of waves, f(z) = E F e^{i omega z} over frequencies
omega: cosine, sine and e^{-z^2/2}. (ReLU, GELU and tanh are none.) With normal directions g and complex a b = i omega,
E e^{g (a x + b w)} = e^{(a x + b w)^2 / 2}, so that

    Phi_j(x) = m^-1/2 e^{a_j g_j x - a_j^2 |x|^2 / 2}
    Psi_j(w, b) = m^-1/2 F_j e^{i omega_j b + b_j g_j w - b_j^2 |w|^2 / 2}

and no conjugate is taken in the product. The variance is exponential in |x|^2 and |w|^2, whatever a is: rescaled states
of width 768 have |x|^2 = 28. No method uses them at such widths.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auxin.errors import ConfigError
from auxin.nn.autocast import without_autocast
from auxin.nn.random_features import drawn_directions

Function = Literal["cos", "sin", "gaussian"]
"""f(z): the cosine, the sine, e^{-z^2/2}."""
Split = Literal["inputs_plain", "even", "conjugate"]
"""How i omega is divided into a (inputs) and b (weights), before `balance`: a = 1; a = b = sqrt(i omega); or a the
conjugate of that root."""
Rescaling = Literal["norm", "width"]
"""x d^(1/4) / |x|, or x d^(-1/4)."""


def rescaled(x: Tensor, by: Rescaling) -> Tensor:
    """Hidden states or rows of weights (..., d), short enough for universal features: with both sides rescaled by their
    norm |x| |w| = sqrt(d); by width, layer-normed states have the same norm d^(1/4).

    Args:
        x: any numbers; a zero stays zero.
        by: see `Rescaling`.
    """
    width = x.shape[-1]
    if by == "width":
        return x * width**-0.25
    return F.normalize(x, dim=-1) * width**0.25


class UniversalFeatures(nn.Module):
    """Random features of one function f: `inputs` and `weights` give both sides, `kernel` the estimate of f.

    Directions and frequencies are buffers that checkpoints hold. All is computed in float32 at least, outside of
    autocast, and the real part is taken last.

    The variance of one feature, with u = Re(a) x + Re(b) w and F the size of its factor, is at most

        F^2 ((1 + 4 M)^2 / (1 + 8 M))^(d/2) e^{2 (1 + 4 M) / (1 + 8 M) |u|^2 - Re(a^2) |x|^2 - Re(b^2) |w|^2}.

    For cosine and sine without damping that is e^{|x|^2 + |w|^2} with `inputs_plain`, e^{|x + w|^2} with `even` and
    e^{|x - w|^2} with `conjugate`. The frequencies of the Gaussian are unbounded: `inputs_plain` has no variance at all
    from |w|^2 = 1/2 on.

    Args:
        function: f.
        width: of inputs and weights, d.
        features: m.
        split: how i omega is divided.
        balance: by which a is multiplied and b divided; the best one is sqrt(|w| / |x|).
        damping: M, for long vectors of few dimensions.
        orthogonal: see `drawn_directions`.
        draw: a generator on the CPU; None: torch's own.

    Raises:
        ConfigError: a setting is out of range.
    """

    directions: Tensor
    frequencies: Tensor

    def __init__(
        self,
        function: Function,
        width: int,
        features: int,
        split: Split = "conjugate",
        balance: float = 1.0,
        damping: float = 0.0,
        orthogonal: bool = False,
        draw: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(function, split, width, features, balance, damping)
        self.function, self.split, self.balance, self.damping = function, split, balance, damping
        self.register_buffer("directions", drawn_directions(features, width, draw, orthogonal))
        if function == "gaussian":
            frequencies = torch.randn(features, generator=draw)
        else:
            frequencies = torch.randint(2, (features,), generator=draw) * 2.0 - 1.0
        self.register_buffer("frequencies", frequencies)

    def inputs(self, x: Tensor) -> Tensor:
        """Phi(x): (..., d) -> (..., m), complex."""
        return self._side(x, self._exponents()[0])

    def weights(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Psi(w, b): (..., d) and (...,) -> (..., m), complex."""
        side = self._side(weight, self._exponents()[1])
        frequencies = self.frequencies.to(side.real.dtype)
        if self.function == "sin":  # (e^{iz} - e^{-iz}) / 2i, each wave with the probability 1/2
            side = side * torch.complex(torch.zeros_like(frequencies), -frequencies)
        if bias is not None:
            angle = bias.to(frequencies.dtype)[..., None] * frequencies
            side = side * torch.polar(torch.ones_like(angle), angle)
        return side

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The estimate of f(x w^T + b): (..., d), (outputs, d) and (outputs,) -> (..., outputs)."""
        return (self.inputs(x) @ self.weights(weight, bias).mT).real

    def _exponents(self) -> tuple[Tensor, Tensor]:
        """a and b of every feature, complex (m,)."""
        wave = self.frequencies.double()
        root, quarter = wave.abs().sqrt(), wave.sign() * (math.pi / 4)
        if self.split == "inputs_plain":
            a, b = torch.complex(torch.ones_like(wave), 0 * wave), torch.complex(0 * wave, wave)
        elif self.split == "even":
            a = b = torch.polar(root, quarter)
        else:
            a, b = torch.polar(root, -quarter), torch.polar(root, 3 * quarter)
        return a * self.balance, b / self.balance

    def _side(self, x: Tensor, scale: Tensor) -> Tensor:
        """m^-1/2 e^{scale g x - scale^2 |x|^2 / 2}, damped."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.directions.dtype), torch.float32)
        with without_autocast():
            x, directions = x.to(dtype), self.directions.to(dtype)
            scale = scale.to(torch.complex(x.new_zeros(()), x.new_zeros(())).dtype)
            width, spread = directions.shape[1], 1 + 4 * self.damping
            exponent = math.sqrt(spread) * scale * (x @ directions.mT)
            exponent = exponent - scale.square() * x.square().sum(-1, keepdim=True) / 2
            exponent = exponent - self.damping * directions.square().sum(1) + width / 4 * math.log(spread)
            return exponent.exp() * len(directions) ** -0.5

    def extra_repr(self) -> str:
        features, width = self.directions.shape
        settings = f"function={self.function}, width={width}, features={features}, split={self.split}"
        return f"{settings}, balance={self.balance:g}, damping={self.damping:g}"


def _check(function: str, split: str, width: int, features: int, balance: float, damping: float) -> None:
    for name, value, known in (("function", function, get_args(Function)), ("split", split, get_args(Split))):
        if value not in known:
            raise ConfigError(f"UniversalFeatures: {name} = {value!r} is none. Give one of {', '.join(known)}.")
    for name, count in (("width", width), ("features", features)):
        if type(count) is not int or count < 1:
            raise ConfigError(f"UniversalFeatures: {name} = {count!r} must be a whole number from 1 on. Give one.")
    if not 0 < balance < math.inf or not 0 <= damping < math.inf:
        raise ConfigError(
            f"UniversalFeatures: balance = {balance:g} must be above 0 and damping = {damping:g} not below, and both "
            "finite. Give 1 and 0, with which neither does anything."
        )
