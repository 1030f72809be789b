"""Random features of ReLU, by which the inputs of a layer and the rows of its weight meet in m numbers: Phi(x) =
m^-1/2 max(G x, c) on both sides, with the same random directions G ("Scalable Neural Network Kernels", Sehanobish et
al., ICLR 2024, arXiv 2310.13225). Their product tends to the arc-cosine kernel of order one (c = 0), which is no ReLU
of w x. `auxin.nn.universal_features` has those of waves.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from auxin.errors import ConfigError


def drawn_directions(
    count: int, width: int, draw: torch.Generator | None = None, orthogonal: bool = False, device: str = "cpu"
) -> Tensor:
    """Random directions (count, width) in float32, each N(0, I).

    Args:
        count: how many, m.
        width: of the inputs, d.
        draw: a generator on the CPU; None: torch's own.
        orthogonal: whether each block of d of them is orthogonal, with norms drawn apart (the rows still are N(0, I),
            and no longer independent), by which ReLU features have less variance.
        device: where they are put.
    """
    drawn = torch.randn(count, width, generator=draw)
    if not orthogonal:
        return drawn.to(device)
    norms = torch.randn(count, width, generator=draw).square().sum(1, keepdim=True).sqrt()
    whole = count // width * width
    rows = torch.cat([_orthonormal(drawn[:whole].view(-1, width, width)), _orthonormal(drawn[whole:])])
    return (rows * norms).to(device)


def _orthonormal(rows: Tensor) -> Tensor:
    """Of matrices (..., rows, width) with no more rows than columns orthonormal rows, uniform where the matrices are
    normal; one matrix of them all."""
    basis, triangle = torch.linalg.qr(rows.mT)
    # Of the two signs of each direction the one that the draw had.
    return (basis * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT.reshape(-1, rows.shape[-1])


def relu_features(x: Tensor, directions: Tensor, threshold: float = 0.0) -> Tensor:
    """m^-1/2 max(G x, c): the same map for inputs and rows of weights.

    Args:
        x: (..., d).
        directions: G (m, d).
        threshold: c; below 0 it lets negative products through, and from -infinity on the map is linear.

    Returns:
        (..., m).
    """
    return F.linear(x, directions).clamp(min=threshold) * len(directions) ** -0.5


def ridge_solution(features: Tensor, targets: Tensor, ridge: float = 0.0) -> Tensor:
    """The matrix M (outputs, m) that makes |features M^T - targets|^2 + ridge |M|^2 least: a bundled layer, or a whole
    bundled network, fitted in closed form.

    Args:
        features: (samples, m).
        targets: (samples, outputs).
        ridge: lambda; with 0 the features have to have full rank.

    Returns:
        In the type of `features`, computed in float64.

    Raises:
        ConfigError: the ridge is no number from 0 on, features or targets are complex or not finite, or features have
            not full rank and there is no ridge.
    """
    if not 0 <= ridge < math.inf:
        raise ConfigError(f"ridge_solution: ridge = {ridge:g} must be a number from 0 on. Give 0, or a small one.")
    for name, values in (("features", features), ("targets", targets)):
        if values.is_complex() or not values.isfinite().all():
            raise ConfigError(f"ridge_solution: {name} must be real and finite. Give those of relu_features, say.")
    wide = features.double()
    gram = wide.mT @ wide
    gram.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        raise ConfigError(
            f"ridge_solution: {features.shape[-1]} features of {features.shape[-2]} samples have not full rank, so "
            "that more than one matrix is best. Give more samples, or a ridge above 0."
        )
    return torch.cholesky_solve(wide.mT @ targets.double(), factor).mT.to(features.dtype)
