"""Virtual batches on the CPU, on NumPy arrays and without TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest

import tfops_kernels
from tfops_testing import virtual_batches
from tfops_testing.kernel_cases import Case


def _identity(array):
    return array


def _ids(value):
    return str(value)


@pytest.mark.parametrize(("case", "size"), virtual_batches.cases(seed=1), ids=_ids)
def test_each_is_normalized_by_itself(case, size):
    """Against the oracle; and bit for bit what calls for each virtual batch return, for any number of threads."""
    forward, backward, arrays = virtual_batches.check(case, size, _identity, _identity, threads=3)
    settings = {**virtual_batches.settings_of(case), "exponential_avg_factor": 1.0}
    vectors = (arrays["scale"], arrays["offset"])
    statistics = []
    for k in range(case.shape[0] // size):
        part = slice(k * size, (k + 1) * size)
        more = {"residual": arrays["residual"][part]} if case.residual else {}
        one = tfops_kernels.forward(arrays["x"][part], *vectors, **settings, **more)
        np.testing.assert_array_equal(forward.y[part], one.y)
        np.testing.assert_array_equal(forward.saved_mean[k], one.saved_mean)
        np.testing.assert_array_equal(forward.saved_inv_std[k], one.saved_inv_std)
        statistics.append(one)
        if case.exponential_avg_factor == 1:  # else the gradient is also that of the returned statistics
            saved = (one.saved_mean, one.saved_inv_std)
            gradient = tfops_kernels.backward(
                arrays["dy"][part], arrays["x"][part], *vectors, *saved, **settings, **more, mask=one.mask
            )
            np.testing.assert_array_equal(backward.x[part], gradient.x)
    if forward.mask is not None:
        np.testing.assert_array_equal(forward.mask, np.concatenate([one.mask for one in statistics]))


@pytest.mark.parametrize(("case", "size"), virtual_batches.cases(seed=2, shapes=virtual_batches.LARGE), ids=_ids)
def test_many_items(case, size):
    """Where each virtual batch is shared out among threads; results do not depend on these."""
    results = [virtual_batches.check(case, size, _identity, _identity, threads=threads)[:2] for threads in (1, 4)]
    for one, other in zip(*([each for pair in result for each in pair] for result in results), strict=True):
        assert one is other or one.tobytes() == other.tobytes()


def test_one_virtual_batch_is_the_batch():
    case = Case((24, 5, 6), -1, "float32", True, "relu", True)
    forward, backward, arrays = virtual_batches.check(case, 24, _identity, _identity)
    settings = {**virtual_batches.settings_of(case), "residual": arrays["residual"]}
    vectors = (arrays["scale"], arrays["offset"])
    plain = tfops_kernels.forward(arrays["x"], *vectors, **settings)
    for one, other in zip(forward, plain, strict=True):
        assert one.tobytes() == other.tobytes()
    saved = (plain.saved_mean, plain.saved_inv_std)
    gradient = tfops_kernels.backward(arrays["dy"], arrays["x"], *vectors, *saved, **settings, mask=plain.mask)
    for one, other in zip(backward, gradient, strict=True):
        assert one is other or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_empty(shape):
    """The running statistics stay as they are; there is a row of saved ones for each virtual batch."""
    x, ones = np.zeros(shape, np.float32), np.ones(3, np.float32)
    settings = {"axis": 1 if shape[1] == 3 else -1, "virtual_batch_size": 2}
    forward = tfops_kernels.forward(x, ones, ones, 2 * ones, 3 * ones, exponential_avg_factor=0.5, **settings)
    np.testing.assert_array_equal(forward.mean, 2 * ones)
    np.testing.assert_array_equal(forward.variance, 3 * ones)
    assert forward.saved_mean.shape == (shape[0] // 2, 3)
    saved = (forward.saved_mean, forward.saved_inv_std)
    gradient = tfops_kernels.backward(x, x, ones, ones, *saved, exponential_avg_factor=0.5, **settings)
    np.testing.assert_array_equal(gradient.scale, 0 * ones)
    np.testing.assert_array_equal(gradient.offset, 0 * ones)


def test_no_effect_in_inference():
    x, ones = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(3, np.float32)
    plain = tfops_kernels.forward(x, ones, ones, ones, ones, training=False)
    ghost = tfops_kernels.forward(x, ones, ones, ones, ones, training=False, virtual_batch_size=3)
    np.testing.assert_array_equal(ghost.y, plain.y)


def test_errors_name_the_argument():
    x, ones = np.ones((8, 3), np.float32), np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"virtual_batch_size must divide the batch, .* it is 3, .* has 8 entries"):
        tfops_kernels.forward(x, ones, ones, virtual_batch_size=3)
    with pytest.raises(ValueError, match=r"virtual_batch_size must be > 0 or None, but it is -2"):
        tfops_kernels.forward(x, ones, ones, virtual_batch_size=-2)
    with pytest.raises(ValueError, match=r"virtual_batch_size must be 0 where the channels are dimension 0"):
        tfops_kernels.forward(x, np.ones(8, np.float32), np.ones(8, np.float32), axis=0, virtual_batch_size=2)
    with pytest.raises(ValueError, match=r"mean must have shape \(4, 3\), but it has \(3,\)"):
        tfops_kernels.backward(x, x, ones, ones, ones, ones, virtual_batch_size=2)
