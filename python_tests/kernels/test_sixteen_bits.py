"""Every finite float16 and bfloat16 through inference and its gradient, with every activation.

With a mean of 0 and a variance of 1, z is x itself. So what is measured is the activation as the kernels compute it, in
float32, and the rounding of the result: half an ulp, and what float32 adds to that.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tfops_kernels
from tfops_testing import kernel_cases, oracle, sixteen_bits


@pytest.mark.parametrize("activation", kernel_cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_is_rounded_once(dtype, activation):
    x = sixteen_bits.every_finite(dtype)
    z = x.astype(np.float64)
    y, dx = sixteen_bits.run(x, activation)
    with np.errstate(over="ignore"):
        wanted = oracle.activate(activation, z), oracle.slope_of(activation, z)
    for name, got, want in zip(("y", "dx"), (y, dx), wanted, strict=True):
        slack = sixteen_bits.CANCELLED if name == "dx" else 0.0
        bound = sixteen_bits.BOUND + slack / sixteen_bits.spacing(want, dtype)
        worst = np.argmax(sixteen_bits.ulps(got, want, dtype) - bound)
        error = sixteen_bits.ulps(got, want, dtype)[worst]
        assert error <= bound[worst], f"{name} at {x[worst]} is {got[worst]}, not {want[worst]}: {error} ulp"


@pytest.mark.parametrize("activation", ["relu", "gelu", "mish"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_with_scale_and_offset(dtype, activation):
    """z is rounded too then: by half an eps of float32 of each of its terms."""
    x = sixteen_bits.every_finite(dtype)
    scale, offset = np.float32(1.7), np.float32(-0.3)
    x = x[np.abs(x.astype(np.float64)) < 1e4]
    z = x.astype(np.float64) * scale + offset
    vectors = [np.full(2, value, np.float32) for value in (scale, offset, 0, 1)]
    settings = {"axis": -1, "epsilon": 0.0, "training": False, "activation": activation}
    y = np.ravel(tfops_kernels.forward(x[: len(x) // 2 * 2].reshape(-1, 2), *vectors, **settings).y)
    z = z[: len(y)]
    with np.errstate(over="ignore"):
        want = oracle.activate(activation, z)
    error = np.abs(y.astype(np.float64) - want)
    spacing = sixteen_bits.spacing(want, dtype)
    bound = sixteen_bits.BOUND * spacing + 1.2 * 2**-23 * (np.abs(z) + np.abs(offset))
    assert (error <= bound).all(), x[np.argmax(error - bound)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nan_comes_out_as_nan(dtype):
    x = np.full(64, np.nan, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    for activation in kernel_cases.ACTIVATIONS:
        y, dx = sixteen_bits.run(x, activation)
        assert np.isnan(y.astype(np.float32)).all(), activation
        if activation in kernel_cases.SMOOTH:
            assert np.isnan(dx.astype(np.float32)).all(), activation
