"""The bounds of benchmarks/accuracy.py hold: for hard data, in every layout and type, and in the results committed."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

import tfops_kernels
from tfops_testing import kernel_cases
from tfops_testing.paths import BENCHMARKS


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("accuracy")


def _run(accuracy, problem, layout):
    """A problem through the kernels, as a Result."""
    x, dy = layout.tensor(problem.x), layout.tensor(problem.dy)
    settings = {"axis": -1 if layout.name == "NHWC" else 1, "epsilon": accuracy.EPSILON, "threads": 2}
    f = tfops_kernels.forward(x, problem.scale, problem.offset, **settings)
    b = tfops_kernels.backward(dy, x, problem.scale, problem.offset, f.saved_mean, f.saved_inv_std, **settings)
    return accuracy.Result(layout.data(f.y), f.mean, f.variance, layout.data(b.x), b.scale, b.offset)


def _assert_bounds_hold(accuracy, problem, dtype, layout):
    found = accuracy.errors(problem, accuracy.statistics(problem), _run(accuracy, problem, layout), dtype)
    assert set(found.of_bound) == set(accuracy.QUANTITIES)
    assert max(found.of_bound.values()) <= 1, found


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_bounds_hold(accuracy, dtype, layout):
    channels, n = 19, 64 * 9 * 10
    for case in accuracy.CASES:
        if accuracy.is_possible(case, dtype, n):
            problem = accuracy.make_problem(case, dtype, channels, n)
            _assert_bounds_hold(accuracy, problem, dtype, accuracy.Layout(layout, 64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pixels", [1, 2, 9, 49, 400])
def test_bounds_hold_where_the_first_elements_are_outliers(accuracy, pixels, dtype):
    """A shift taken from them is far from the mean, and what is summed about it in one chain rounds accordingly."""
    rng = np.random.default_rng(pixels)
    kind = np.dtype(dtype)
    rows = 12000 // pixels
    x = rng.standard_normal((20, rows * pixels))
    x[:10, :pixels] = 1000  # some channels have a plane of outliers, others one element
    x[10:, 0] = 1000
    dy = rng.standard_normal(x.shape) + 0.5
    scale, offset = rng.uniform(0.5, 2, (2, len(x))).astype(kind)
    problem = accuracy.Problem(x.astype(kind), dy.astype(kind), scale, offset)
    for layout in ("NHWC", "NCHW"):
        _assert_bounds_hold(accuracy, problem, dtype, accuracy.Layout(layout, rows))


@pytest.mark.parametrize("pixels", [1, 2, 3, 17, 49])
def test_rounding_does_not_add_up_over_small_planes(accuracy, pixels):
    """Sums of numbers that are all alike, whose roundings do not cancel."""
    rows = 3000
    x = 1 + np.arange(4 * rows * pixels).reshape(4, -1) % 2 * np.float32(0.7)
    problem = accuracy.Problem(x.astype(np.float32), np.full_like(x, 1.1, np.float32), *np.ones((2, 4), np.float32))
    for layout in ("NHWC", "NCHW"):
        _assert_bounds_hold(accuracy, problem, "float32", accuracy.Layout(layout, rows))


@pytest.mark.parametrize("power", [-30, -12, 0, 12, 30])
def test_bounds_hold_for_numbers_of_any_size(accuracy, power):
    """Variances from 1e-18 (and the epsilon that hides them) to 1e36 / 2^4, the largest whose sums do not overflow."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((7, 6400)) * 2.0**power).astype(np.float32)
    problem = accuracy.Problem(x, rng.standard_normal(x.shape).astype(np.float32), *np.ones((2, 7), np.float32))
    for layout in ("NHWC", "NCHW"):
        _assert_bounds_hold(accuracy, problem, "float32", accuracy.Layout(layout, 64))


def test_committed_results_are_complete_and_within_bounds():
    """What is committed covers every type and case, and tfops is within its bounds there."""
    rows = list(json.loads((BENCHMARKS / "results" / "accuracy.json").read_text()).values())
    mine = [row for row in rows if row["peer"] == "tfops" and row["device"] == "cpu"]
    for dtype in kernel_cases.DTYPES:
        cases = {row["case"] for row in mine if row["dtype"] == dtype}
        assert {"constant", "outliers", "ratio 1e0", "ratio 1e3", "many, ratio 1e0"} <= cases
    assert {f"ratio 1e{k}" for k in range(7)} <= {row["case"] for row in mine if row["dtype"] == "float32"}
    assert {row["peer"] for row in rows} >= {"tfops", "tf", "tf_jit", "keras", "keras_jit", "torch"}
    for row in mine:
        assert max(row["of_bound"].values()) <= 1, row
