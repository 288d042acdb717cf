"""Problems that keep y alone, and the comparison of their gradient with the oracle's: the same for CPU and GPU.

The oracle has x itself. What comes of computing x from y is bounded: see docs/numerics.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

import tfops_kernels

from . import kernel_cases, oracle
from .kernel_cases import ROUNDING, Case

ACTIVATIONS = (None, "leaky_relu", "elu", *kernel_cases.PARAMETRIZED[:2])


def random_cases(seed: int) -> list[Case]:
    """Every shape of `kernel_cases` with each activation, in types by turns."""
    rng = np.random.default_rng(seed)
    return [
        Case(
            shape,
            axis,
            kernel_cases.DTYPES[(i + j) % 4],
            activation=activation,
            exponential_avg_factor=float(rng.choice([1.0, 0.25])),
            unbiased=bool(rng.integers(2)),
        )
        for i, (shape, axis) in enumerate(kernel_cases.SHAPES)
        for j, activation in enumerate(ACTIVATIONS)
    ]


def combinations(shape: tuple[int, ...], axis: int) -> list[Case]:
    return [Case(shape, axis, d, activation=a) for d in kernel_cases.DTYPES for a in ACTIVATIONS]


def bounds(
    case: Case, arrays: dict[str, np.ndarray], forward: oracle.Forward, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """How far (x - mean) / std may be off that is computed from y, and dz from that of x itself."""
    own = ROUNDING["float64" if case.dtype == "float64" else "float32"]
    unit = ROUNDING[case.dtype] * (1 if case.dtype in ("float16", "bfloat16") else 0) + 8 * own

    def vector(v: np.ndarray) -> np.ndarray:
        return oracle.vector_like(v, forward.z, case.axis)

    x = arrays["x"].astype(forward.z.dtype)
    std = np.sqrt(forward.batch_variance + epsilon)
    xhat = np.abs(x - vector(forward.batch_mean)) / vector(std)
    ratio = np.abs(arrays["offset"] / arrays["scale"].astype(forward.z.dtype))
    # The mean is rounded too, and so is x where it is subtracted.
    of_xhat = unit * (xhat + vector(ratio)) + 2 * own * vector(np.abs(forward.batch_mean) / std)
    least = (2**-25 if case.dtype == "float16" else 0) / np.abs(vector(arrays["scale"]))  # y may be subnormal
    of_xhat = of_xhat + least / float(oracle.slope_of(case.activation, np.zeros(())))
    of_dz = np.zeros_like(xhat)
    if (case.activation or "").startswith("elu"):
        of_xhat = of_xhat * np.exp(-np.minimum(forward.z, 0))
        # exp(z), which is 1 + y.
        of_dz = np.abs(arrays["dy"].astype(forward.z.dtype)) * (forward.z < 0) * unit * (1 + np.abs(forward.z))
    return of_xhat, of_dz


def check(
    case: Case,
    to_device: Callable[[np.ndarray], Any],
    to_host: Callable[[Any], np.ndarray],
    kernels: Any = tfops_kernels,
    **kwargs: Any,
) -> None:
    """Runs forward and backward of a case, and compares the gradient with the oracle's."""
    arrays = kernel_cases.inputs(case, seed=zlib.crc32(str(case).encode()))
    device = {name: to_device(array) for name, array in arrays.items()}
    param = "float64" if case.dtype == "float64" else "float32"
    epsilon = 0.0009765625
    settings = {
        "axis": case.axis,
        "epsilon": epsilon,
        "activation": case.activation,
        "exponential_avg_factor": case.exponential_avg_factor,
        "unbiased": case.unbiased,
    }
    names = ("x", "scale", "offset", "mean", "variance")
    got = kernels.forward(*map(device.get, names), **settings, **kwargs, in_place=True)
    plain = kernels.forward(*map(device.get, names), **settings, **kwargs)
    for one, other in zip(got[:5], plain[:5], strict=True):
        np.testing.assert_array_equal(to_host(one).view(np.uint8), to_host(other).view(np.uint8))
    assert got.mask is None

    gradient = kernels.backward(
        device["dy"],
        got.y,
        device["scale"],
        device["offset"],
        got.saved_mean,
        got.saved_inv_std,
        dmean=device["dmean"],
        dvariance=device["dvariance"],
        **settings,
        **kwargs,
        in_place=True,
    )
    forward = oracle.forward(*map(arrays.get, names), **settings)
    z = forward.z.copy()
    y = to_host(got.y).astype(np.float64)
    near = (np.abs(z) < 1e-4) & (case.activation not in (None, "elu"))
    z[near] = np.where(y[near] > 0, 1, -1) * np.abs(z[near])  # which side of its kink an element is on, y says
    want = oracle.backward(
        arrays["dy"],
        *map(arrays.get, names),
        dmean=arrays["dmean"],
        dvariance=arrays["dvariance"],
        **settings,
        z=z,
    )
    of_xhat, of_dz = bounds(case, arrays, forward, epsilon)
    others = tuple(i for i in range(z.ndim) if i != case.axis % z.ndim)
    n = max(z.size // max(z.shape[case.axis], 1), 1)
    own = ROUNDING[param] * 16

    def vector(v: np.ndarray) -> np.ndarray:
        return oracle.vector_like(v, z, case.axis)

    std = np.sqrt(forward.batch_variance + epsilon)
    xhat = np.abs(arrays["x"].astype(z.dtype) - vector(forward.batch_mean)) / vector(std)
    dz = np.abs(arrays["dy"].astype(z.dtype))
    of_sum = (of_dz + own * dz).sum(others)
    of_sum_xhat = (dz * of_xhat + of_dz * (xhat + of_xhat) + own * dz * xhat).sum(others)
    _assert_within("doffset", to_host(gradient.offset), want.offset, of_sum + own * np.abs(want.offset))
    _assert_within("dscale", to_host(gradient.scale), want.scale, of_sum_xhat + own * np.abs(want.scale))
    slope = np.abs(arrays["scale"].astype(z.dtype)) / std
    divisor = max(n - 1, 1) if case.unbiased else n
    tilt = np.abs(slope * want.scale / n)
    tilt = tilt + 2 * case.exponential_avg_factor * np.abs(arrays["dvariance"]) * std / divisor
    bound = vector(slope) * (of_dz + own * dz + vector((of_sum + own * dz.sum(others)) / n))
    bound = bound + of_xhat * vector(tilt) + (xhat + of_xhat) * vector(slope * of_sum_xhat / n + own * tilt)
    bound = bound + vector(own * (np.abs(arrays["dmean"]) + slope * (dz * xhat).sum(others) / n))
    stored = ROUNDING[case.dtype] * 1.01 * np.abs(want.x) + (2**-25 if case.dtype == "float16" else 0)
    _assert_within("dx", to_host(gradient.x), want.x, bound + stored)


def _assert_within(name: str, got: np.ndarray, want: np.ndarray, bound: np.ndarray) -> None:
    excess = np.abs(np.asarray(got).astype(want.dtype) - want) - bound
    assert got.shape == want.shape
    assert not np.isnan(excess).any(), f"{name}: NaN"
    if excess.size:
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        assert excess[worst] <= 0, f"{name}{list(map(int, worst))}: {got[worst]}, not {want[worst]} +- {bound[worst]}"


def refused(case: Case) -> dict[str, np.ndarray]:
    """Inputs whose channels 1, 3 and 4 have a scale that is too near 0: 0, below the bound, and 0 with offset 0."""
    arrays = kernel_cases.inputs(case)
    unit = ROUNDING[case.dtype]
    arrays["offset"][:5] = [1, 1, -1.5, 1.5, 0]
    arrays["scale"][:5] = [0.5, 0, 4.04 * unit * 1.5, -3.96 * unit * 1.5, 0]
    return arrays


def check_refusal(
    case: Case,
    to_device: Callable[[np.ndarray], Any],
    kernels: Any,
    to_host: Callable[[Any], np.ndarray] = np.asarray,
) -> None:
    """The gradient of what Forward() refuses, or cannot: NaN in these channels alone, of x and scale."""
    arrays = refused(case)
    device = {name: to_device(array) for name, array in arrays.items()}
    settings = {"axis": case.axis, "activation": case.activation}
    plain = kernels.forward(device["x"], device["scale"], device["offset"], **settings)
    gradient = kernels.backward(
        device["dy"],
        plain.y,
        device["scale"],
        device["offset"],
        plain.saved_mean,
        plain.saved_inv_std,
        **settings,
        in_place=True,
    )
    is_nan = np.isin(np.arange(case.shape[case.axis]), [1, 3, 4])
    dx, dscale, doffset = (to_host(array).astype(np.float64) for array in gradient[:3])
    by_channel = np.isnan(np.moveaxis(dx, case.axis, 0).reshape(case.shape[case.axis], -1))
    np.testing.assert_array_equal(by_channel.all(1), is_nan)
    np.testing.assert_array_equal(by_channel.any(1), is_nan)
    np.testing.assert_array_equal(np.isnan(dscale), is_nan)
    assert not np.isnan(doffset).any()
