"""Batch normalization and its gradient in NumPy, from the textbook formulas: what every test compares with.

In float64; in long double where the data are float64 themselves, for NumPy sums down a column one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Forward(NamedTuple):
    y: Array
    mean: Array
    variance: Array
    batch_mean: Array
    batch_variance: Array
    z: Array  # before the activation


class Backward(NamedTuple):
    x: Array
    scale: Array
    offset: Array
    mean: Array
    variance: Array
    residual: Array


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def _normal(z: Array) -> Array:
    """The probability of less than z."""
    return (0.5 * np.vectorize(math.erfc, otypes=[float])(-z.astype(np.float64) * math.sqrt(0.5))).astype(z.dtype)


def _u_of_gelu(z: Array) -> tuple[Array, Array]:
    """What the tanh is of in the approximation of GELU, and the slope of that. (1 + tanh(u)) / 2 is sigmoid(2 u)."""
    factor = np.sqrt(z.dtype.type(2) / np.pi)
    return factor * (z + 0.044715 * z**3), factor * (1 + 3 * 0.044715 * z**2)


def _gelu_tanh_slope(z: Array) -> Array:
    u, slope = _u_of_gelu(z)
    return _sigmoid(2 * u) + 2 * z * _sigmoid(2 * u) * _sigmoid(-2 * u) * slope


def _mish_slope(z: Array) -> Array:
    tanh = np.tanh(np.logaddexp(0, z))
    return tanh + z * (1 - tanh**2) * _sigmoid(z)


_SCALE, _ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

# The function and its derivative.
_SMOOTH: dict[str | None, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "hard_silu": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6)),
    ),
    "gelu": (lambda z: z * _normal(z), lambda z: _normal(z) + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)),
    "gelu_tanh": (lambda z: z * _sigmoid(2 * _u_of_gelu(z)[0]), _gelu_tanh_slope),
    "elu": (
        lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
        lambda z: np.where(z > 0, 1, np.exp(np.minimum(z, 0))),
    ),
    "selu": (
        lambda z: _SCALE * np.where(z > 0, z, _ALPHA * np.expm1(np.minimum(z, 0))),
        lambda z: _SCALE * np.where(z > 0, 1, _ALPHA * np.exp(np.minimum(z, 0))),
    ),
    "tanh": (np.tanh, lambda z: 4 * _sigmoid(2 * z) * _sigmoid(-2 * z)),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "softplus": (lambda z: np.logaddexp(0, z), _sigmoid),
    "mish": (lambda z: z * np.tanh(np.logaddexp(0, z)), _mish_slope),
}


def _parameters(name: str | None) -> tuple[str | None, dict[str, float]]:
    """An activation without its parameters, and these."""
    plain, _, rest = (name or "").partition("(")
    pairs = [each.split("=") for each in rest.rstrip(")").split(",") if each]
    return plain or None, {key.strip(): float(value) for key, value in pairs}


def _leaky_slope(parameters: dict[str, float]) -> np.float64:
    return np.float64(np.float32(parameters.get("negative_slope", 0.2)))


def activate(name: str | None, z: Array) -> Array:
    name, parameters = _parameters(name)
    if name == "relu" and parameters:
        threshold = parameters.get("threshold", 0.0)
        with np.errstate(invalid="ignore"):
            below = (
                parameters["negative_slope"] * (z - threshold) if "negative_slope" in parameters else np.zeros_like(z)
            )
        return np.where(z <= threshold, below, np.minimum(z, parameters.get("max_value", np.inf)))
    if name == "relu":
        return np.maximum(z, 0)
    if name == "relu6":
        return np.clip(z, 0, 6)
    if name == "leaky_relu":
        return np.where(z > 0, z, _leaky_slope(parameters) * z)
    if name == "elu" and parameters:
        return np.where(z > 0, z, parameters["alpha"] * np.expm1(np.minimum(z, 0)))
    if name in _SMOOTH:
        return _SMOOTH[name][0](z)
    return z


def slope_of(name: str | None, z: Array) -> Array:
    name, parameters = _parameters(name)
    if name == "relu" and parameters:
        above = (z < parameters.get("max_value", np.inf)).astype(z.dtype)
        return np.where(z <= parameters.get("threshold", 0.0), parameters.get("negative_slope", 0.0), above)
    if name == "relu":
        return (z > 0).astype(z.dtype)
    if name == "relu6":
        return ((z > 0) & (z < 6)).astype(z.dtype)
    if name == "leaky_relu":
        return np.where(z > 0, 1, _leaky_slope(parameters))
    if name == "elu" and parameters:
        return np.where(z > 0, 1, parameters["alpha"] * np.exp(np.minimum(z, 0)))
    if name in _SMOOTH:
        return _SMOOTH[name][1](z)
    return np.ones_like(z)


def _wide(array: Any) -> Any:
    if array is None:
        return None
    array = np.asarray(array)
    return array.astype(np.longdouble if array.dtype == np.float64 else np.float64)


def _others(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def vector_like(v: Array, x: Array, axis: int) -> Array:
    """[C] shaped to be combined with x."""
    return v.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def forward(
    x: Array,
    scale: Array,
    offset: Array,
    mean: Array | None = None,
    variance: Array | None = None,
    *,
    residual: Array | None = None,
    axis: int = -1,
    epsilon: float = 1e-3,
    exponential_avg_factor: float = 1.0,
    training: bool = True,
    activation: str | None = None,
    unbiased: bool = True,
) -> Forward:
    x, scale, offset, mean, variance, residual = map(_wide, (x, scale, offset, mean, variance, residual))
    others = _others(x, axis)
    n = x.size // max(scale.size, 1)
    if training:
        batch_mean = x.sum(others) / max(n, 1)
        squares = np.square(x - vector_like(batch_mean, x, axis)).sum(others)
        batch_variance = squares / max(n, 1)
        estimate = squares / max(n - 1, 1) if unbiased else batch_variance
        factor = exponential_avg_factor if n else 0.0
        old_mean, old_variance = (np.zeros_like(scale),) * 2 if mean is None else (mean, variance)
        mean_out = (1 - factor) * old_mean + factor * batch_mean
        variance_out = (1 - factor) * old_variance + factor * estimate
    else:
        batch_mean, batch_variance, mean_out, variance_out = mean, variance, mean, variance
    inv_std = 1 / np.sqrt(batch_variance + epsilon)
    z = (x - vector_like(batch_mean, x, axis)) * vector_like(inv_std * scale, x, axis) + vector_like(offset, x, axis)
    if residual is not None:
        z = z + residual
    return Forward(activate(activation, z), mean_out, variance_out, batch_mean, batch_variance, z)


def backward(
    dy: Array,
    x: Array,
    scale: Array,
    offset: Array,
    mean: Array | None = None,
    variance: Array | None = None,
    *,
    dmean: Array | None = None,
    dvariance: Array | None = None,
    residual: Array | None = None,
    axis: int = -1,
    epsilon: float = 1e-3,
    exponential_avg_factor: float = 1.0,
    training: bool = True,
    activation: str | None = None,
    unbiased: bool = True,
    z: Array | None = None,
) -> Backward:
    """z: where to take the activation's slope, if not where float64 puts it: near a kink, that is up to rounding."""
    result = forward(
        x,
        scale,
        offset,
        mean,
        variance,
        residual=residual,
        axis=axis,
        epsilon=epsilon,
        training=training,
        activation=activation,
    )
    dy, x, scale = _wide(dy), _wide(x), _wide(scale)
    others = _others(x, axis)
    n = max(x.size // max(scale.size, 1), 1)

    def vector(v: Array) -> Array:
        return vector_like(v, x, axis)

    dz = dy * slope_of(activation, result.z if z is None else z)
    xc = x - vector(result.batch_mean)
    inv_std = 1 / np.sqrt(result.batch_variance + epsilon)
    sum_dz, sum_dz_xc = dz.sum(others), (dz * xc).sum(others)
    slope = scale * inv_std
    dx = vector(slope) * dz
    if training:
        dx = dx - vector(slope * sum_dz / n) - xc * vector(slope * inv_std**2 * sum_dz_xc / n)
        if dmean is not None:
            dx = dx + vector(exponential_avg_factor * _wide(dmean) / n)
        if dvariance is not None:
            divisor = max(n - 1, 1) if unbiased else n
            dx = dx + xc * vector(exponential_avg_factor * _wide(dvariance) * 2 / divisor)
    return Backward(dx, sum_dz_xc * inv_std, sum_dz, -slope * sum_dz, -0.5 * slope * inv_std**2 * sum_dz_xc, dz)
