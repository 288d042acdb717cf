"""The CUDA kernels, run on the CPU by csrc/simt, agree with float64 NumPy, whatever the GPU and the threads' order."""

from __future__ import annotations

import re
import subprocess
import zlib

import numpy as np
import pytest

from tfops_testing import kernel_cases, virtual_batches
from tfops_testing.kernel_cases import Case
from tfops_testing.phase_cases import assert_simt_agrees
from tfops_testing.simt import BUILD

# Of csrc/simt/runtime.cc. On the small ones, small tensors are as large as large ones on the others.
DEVICES = ("h200", "three", "one", "small", "small_old", "a100", "b200", "rtx", "v100")
TIERS = ("one_block", "cluster", "grid", "streaming")
SIZES = (1, 3, 7, 24, 65, 129, 2049)


def _check(simt, case: Case) -> None:
    kernel_cases.check(case, simt.place, np.asarray, kernels=simt)


@pytest.mark.parametrize("case", kernel_cases.random_cases(seed=3, count=8), ids=str)
def test_shapes(simt, case):
    devices = np.random.default_rng(zlib.crc32(str(case).encode())).permutation(DEVICES)[:3]
    for seed, device in enumerate(devices):
        simt.configure(str(device), seed=seed)
        _check(simt, case)


@pytest.mark.parametrize("case", kernel_cases.random_cases(seed=4, count=4), ids=str)
def test_unaligned(simt, case):
    """Arrays aligned to their elements, and no more."""
    simt.configure("three", offset=1)
    _check(simt, case)
    simt.configure("small", offset=1)
    _check(simt, case)


@pytest.mark.parametrize("device", ["three", "small", "small_old"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((50, 3, 23), -1), ((64, 32), -1), ((600, 64), -1), ((3, 37, 5, 5), 1), ((4, 6, 16, 16), 1)],
    ids=str,
)
def test_combinations(simt, shape, axis, device):
    simt.configure(device)
    for case in kernel_cases.combinations(shape, axis):
        _check(simt, case)


@pytest.mark.parametrize("tier", ["one_block", "streaming"])
@pytest.mark.parametrize(("shape", "axis"), [((65, 24), -1), ((3, 5, 4, 8), 1)], ids=str)
def test_smooth_activations(simt, force, tier, shape, axis):
    simt.configure("three")
    for case in kernel_cases.smooth(shape, axis):
        force(simt, tier=tier if case.training else "")
        _check(simt, case)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((390, 64), -1), ((513, 24), -1), ((136, 65), -1), ((1104, 7), -1), ((4, 6, 16, 16), 1), ((2, 3, 40, 41), 1)],
    ids=str,
)
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_agrees_with_numpy(simt, force, tier, shape, axis, dtype):
    """Each tier, chosen or not, with activations of each kind; streaming with unaligned arrays too."""
    force(simt, tier=tier)
    for i, activation in enumerate((*kernel_cases.COMMON, "hard_silu")):
        for residual in (False, True):
            simt.configure("h200" if i == 0 else "three", seed=i, offset=i % 2 if tier == "streaming" else 0)
            _check(simt, Case(shape, axis, dtype, True, activation, residual))


@pytest.mark.parametrize("device", ["one", "small"])
@pytest.mark.parametrize("size", SIZES)
def test_ragged_sizes(simt, size, device):
    """Every size as the number of rows, of channels and of pixels."""
    shapes = [((size, 5), -1), ((19, size), -1), ((2, size, 3), 1), ((3, 2, size), 1), ((size, 2, 9), 1)]
    activations = kernel_cases.ACTIVATIONS
    for i, (shape, axis) in enumerate(shapes):
        simt.configure(device, seed=i, offset=i % 2)
        for j, dtype in enumerate(kernel_cases.DTYPES):
            _check(simt, Case(shape, axis, dtype, True, activations[(i + j) % len(activations)], bool((i + j) % 2)))


def _forward(simt, case: Case, arrays: dict[str, np.ndarray]):
    placed = {name: simt.place(array) for name, array in arrays.items()}
    residual = {"residual": placed["residual"]} if case.residual else {}
    settings = {"axis": case.axis, "activation": case.activation, "training": case.training}
    forward = simt.forward(placed["x"], placed["scale"], placed["offset"], **settings, **residual)
    saved = (forward.saved_mean, forward.saved_inv_std)
    backward = simt.backward(
        placed["dy"], placed["x"], placed["scale"], placed["offset"], *saved, **settings, **residual, mask=forward.mask
    )
    return [a.tobytes() for a in (*forward, *backward) if a is not None]


@pytest.mark.parametrize("device", ["h200", "three", "small"])
@pytest.mark.parametrize(("shape", "axis"), [((1500, 40), -1), ((5, 24, 10, 10), 1), ((4, 3, 64, 64), 1)], ids=str)
def test_order_of_threads_does_not_matter(simt, shape, axis, device):
    """To the last bit, for each seed has the threads run in an order of its own."""
    case = Case(shape, axis, "float32", True, "relu", residual=True)
    arrays = kernel_cases.inputs(case)
    results = []
    for seed in range(4):
        simt.configure(device, seed=seed)
        results.append(_forward(simt, case, arrays))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("device", ["three", "small", "small_old"])
@pytest.mark.parametrize(("shape", "axis"), [((0, 5), -1), ((0, 3, 4), 1), ((2, 3, 0), 1), ((4, 0), -1)], ids=str)
def test_empty_tensors_keep_statistics(simt, shape, axis, device):
    simt.configure(device)
    case = Case(shape, axis, "float32")
    arrays = {name: simt.place(array) for name, array in kernel_cases.inputs(case).items()}
    vectors = (arrays["scale"], arrays["offset"], arrays["mean"], arrays["variance"])
    forward = simt.forward(arrays["x"], *vectors, axis=axis, exponential_avg_factor=0.5)
    assert forward.y.shape == shape
    np.testing.assert_array_equal(forward.mean, arrays["mean"])
    np.testing.assert_array_equal(forward.variance, arrays["variance"])
    saved = (forward.saved_mean, forward.saved_inv_std)
    backward = simt.backward(arrays["dy"], arrays["x"], *vectors[:2], *saved, axis=axis)
    assert not backward.scale.any()
    assert not backward.offset.any()


@pytest.mark.parametrize("device", ["h200", "three", "small", "small_old"])
@pytest.mark.parametrize(("shape", "axis"), [((3000, 8), -1), ((3, 4, 31, 33), 1), ((200, 65), -1)], ids=str)
@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-5), (1e5, 1e-3)])
def test_large_means_keep_the_stated_bounds(simt, shape, axis, device, ratio, bound):
    """The stated bound on the variance's error."""
    simt.configure(device)
    case = Case(shape, axis, "float32")
    arrays = kernel_cases.inputs(case, mean_over_std=ratio)
    x = simt.place(arrays["x"])
    got = simt.forward(x, simt.place(arrays["scale"]), simt.place(arrays["offset"]), axis=axis, unbiased=False).variance
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    want = x.astype(np.float64).var(others)
    assert (np.abs(got - want) <= bound * want).all()


@pytest.mark.parametrize("device", ["three", "small", "small_old"])
@pytest.mark.parametrize(("shape", "axis"), [((300, 24), -1), ((3, 7, 40), 1)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_channel_spoils_no_other(simt, shape, axis, device, value):
    simt.configure(device)
    case = Case(shape, axis, "float32", True, "relu")
    arrays = kernel_cases.inputs(case)
    spoiled = 5
    np.moveaxis(arrays["x"], axis, 0)[spoiled].flat[17] = value
    x, scale, offset, dy = (simt.place(arrays[name]) for name in ("x", "scale", "offset", "dy"))
    forward = simt.forward(x, scale, offset, axis=axis, activation="relu")
    saved = (forward.saved_mean, forward.saved_inv_std)
    backward = simt.backward(dy, x, scale, offset, *saved, axis=axis, activation="relu")
    for array in (forward.y, backward.x):
        finite = np.isfinite(np.moveaxis(array, axis, 0).reshape(shape[axis], -1)).all(1)
        assert finite[np.arange(shape[axis]) != spoiled].all()
    np.testing.assert_array_equal(forward.mean[spoiled], value)
    assert np.isnan(forward.variance[spoiled])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("shape", "axis"), [((300, 24), -1), ((4, 6, 9, 16), 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_mean_of_infinities_is_that_of_numpy(simt, force, shape, axis, dtype, tier):
    """Wherever they lie, and however many: that infinity, or NaN of both signs."""
    force(simt, tier=tier)
    simt.configure("three")
    arrays = kernel_cases.inputs(Case(shape, axis, dtype))
    by_channel = np.moveaxis(arrays["x"], axis, 0)
    for c in range(shape[axis]):
        of_channel = by_channel[c].flat
        last = len(of_channel) - 1
        for place in ([0], [last], [0, last], [last // 2, 0, 1, 2, 3, 4, 5, 6, 7])[c % 4]:
            of_channel[place] = np.inf if c % 3 else -np.inf
        if c % 5 == 4:
            of_channel[last // 3] = -np.inf if c % 3 else np.inf
    with np.errstate(invalid="ignore"):
        want = by_channel.astype(np.float64).reshape(shape[axis], -1).mean(1)
    placed = [simt.place(arrays[name]) for name in ("x", "scale", "offset")]
    got = simt.forward(*placed, axis=axis)
    np.testing.assert_array_equal(got.mean, want)
    assert np.isnan(got.variance).all()
    assert np.isnan(got.y.astype(np.float32)).all()


def test_every_kernel_ran(simt, force):
    """Every instantiation of every kernel in the library takes part in some case, and so in a comparison."""
    symbols = subprocess.run(["nm", "-DC", BUILD / "plain/_kernels.so"], capture_output=True, text=True)
    wanted = set(re.findall(r"void tfops::cuda::(\w+Kernel<[^()]*>)\(", symbols.stdout))
    assert wanted
    simt.machine.take_reports()
    for tier in TIERS:
        force(simt, tier=tier)
        for shape, axis in [((300, 64), -1), ((4, 6, 16, 16), 1)]:
            for offset in (0, 1) if tier == "streaming" else (0,):
                simt.configure("three", offset=offset)
                for dtype in kernel_cases.DTYPES:
                    _check(simt, Case(shape, axis, dtype, activation="relu", residual=True))
    for dtype in kernel_cases.DTYPES:
        assert_simt_agrees(simt, (300, 64), -1, dtype, "three")
        case = Case((300, 64), -1, dtype, activation="relu", residual=True)
        with simt.settings(tier="streaming"):
            virtual_batches.check(case, 100, simt.place, np.asarray, kernels=simt)
    ran = {report["kernel"] for report in simt.machine.take_reports()}
    assert not wanted - ran
