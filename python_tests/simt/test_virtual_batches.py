"""Virtual batches in the CUDA kernels, run on the CPU by csrc/simt."""

from __future__ import annotations

import numpy as np
import pytest

from tfops_testing import kernel_cases, virtual_batches
from tfops_testing.kernel_cases import Case

SHAPES = [
    ((780, 64), -1, 390),
    ((1026, 24), -1, 513),
    ((408, 65), -1, 136),
    ((1104, 7), -1, 368),
    ((8, 6, 16, 16), 1, 2),
    ((6, 3, 40, 41), 1, 2),
    ((64, 9, 8), 1, 32),
    ((4096, 1), -1, 512),
]


def _check(simt, case, size):
    return virtual_batches.check(case, size, simt.place, np.asarray, kernels=simt)


@pytest.mark.parametrize(("case", "size"), virtual_batches.cases(seed=3), ids=str)
def test_shapes(simt, case, size):
    for seed, device in enumerate(("h200", "small", "v100")):
        simt.configure(device, seed=seed, offset=seed % 2)
        _check(simt, case, size)


def _can_be_had(simt, shape, **settings):
    """Whether the tier that is forced can."""
    try:
        simt._api.cuda_plan(shape, **settings)
    except ValueError as error:
        if "is forced, and cannot be had" in str(error):
            return False
        raise
    return True


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("tier", ["one_block", "cluster", "streaming"])
def test_every_tier_agrees_with_numpy(simt, tier, shape, axis, size, dtype):
    for i, (activation, residual) in enumerate([("relu", True), ("silu", True), ("leaky_relu", False)]):
        simt.configure("h200" if i == 0 else "three", seed=i, offset=i % 2 if tier == "streaming" else 0)
        with simt.settings(tier=tier):
            if not _can_be_had(simt, shape, axis=axis, dtype=dtype, residual=residual, virtual_batch_size=size):
                assert shape != SHAPES[0][0]
                continue
            _check(simt, Case(shape, axis, dtype, True, activation, residual, exponential_avg_factor=0.25), size)


def test_grid_is_not_offered(simt, force):
    force(simt, tier="grid")
    with pytest.raises(ValueError, match="the blocks of all virtual batches would have to be resident at once"):
        _check(simt, Case((780, 64), -1, "float32"), 390)


def test_more_than_a_launch_can_be_over(simt, force):
    """Streaming then takes several launches, of 65535 virtual batches at most."""
    assert simt._api.cuda_plan([65536 * 8, 64], virtual_batch_size=8).tier == "streaming"
    force(simt, tier="one_block")
    assert simt._api.cuda_plan([65535 * 8, 64], virtual_batch_size=8).tier == "one_block"
    with pytest.raises(ValueError, match="the tier one_block is forced, and cannot be had"):
        simt._api.cuda_plan([65536 * 8, 64], virtual_batch_size=8)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_empty(simt, shape):
    simt.configure("three")
    x, ones = simt.place(np.zeros(shape, np.float32)), simt.place(np.ones(3, np.float32))
    settings = {"axis": 1 if shape[1] == 3 else -1, "virtual_batch_size": 2, "exponential_avg_factor": 0.5}
    forward = simt.forward(x, ones, ones, ones, ones, **settings)
    np.testing.assert_array_equal(forward.mean, 1)
    np.testing.assert_array_equal(forward.variance, 1)
    assert forward.saved_mean.shape == (shape[0] // 2, 3)
    gradient = simt.backward(x, x, ones, ones, forward.saved_mean, forward.saved_inv_std, **settings)
    np.testing.assert_array_equal(gradient.scale, 0)
    np.testing.assert_array_equal(gradient.offset, 0)


@pytest.mark.parametrize(("shape", "axis", "size"), [((1500, 40), -1, 500), ((6, 24, 10, 10), 1, 2)], ids=str)
def test_order_of_threads_does_not_matter(simt, shape, axis, size):
    results = []
    for seed in range(3):
        simt.configure("small", seed=seed)
        forward, backward, _ = _check(simt, Case(shape, axis, "float32", True, "relu", True), size)
        results.append([np.asarray(a).tobytes() for a in (*forward, *backward) if a is not None])
    assert results[0] == results[1] == results[2]
