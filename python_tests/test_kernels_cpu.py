"""The CPU kernels, on NumPy arrays and without TensorFlow, agree with float64 NumPy."""

from __future__ import annotations

import os
import subprocess
import sys

import kernel_cases
import numpy as np
import pytest

import tfops_kernels


def _identity(array):
    return array


@pytest.mark.parametrize("case", kernel_cases.random_cases(seed=1, count=8), ids=str)
def test_shapes(case):
    kernel_cases.check(case, _identity, _identity, threads=2)


@pytest.mark.parametrize(("shape", "axis"), [((50, 3, 23), -1), ((3, 37, 5, 5), 1)], ids=["nhwc", "nchw"])
def test_combinations(shape, axis):
    for case in kernel_cases.combinations(shape, axis):
        kernel_cases.check(case, _identity, _identity)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_elements_a_channel(count, dtype):
    """Where n - 1 and n differ most, in the variance and in its gradient."""
    for unbiased in (True, False):
        case = kernel_cases.Case((count, 19), -1, dtype, exponential_avg_factor=0.25, unbiased=unbiased)
        kernel_cases.check(case, _identity, _identity)


def _add(x, residual):
    """x + residual through the kernel: with a deviation of exactly 1 nothing else rounds."""
    channels = x.shape[-1]
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    variance = np.full(channels, 1 - 2**-10, np.float32)
    return tfops_kernels.forward(x, ones, zeros, zeros, variance, residual=residual, epsilon=2**-10, training=False).y


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even(dtype):
    """Every bit pattern is read right, and sums, many of them half way between two values, are written right."""
    kind = kernel_cases.numpy_dtype(dtype)
    x = np.arange(2**16, dtype=np.uint16).view(kind).reshape(-1, 64)
    rng = np.random.default_rng(0)
    for residual in (np.zeros_like(x), rng.permuted(x.ravel()).reshape(x.shape), x[::-1].copy(), np.roll(x, 64 * 8)):
        with np.errstate(all="ignore"):
            want = (x.astype(np.float32) + residual.astype(np.float32)).astype(kind)
        got = _add(x, residual)
        # (-0 - 0) + 0 is 0: the sign of zero is not kept.
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_levels(level):
    """All of this file, with the kernels of another instruction set."""
    if level == tfops_kernels.build_info()["cpu_instruction_set"]:
        pytest.skip(f"{level} is what the other tests ran")

    def run(*arguments):
        environment = {**os.environ, "TFOPS_CPU": level}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=sys.prefix, capture_output=True, text=True)

    chosen = run("-c", "import tfops_kernels; print(tfops_kernels.build_info()['cpu_instruction_set'])").stdout
    if chosen.strip() != level:
        pytest.skip(f"this machine has no {level}")
    tests = run("-m", "pytest", "-q", "-k", "not levels", "-p", "no:cacheprovider", __file__)
    assert tests.returncode == 0, tests.stdout
