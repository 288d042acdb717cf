"""The largest tensors: more elements than 32 bits count. `make limits`.

A tensor is one pattern, many times over. So its statistics are those of the pattern, and an output must be one pattern,
many times over as well, which is compared with the oracle's once.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import tfops_kernels
from tfops_kernels import _kernels
from tfops_testing import oracle

pytestmark = [pytest.mark.limits, pytest.mark.exclusive]

ELEMENTS = 2_200_000_000  # > 2^31

# (shape, axis, elements of a channels' run of the pattern): the pattern is [rows, C] where channels are last, and
# [C, pixels] where there is one image.
CASES = {
    "many rows": ((34_375_000, 64), -1, 1000),
    "one channel": ((ELEMENTS, 1), -1, 100_000),
    "70,000 channels": ((31_430, 70_000), -1, 10),
    "batch 1, large planes": ((1, 3, 733_400_000), 1, 100_000),
    "batch 1, more channels x inner than 2^31": ((1, 70_000, 31_440), 1, 40),
    "one pixel": ((11_000_000, 200, 1, 1), 1, 1000),
}


def _pattern(shape, axis, run, center=1.0):
    """[run, C] or [C, run], in float16."""
    channels = shape[axis]
    rng = np.random.default_rng(0)
    pattern = rng.standard_normal((run, channels) if _last(shape, axis) else (channels, run)) + center
    return pattern.astype(np.float16)


def _last(shape, axis):
    return math.prod(shape[axis % len(shape) + 1 :]) == 1


def _view(array, shape, axis, run):
    """As [repeats, run, C] or [C, repeats, run]."""
    channels = shape[axis]
    return array.reshape((-1, run, channels) if _last(shape, axis) else (channels, -1, run))


def _repeated(pattern, shape, axis, run):
    array = np.empty(shape, np.float16)
    view = _view(array, shape, axis, run)
    view[...] = pattern if _last(shape, axis) else pattern[:, None]
    return array


def _first(array, shape, axis, run):
    """The pattern of an output, which is asserted to be one."""
    view = _view(array, shape, axis, run).view(np.uint16)
    view = view if _last(shape, axis) else view.swapaxes(0, 1)  # [repeats, ...]
    first = view[0].copy()
    step = max(1, 64_000_000 // first.size)
    for i in range(0, len(view), step):
        assert (view[i : i + step] == first).all(), f"repetitions {i} to {i + step} are not like the first"
    return first.view(np.float16)


def _problem(shape, axis, **settings):
    common = {"epsilon": 1e-3, "exponential_avg_factor": 1.0, "unbiased": False, "has_residual": False}
    return _kernels.Problem(
        shape=list(shape), axis=axis, dtype=_kernels.DataType.float16, **{**common, "activation": "relu", **settings}
    )


def _close(name, got, want, bound):
    worst = np.abs(got.astype(np.float64) - want).max()
    assert worst <= bound, f"{name} is off by {worst}"


@pytest.mark.parametrize("case", CASES)
def test_more_elements_than_32_bits_count(case):
    """Training with a residual, so with a mask, and its gradient: 8.8 GB at any time."""
    shape, axis, run = CASES[case]
    assert math.prod(shape) > 2**31
    channels, threads = shape[axis], 2
    rng = np.random.default_rng(1)
    scale, offset = rng.uniform(0.5, 2, channels).astype(np.float32), rng.uniform(-1, 1, channels).astype(np.float32)
    pattern = _pattern(shape, axis, run)
    small_axis = 1 if _last(shape, axis) else 0
    settings = {"axis": small_axis, "activation": "relu", "unbiased": False}
    want = oracle.forward(pattern, scale, offset, residual=pattern, **settings)

    x = _repeated(pattern, shape, axis, run)
    y = np.empty(shape, np.float16)
    vectors = {name: np.empty(channels, np.float32) for name in ("mean", "variance", "saved_mean", "saved_inv_std")}
    problem = _problem(shape, axis, training=True, has_residual=True)
    activation_bits = np.zeros(problem.activation_bits_bytes, np.uint8)
    arrays = _kernels.ForwardArrays()
    given = {"x": x, "residual": x, "activation_bits": activation_bits, "scale": scale, "offset": offset}
    for field, array in {**given, "y": y}.items():
        setattr(arrays, field, array.ctypes.data)
    for field, name in {"mean_out": "mean", "variance_out": "variance"}.items():
        setattr(arrays, field, vectors[name].ctypes.data)
    for name in ("saved_mean", "saved_inv_std"):
        setattr(arrays, name, vectors[name].ctypes.data)
    _kernels.cpu_forward(problem, arrays, threads)
    _close("mean", vectors["mean"], want.batch_mean, 1e-5)
    _close("variance", vectors["variance"], want.batch_variance, 1e-4)
    _close("y", _first(y, shape, axis, run), want.y, 0.02)

    # dy in y's memory, and dx and dresidual in dy's.
    gradient = _pattern(shape, axis, run, center=0.25)
    near = np.abs(want.z) < 1e-3
    gradient[near] = 0
    dy = y
    view = _view(dy, shape, axis, run)
    view[...] = gradient if _last(shape, axis) else gradient[:, None]
    back = oracle.backward(gradient, pattern, scale, offset, residual=pattern, **settings)
    arrays = _kernels.BackwardArrays()
    given = {"dy": dy, "x": x, "activation_bits": activation_bits, "scale": scale, "offset": offset, "dx": dy}
    outputs = {name: np.empty(channels, np.float32) for name in ("dscale", "doffset")}
    for field, array in {**given, **outputs}.items():
        setattr(arrays, field, array.ctypes.data)
    arrays.mean, arrays.inv_std = vectors["saved_mean"].ctypes.data, vectors["saved_inv_std"].ctypes.data
    _kernels.cpu_backward(problem, arrays, threads)
    repeats = math.prod(shape) // pattern.size
    for name, got, wanted in (("doffset", outputs["doffset"], back.offset), ("dscale", outputs["dscale"], back.scale)):
        _close(name, got / repeats, wanted, 1e-5 * run)
    _close("dx", _first(dy, shape, axis, run), back.x, 0.02)


@pytest.mark.parametrize("channels", [1, 2, 3, 100, 1023, 4097, 32_768, 65_535, 65_536, 65_537, 70_000])
def test_any_number_of_channels_agrees_with_numpy(channels):
    """Any number of them, of one pixel, one image, one element or some; and layouts agree."""
    rng = np.random.default_rng(channels)
    scale, offset = rng.uniform(0.5, 2, (2, channels)).astype(np.float32)
    for batch, pixels in ((1, 1), (1, 5), (3, 1), (6, 7)):
        x = rng.standard_normal((batch, pixels, channels)).astype(np.float32)
        want = oracle.forward(x, scale, offset)
        first = np.ascontiguousarray(x.transpose(0, 2, 1))
        got = tfops_kernels.forward(x, scale, offset, threads=2).y
        planes = tfops_kernels.forward(first, scale, offset, axis=1, threads=2).y
        for name, y in (("last", got), ("first", planes.transpose(0, 2, 1))):
            _close(name, y, want.y, 2e-4)
        gradient = oracle.backward(x[::-1], x, scale, offset)
        forward = tfops_kernels.forward(x, scale, offset)
        saved = (forward.saved_mean, forward.saved_inv_std)
        got = tfops_kernels.backward(np.ascontiguousarray(x[::-1]), x, scale, offset, *saved, threads=2)
        _close("dscale", got.scale, gradient.scale, 2e-4)
        _close("dx", got.x, gradient.x, 2e-2)
