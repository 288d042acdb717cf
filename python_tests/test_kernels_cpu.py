"""The CPU kernels, on NumPy arrays and without TensorFlow, agree with float64 NumPy."""

from __future__ import annotations

import pytest

import kernel_cases


def _identity(array):
    return array


@pytest.mark.parametrize("case", kernel_cases.random_cases(seed=1, count=8), ids=str)
def test_shapes(case):
    kernel_cases.check(case, _identity, _identity, threads=2)


@pytest.mark.parametrize(("shape", "axis"), [((50, 3, 23), -1), ((3, 37, 5, 5), 1)], ids=["nhwc", "nchw"])
def test_combinations(shape, axis):
    for case in kernel_cases.combinations(shape, axis):
        kernel_cases.check(case, _identity, _identity)
