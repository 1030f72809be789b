"""The variational bottleneck of one gate by numbers: densities on a grid, and a search over the width of the prior."""

import numpy as np
from scipy.optimize import minimize_scalar


def divergence(h: float, mu: float, sigma: float, xi: float) -> float:
    """KL of N(h mu, h^2 sigma^2) to N(0, xi), the integral of p log(p / q)."""
    mean, deviation = h * mu, abs(h) * sigma
    x = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 20_001)
    log_p = -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation)
    log_q = -0.5 * x**2 / xi - 0.5 * np.log(xi)
    p = np.exp(log_p) / np.sqrt(2 * np.pi)
    return float(np.sum(p * (log_p - log_q)) * (x[1] - x[0]))


def least_divergence(h: float, mu: float, sigma: float) -> float:
    """The smallest KL over all xi > 0."""
    found = minimize_scalar(lambda log_xi: divergence(h, mu, sigma, float(np.exp(log_xi))), bracket=(-4.0, 4.0))
    return float(found.fun)
