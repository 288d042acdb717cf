"""The CPU kernels, on NumPy arrays and without TensorFlow: they agree with float64 NumPy, and with themselves.

Bitwise so with themselves, from run to run, for any number of threads, and whether tensors outgrow the cache or not.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import tfops_kernels
from tfops_kernels import _arrays, _kernels
from tfops_testing import kernel_cases
from tfops_testing.fresh_process import run_python
from tfops_testing.phase_cases import last_level_cache_bytes


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


def _larger_than_the_cache(row, dtype):
    """x, dy and residual of rows: none of them aligned, and each at another offset."""
    kind = kernel_cases.numpy_dtype(dtype)
    cache = last_level_cache_bytes()
    if cache > 128 << 20:
        pytest.skip(f"a cache of {cache >> 20} MiB takes too long to outgrow")
    rows = math.ceil(1.1 * cache / (2 * np.dtype(kind).itemsize * math.prod(row)))
    rng = np.random.default_rng(0)
    return [
        np.resize(rng.standard_normal(9973), rows * math.prod(row) + i).astype(kind)[i:].reshape(rows, *row)
        for i in range(1, 4)
    ]


LARGE = pytest.mark.parametrize(
    ("row", "axis"), [((24,), -1), ((131,), -1), ((2056,), -1), ((2304,), -1), ((3, 37, 41), 1)], ids=str
)


@pytest.fixture(params=[(0,), (16,), (0, 16), (16, 0)], ids=["aligned", "unaligned", "first", "second"])
def _outputs(request, monkeypatch):
    """Where large outputs begin in a cache line, by turns: at its first byte, as TensorFlow's do, or elsewhere, as
    NumPy's may. Two by turns: dx and dresidual begin differently."""
    past = itertools.cycle(request.param)

    def empty(_, shape, dtype, like):
        kind = like.dtype if dtype == like.dtype.name else np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        if shape != like.shape:
            return np.empty(shape, kind)
        raw = np.empty(size + 128, np.uint8)
        return raw[-raw.ctypes.data % 64 + next(past) :][:size].view(kind).reshape(shape)

    monkeypatch.setattr(_arrays._NumPy, "empty", empty)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@LARGE
@pytest.mark.usefixtures("_outputs")
def test_larger_than_the_cache_has_the_same_bits(row, axis, dtype, residual):
    """Tensors that outgrow the cache are written past it, and half of them, which fill it, fetched ahead: bit for bit
    what small parts are, for which neither is done."""
    x, dy, r = _larger_than_the_cache(row, dtype)
    rows = len(x)
    rng = np.random.default_rng(1)
    param = np.float64 if dtype == "float64" else np.float32
    scale, offset, mean, variance = rng.uniform(0.5, 2, (4, row[0])).astype(param)

    def run(part):
        settings = {"axis": axis, "activation": "relu", "training": False, "threads": 2}
        more = {"residual": r[part]} if residual else {}
        forward = tfops_kernels.forward(x[part], scale, offset, mean, variance, **settings, **more)
        gradient = tfops_kernels.backward(dy[part], x[part], scale, offset, mean, variance, **settings, **more)
        return forward.y, gradient.x, gradient.residual if residual else gradient.x

    parts = [run(slice(begin, begin + rows // 5)) for begin in range(0, rows, rows // 5)]
    for part in (slice(None), slice(rows // 2)):
        for got, wanted in zip(run(part), zip(*parts, strict=True), strict=True):
            want = np.concatenate(wanted)[part]
            _assert_same_bits(got, want)


def _problem(x, axis, dtype, activation, has_residual, training):
    return kernel_cases.make_problem(
        _kernels, kernel_cases.Case(x.shape, axis, dtype, training, activation, has_residual)
    )


def _place(arrays, **places):
    """The arrays of a call, where the caller wants them: the callers of tfops_kernels cannot choose."""
    for name, array in places.items():
        setattr(arrays, name, array.ctypes.data)
    return arrays


def _assert_same_bits(got, want):
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), want.view(f"u{want.itemsize}"))


def _check_in_place(x, dy, residual, axis, dtype):
    """y and dx in the place of x and dy are bit for bit what they are elsewhere."""
    rng = np.random.default_rng(1)
    param = np.float64 if dtype == "float64" else np.float32
    scale, offset, mean, variance = vectors = rng.uniform(0.5, 2, (4, x.shape[axis])).astype(param)
    settings = {"axis": axis, "activation": "leaky_relu", "training": False, "threads": 2}
    more = {} if residual is None else {"residual": residual}
    want_y = tfops_kernels.forward(x, *vectors, **settings, **more).y
    want_dx = tfops_kernels.backward(dy, x, *vectors, **settings, **more).x

    problem = _problem(x, axis, dtype, "leaky_relu", has_residual=residual is not None, training=False)
    sums = [np.empty_like(scale) for _ in range(4)]
    given = {"x": x, "scale": scale, "offset": offset, "mean": mean} | more
    outputs = dict(zip(("dscale", "doffset", "dmean_in", "dvariance_in"), sums, strict=True))
    backward = _place(_kernels.BackwardArrays(), **given, variance=variance, dy=dy, dx=dy, **outputs)
    _kernels.cpu_backward(problem, backward, 2)
    _kernels.cpu_forward(problem, _place(_kernels.ForwardArrays(), **given, variance=variance, y=x), 2)
    _assert_same_bits(x, want_y)
    _assert_same_bits(dy, want_dx)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@LARGE
def test_in_place_larger_than_the_cache_has_the_same_bits(row, axis, dtype, residual):
    """What is written in an input's place does not go past the cache."""
    x, dy, r = (np.concatenate([array, array]) for array in _larger_than_the_cache(row, dtype))
    _check_in_place(x, dy, r if residual else None, axis, dtype)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("plane", [(3, 3), (7, 7), (5, 9), (14, 14), (11, 23), (27, 27)], ids=str)
def test_planes_in_place_have_the_same_bits(plane, dtype, residual):
    """The last vector of a plane overlaps the one before, and has to be read before that is written."""
    kind = kernel_cases.numpy_dtype(dtype)
    x, dy, r = np.random.default_rng(0).standard_normal((3, 6, 5, *plane)).astype(kind)
    _check_in_place(x, dy, r if residual else None, 1, dtype)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (8, 512), (301, 64), (77, 40), (130, 131), (2050, 24), (67, 2056)], ids=str)
def test_rows_in_place_have_the_same_bits(shape, dtype, residual):
    """Rows that go through tiles four at a time, some that are left, and what tiles leave of each."""
    kind = kernel_cases.numpy_dtype(dtype)
    x, dy, r = np.random.default_rng(0).standard_normal((3, *shape)).astype(kind)
    _check_in_place(x, dy, r if residual else None, -1, dtype)


@pytest.mark.parametrize("taker", ["dx", "dresidual"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("plane", [(3, 3), (7, 7), (5, 9), (11, 23)], ids=str)
def test_training_gradients_of_planes_in_place_have_the_same_bits(plane, dtype, activation, taker):
    """dx or dresidual in the place of dy, with a mask or without: of the last vector too, all is read in time."""
    kind = kernel_cases.numpy_dtype(dtype)
    param = np.float64 if dtype == "float64" else np.float32
    rng = np.random.default_rng(0)
    x, dy, residual = rng.standard_normal((3, 6, 5, *plane)).astype(kind)
    scale, offset = rng.uniform(0.5, 2, (2, 5)).astype(param)
    settings = {"axis": 1, "activation": activation, "threads": 2}
    forward = tfops_kernels.forward(x, scale, offset, residual=residual, **settings)
    statistics = {"mean": forward.saved_mean, "inv_std": forward.saved_inv_std}
    given = {"mask": forward.mask} if activation == "relu" else {"residual": residual}
    want = tfops_kernels.backward(
        *(dy, x, scale, offset, *statistics.values()), **{"residual": True, **given}, **settings
    )

    outputs = {name: np.empty_like(scale) for name in ("dscale", "doffset")}
    dx, dresidual = (dy, np.empty_like(dy)) if taker == "dx" else (np.empty_like(dy), dy)
    inputs = {"dy": dy, "x": x, "scale": scale, "offset": offset, **statistics}
    inputs |= {"activation_bits": forward.mask} if activation == "relu" else {"residual": residual}
    arrays = _place(_kernels.BackwardArrays(), **inputs, **outputs, dx=dx, dresidual=dresidual)
    _kernels.cpu_backward(_problem(x, 1, dtype, activation, has_residual=True, training=True), arrays, 2)
    _assert_same_bits(dx, want.x)
    _assert_same_bits(dresidual, want.residual)


@pytest.mark.parametrize("activation", ["", "relu"], ids=["no mask", "mask"])
@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "not wanted"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 7, 9, 24), -1), ((6, 24, 7, 9), 1), ((50, 131), -1)], ids=str)
def test_dresidual_is_written_if_it_is_wanted(shape, axis, dtype, wanted, activation):
    """And dx, in training, is the same whether it is, and whether the residual was only added."""
    kind = kernel_cases.numpy_dtype(dtype)
    param = np.float64 if dtype == "float64" else np.float32
    rng = np.random.default_rng(0)
    x, dy, residual = rng.standard_normal((3, *shape)).astype(kind)
    scale, offset = rng.uniform(0.5, 2, (2, shape[axis])).astype(param)
    settings = {"axis": axis, "activation": activation, "threads": 2}
    forward = tfops_kernels.forward(x, scale, offset, residual=residual, **settings)
    on = forward.y.astype(np.float64) > 0 if activation else np.ones(shape, bool)
    want_dresidual = np.where(on, dy, np.zeros_like(dy))
    statistics = {"mean": forward.saved_mean, "inv_std": forward.saved_inv_std}
    want = tfops_kernels.backward(want_dresidual, x, scale, offset, *statistics.values(), axis=axis, threads=2)

    dx, dresidual = np.empty_like(dy), np.full_like(dy, 7)
    vectors = {name: np.empty_like(scale) for name in ("dscale", "doffset")}
    places = {"dy": dy, "x": x, "scale": scale, "offset": offset, **statistics, **vectors, "dx": dx}
    if activation:
        places["activation_bits"] = forward.mask
    if wanted:
        places["dresidual"] = dresidual
    arrays = _place(_kernels.BackwardArrays(), **places)
    _kernels.cpu_backward(_problem(x, axis, dtype, activation, has_residual=True, training=True), arrays, 2)
    _assert_same_bits(dx, want.x)
    _assert_same_bits(dresidual, want_dresidual if wanted else np.full_like(dy, 7))


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@LARGE
@pytest.mark.usefixtures("_outputs")
def test_mask_larger_than_the_cache(row, axis, dtype):
    """Each bit stands where its element does, wherever the first whole cache line begins."""
    x, dy, r = _larger_than_the_cache(row, dtype)
    param = np.float64 if dtype == "float64" else np.float32
    scale, offset = np.random.default_rng(1).uniform(0.5, 2, (2, row[0])).astype(param)
    settings = {"axis": axis, "activation": "relu", "threads": 2}
    forward = tfops_kernels.forward(x, scale, offset, residual=r, **settings)
    on = forward.y > 0
    want = np.packbits(on.reshape(-1, row[-1] if axis == -1 else math.prod(row[1:])), axis=1, bitorder="little")
    np.testing.assert_array_equal(forward.mask, want.ravel())
    saved = (scale, offset, forward.saved_mean, forward.saved_inv_std)
    gradient = tfops_kernels.backward(dy, x, *saved, residual=True, mask=forward.mask, **settings)
    dz = np.where(on, dy, np.zeros_like(dy))
    np.testing.assert_array_equal(gradient.residual, dz)
    plain = tfops_kernels.backward(dz, x, *saved, axis=axis, threads=2)
    # The sums may be taken in another order: they differ in their last bits, and dx in its last one.
    np.testing.assert_allclose(gradient.scale, plain.scale, rtol=0, atol=1e-6 * np.abs(plain.scale).max())
    epsilon = 2.0**-7 if dtype == "bfloat16" else np.finfo(dtype).eps
    got, want = gradient.x.astype(param), plain.x.astype(param)
    np.testing.assert_allclose(got, want, rtol=epsilon, atol=8 * np.finfo(param).eps)


@pytest.mark.parametrize("shape", [(256, 3, 3), (2000, 2, 1, 2), (500, 5, 7), (100, 3, 5, 5)], ids=str)
def test_rounding_does_not_add_up_over_short_planes(shape):
    """Sums of a few values, again and again, round the same way each time: that adds up if they are long."""
    others = tuple(i for i in range(len(shape)) if i != 1)
    rng = np.random.default_rng(0)
    x = rng.choice(np.array([99.5, 100.5], np.float32), shape)
    x[0] = rng.choice(np.array([97.0, 97.4], np.float32), shape[1:])  # a first estimate of the mean, and a bad one
    ones = np.ones(shape[1], np.float32)
    got = tfops_kernels.forward(x, ones, ones, axis=1, unbiased=False)
    np.testing.assert_allclose(got.variance, x.astype(np.float64).var(others), rtol=3e-6)
    dy = rng.choice(np.array([1.1, 1.3], np.float32), shape)
    back = tfops_kernels.backward(dy, np.zeros_like(dy), ones, ones, -ones, ones, axis=1)
    for sums in (back.offset, back.scale):
        np.testing.assert_allclose(sums, dy.astype(np.float64).sum(others), rtol=5e-7)


# More than one work item each; folded, ragged and whole columns; planes.
SHAPES = [
    ((70000, 3), -1),
    ((5000, 65), -1),
    ((900, 600), -1),
    ((16, 24, 30, 31), 1),
    ((1, 2, 500, 501), 1),
    ((300001, 1), -1),
]


def _run(arrays, case, threads):
    forward = tfops_kernels.forward(
        arrays["x"],
        arrays["scale"],
        arrays["offset"],
        residual=arrays["residual"],
        axis=case.axis,
        activation="relu",
        threads=threads,
    )
    backward = tfops_kernels.backward(
        arrays["dy"],
        arrays["x"],
        arrays["scale"],
        arrays["offset"],
        forward.saved_mean,
        forward.saved_inv_std,
        residual=True,
        mask=forward.mask,
        axis=case.axis,
        activation="relu",
        threads=threads,
    )
    return [result.tobytes() for result in (*forward, *backward) if result is not None]


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_bits_are_the_same_for_any_threads_in_every_run(shape, axis, dtype):
    case = kernel_cases.Case(shape, axis, dtype)
    arrays = kernel_cases.inputs(case)
    want = _run(arrays, case, 1)
    for threads in (1, 2, 3, 8):
        assert _run(arrays, case, threads) == want, f"{threads} threads"


def test_layouts_agree():
    """NHWC and NCHW sum in different orders, so they may differ in the last bits, and in no more."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 20, 21, 24)).astype(np.float32) + 3
    scale, offset = rng.uniform(0.5, 2, (2, 24)).astype(np.float32)
    nhwc = tfops_kernels.forward(x, scale, offset)
    nchw = tfops_kernels.forward(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), scale, offset, axis=1)
    np.testing.assert_allclose(nchw.mean, nhwc.mean, rtol=2**-22)
    np.testing.assert_allclose(nchw.variance, nhwc.variance, rtol=2**-20)
    np.testing.assert_allclose(nchw.y.transpose(0, 2, 3, 1), nhwc.y, rtol=2**-20, atol=2**-19)


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


@pytest.mark.parametrize("training", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dresidual_is_rounded_to_nearest_even(dtype, activation, training):
    """Every dy comes through where the slope is 1; elsewhere it is 0, or dy times a slope, of which few are exact."""
    kind = kernel_cases.numpy_dtype(dtype)
    dy = np.arange(2**16, dtype=np.uint16).view(kind).reshape(-1, 64)
    x = np.where(np.random.default_rng(0).random(dy.shape) < 0.5, 1, -1).astype(kind)
    ones, zeros = np.ones(64, np.float32), np.zeros(64, np.float32)
    settings = {"residual": x, "activation": activation, "training": training}
    gradient = functools.partial(tfops_kernels.backward, dy, x, ones, zeros)
    if training:
        forward = tfops_kernels.forward(x, ones, zeros, **settings)
        got = gradient(forward.saved_mean, forward.saved_inv_std, mask=forward.mask, **settings).residual
    else:
        got = gradient(zeros, ones, **settings).residual
    slope = np.float32(0.2) if activation == "leaky_relu" else np.float32(0)
    with np.errstate(invalid="ignore"):
        want = np.where(x > 0, dy, (dy.astype(np.float32) * slope).astype(kind) if slope else np.zeros_like(dy))
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_nan_stays_nan(dtype):
    """A NaN of any bits, in parameters and in data, is not rounded to a number, and touches no other channel."""
    words = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0]
    with np.errstate(invalid="ignore"):
        offset = np.array(words, np.uint32).view(np.float32).astype(np.float64 if dtype == "float64" else np.float32)
    ones, zeros = np.ones_like(offset), np.zeros_like(offset)
    x = np.zeros((33, len(words)), kernel_cases.numpy_dtype(dtype))
    y = tfops_kernels.forward(x, ones, offset, zeros, ones, training=False).y.astype(np.float32)
    assert np.isnan(y[:, :-1]).all()
    assert (y[:, -1] == 0).all()

    if x.itemsize == 2:
        dy = np.resize(np.arange(2**16, dtype=np.uint16).view(x.dtype), (2**12, 16))
        vectors = np.ones((4, 16), np.float32)
        x = np.ones_like(dy)
        gradient = tfops_kernels.backward(dy, x, *vectors, residual=x, activation="relu", training=False)
        np.testing.assert_array_equal(gradient.residual.astype(np.float32), dy.astype(np.float32))


# All tests of another choice of kernels, or a sample of them.
SAMPLES = [pytest.param(12, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)]


BUILD = tfops_kernels.build_info()
OTHER_LEVELS = [level for level in BUILD["cpu_instruction_sets"].split() if level != BUILD["cpu_instruction_set"]]


@pytest.mark.parametrize("level", OTHER_LEVELS)
@pytest.mark.parametrize("every", SAMPLES)
def test_all_levels_of_instruction_sets_pass(level, every):
    """This file and the CPU's phases by themselves, with the kernels of another instruction set."""
    run = functools.partial(run_python, TFOPS_CPU=level)
    chosen = run("-c", "import tfops_kernels; print(tfops_kernels.build_info()['cpu_instruction_set'])").stdout
    if chosen.strip() != level:
        pytest.skip(f"this machine has no {level}")
    phases = str(Path(__file__).with_name("test_phases.py"))
    selected = ("-k", "not levels and not streams and not by_simt", f"--every={every}")
    tests = run("-m", "pytest", "-q", *selected, "-p", "no:cacheprovider", __file__, phases)
    assert tests.returncode == 0, tests.stdout


@pytest.mark.parametrize("streams", ["few", "many"])
@pytest.mark.parametrize("every", SAMPLES)
def test_few_and_many_streams_pass(streams, every):
    """Past the cache memory is read and written in few streams or in many, as suits the core: both do everywhere."""
    tests = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--every={every}", __file__),
        *("-k", "larger_than_the_cache and not unaligned and not 131 and not 2056"),
        TFOPS_CPU_STREAMS=streams,
    )
    assert tests.returncode == 0, tests.stdout
