"""Random features of a neuron, feature by feature, and what they are on average: truth, second moments, variance.

A feature of wave omega is

    T = F e^{i omega b} (1 + 4M)^(d/2) e^{s g (a x + b w) - 2M |g|^2 - a^2 |x|^2 / 2 - b^2 |w|^2 / 2}

with s = sqrt(1 + 4M), and of a complex vector v E e^{g v} = e^{v v / 2}, v v without a conjugate.
"""

import cmath
import math

import numpy as np

FACTORS = {"cos": lambda wave: 1.0, "sin": lambda wave: -1j * wave, "gaussian": lambda wave: 1.0}
TRUTH = {"cos": math.cos, "sin": math.sin, "gaussian": lambda z: math.exp(-z * z / 2)}


def pair(norm: float, product: float, width: int, other: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """x and w of the norms `norm` and `other` (None: the same) with x w = `product`."""
    other = norm if other is None else other
    x, w = np.zeros(width), np.zeros(width)
    x[0], w[0] = norm, product / norm
    w[1] = math.sqrt(other**2 - w[0] ** 2)
    return x, w


def split(wave: float, how: str, balance: float = 1.0) -> tuple[complex, complex]:
    """a and b with a b = i wave."""
    root = cmath.sqrt(1j * wave)
    a = {"inputs_plain": 1.0, "even": root, "conjugate": root.conjugate()}[how] * balance
    return a, 1j * wave / a


def feature(
    x: np.ndarray, w: np.ndarray, bias: float, g: np.ndarray, wave: float, function: str, how: str,
    balance: float = 1.0, damping: float = 0.0,
) -> complex:  # fmt: skip
    """T of one direction."""
    a, b = split(wave, how, balance)
    spread, width = 1 + 4 * damping, len(x)
    exponent = math.sqrt(spread) * (g @ (a * x + b * w)) - 2 * damping * (g @ g)
    exponent -= a * a * (x @ x) / 2 + b * b * (w @ w) / 2
    return FACTORS[function](wave) * cmath.exp(1j * wave * bias) * spread ** (width / 2) * cmath.exp(exponent)


def moment(
    x: np.ndarray, w: np.ndarray, wave: float, how: str, of_size: bool, power: int = 2, damping: float = 0.0
) -> complex:
    """E |T|^power (`of_size`) or E T^power over directions, of a wave whose factor is 1 and without a bias."""
    a, b = split(wave, how)
    vector, squares = a * x + b * w, a * a * (x @ x) + b * b * (w @ w)
    if of_size:
        vector, squares = vector.real, squares.real
    # E e^{power (s g v - 2M |g|^2)} = (1 + 4 M power)^(-d/2) e^{power^2 s^2 v v / (2 (1 + 4 M power))}
    spread, decay = 1 + 4 * damping, 1 + 4 * damping * power
    size = (spread**power / decay) ** (len(x) / 2)
    return size * cmath.exp(power**2 * spread / (2 * decay) * (vector @ vector) - power * squares / 2)


def variance(x: np.ndarray, w: np.ndarray, bias: float, function: str, how: str, damping: float = 0.0) -> float:
    """Of the real part of one feature of the cosine or the sine, whose waves are 1 and -1."""
    mean = TRUTH[function](float(x @ w) + bias)
    total = 0.0
    for wave in (1.0, -1.0):
        square = FACTORS[function](wave) ** 2 * cmath.exp(2j * wave * bias)
        both = moment(x, w, wave, how, True, damping=damping) + square * moment(x, w, wave, how, False, damping=damping)
        total += both.real / 2 / 2
    return total - mean**2


def arc_cosine(x: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """E max(g x, 0) max(g w, 0), and the variance of that product (Cho and Saul 2009, orders one and two)."""
    size = math.sqrt(x @ x) * math.sqrt(w @ w)
    cosine = min(max(float(x @ w) / size, -1.0), 1.0)
    angle, sine = math.acos(cosine), math.sqrt(1 - cosine**2)
    mean = size * (sine + (math.pi - angle) * cosine) / (2 * math.pi)
    square = size**2 * (3 * sine * cosine + (math.pi - angle) * (1 + 2 * cosine**2)) / (2 * math.pi)
    return mean, square - mean**2


def layer(x: np.ndarray, weight: np.ndarray, directions: np.ndarray, threshold: float) -> np.ndarray:
    """Phi(x) Psi(W)^T for x (in,) and W (out, in), a neuron and a direction at a time."""
    count, found = len(directions), []
    for row in weight:
        total = 0.0
        for g in directions:
            total += max(float(g @ x), threshold) / math.sqrt(count) * max(float(g @ row), threshold) / math.sqrt(count)
        found.append(total)
    return np.array(found)
