"""Batch normalization and its gradient in NumPy, from the textbook formulas: what every test compares with.

In float64; in long double where the data are float64 themselves, for NumPy sums down a column one by one.
"""

from __future__ import annotations

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


def activate(name: str | None, z: Array) -> Array:
    if name == "relu":
        return np.maximum(z, 0)
    if name == "relu6":
        return np.clip(z, 0, 6)
    if name == "leaky_relu":
        return np.where(z > 0, z, np.float64(np.float32(0.2)) * z)
    if name == "silu":
        return z / (1 + np.exp(-z))
    return z


def slope_of(name: str | None, z: Array) -> Array:
    if name == "relu":
        return (z > 0).astype(z.dtype)
    if name == "relu6":
        return ((z > 0) & (z < 6)).astype(z.dtype)
    if name == "leaky_relu":
        return np.where(z > 0, 1, np.float64(np.float32(0.2)))
    if name == "silu":
        sigmoid = 1 / (1 + np.exp(-z))
        return sigmoid * (1 + z * (1 - sigmoid))
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
