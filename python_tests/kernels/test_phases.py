"""The CPU's phases by themselves agree with float64 NumPy; and CUDA's, run on the CPU by csrc/simt, with those."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from tfops_kernels import _kernels
from tfops_testing import kernel_cases, oracle
from tfops_testing.phase_cases import (
    SHAPES,
    Phases,
    assert_close,
    assert_simt_agrees,
    cpu,
    last_level_cache_bytes,
    make_given,
    make_keeps,
)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_cpu_agrees_with_numpy(shape, axis, dtype):
    given = make_given(shape, axis, dtype)
    # A z near a kink would be on either side of it.
    activation = "silu" if dtype != "float64" else "relu6"
    want = oracle.backward(
        given["dy"],
        given["x"],
        given["scale"],
        given["offset"],
        given["mean"],
        given["variance"],
        residual=given["residual"],
        axis=axis,
        epsilon=2**-10,
        training=False,
        activation=activation,
    )
    vector = functools.partial(oracle.vector_like, x=given["x"], axis=axis)
    xc = given["x"].astype(np.float64) - vector(given["mean"].astype(np.float64))
    for keep in make_keeps(shape):
        got = cpu().gradient(given, axis, activation, True, keep)
        kept = 1 if keep is None else keep[..., None]
        dx = want.x + kept * (xc * vector(given["tilt"]) + vector(given["shift"]))
        assert_close(got, [want.scale, want.offset, want.mean, want.variance, dx, want.residual], dtype)


@pytest.mark.parametrize(("shape", "axis"), [((3000, 128), -1), ((8, 6, 100, 99), 1)], ids=str)
def test_cpu_threads_change_nothing(shape, axis):
    given = make_given(shape, axis, "float32")
    for keep in make_keeps(shape)[:2]:
        results = [
            cpu(threads=n).moments(given["x"], axis, keep, given["scale"])
            + cpu(threads=n).gradient(given, axis, "relu", True, keep)
            for n in (1, 2, 5)
        ]
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize(("row", "axis"), [((128,), -1), ((2, 128, 64), 1)], ids=str)
def test_large_dx_has_the_same_bits_wherever_it_begins(row, axis, activation, dtype):
    """What outgrows the cache is written past it, if it begins with a cache line: by another loop."""
    shape = (math.ceil(1.1 * last_level_cache_bytes() / (3 * np.dtype(dtype).itemsize * math.prod(row))), *row)
    given = make_given(shape, axis, dtype)

    def place(array, past):
        raw = np.empty(array.nbytes + 128, np.uint8)
        placed = raw[-raw.ctypes.data % 64 + past :][: array.nbytes].view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed

    def dx(past):
        phases = Phases(_kernels, False, functools.partial(place, past=past))
        return phases.gradient(given, axis, activation, True, None)[4]

    np.testing.assert_array_equal(dx(0), dx(16))


@pytest.mark.source_tree
@pytest.mark.parametrize("device", ["three", "small"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_cuda_by_simt_agrees_with_cpu(simt, shape, axis, dtype, device):
    assert_simt_agrees(simt, shape, axis, dtype, device)


@pytest.mark.source_tree
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((16, 64, 32), -1), ((16, 6, 40, 32), 1)], ids=str)
def test_moments_are_right_where_a_mask_empties_the_first_blocks(simt, shape, axis, dtype):
    """What blocks without an element contribute is no center for the others: deviations from it would cancel."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(shape) + 1e6).astype(dtype)
    keep = np.ones(shape[:-1], bool)
    keep[: shape[0] // 2] = False
    kept = np.moveaxis(x[shape[0] // 2 :], axis, 0).reshape(shape[axis], -1).astype(np.float64)
    simt.configure("three")
    for phases in (Phases(simt.machine, True, simt.place), cpu()):
        count, mean, variance = phases.moments(x, axis, keep, np.zeros(shape[axis], dtype))
        np.testing.assert_array_equal(count, kept.shape[1])
        np.testing.assert_allclose(mean, kept.mean(1), rtol=1.2e-7)
        np.testing.assert_allclose(variance, kept.var(1), rtol=1e-5 if dtype == "float32" else 1e-9)
