"""The CPU kernels where y alone is kept: gradients within the stated bounds, bitwise reproducible, and refusals."""

from __future__ import annotations

import numpy as np
import pytest

import tfops_kernels
from tfops_testing import in_place_cases, kernel_cases
from tfops_testing.kernel_cases import Case


def _identity(array):
    return array


@pytest.mark.parametrize("case", in_place_cases.random_cases(seed=1), ids=str)
def test_shapes(case):
    in_place_cases.check(case, _identity, _identity, threads=2)


@pytest.mark.parametrize(("shape", "axis"), [((50, 3, 23), -1), ((3, 37, 5, 5), 1), ((640, 64), -1)], ids=str)
def test_combinations(shape, axis):
    for case in in_place_cases.combinations(shape, axis):
        in_place_cases.check(case, _identity, _identity)


@pytest.mark.parametrize("activation", in_place_cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((700, 300), -1), ((4, 48, 33, 31), 1), ((100000, 3), -1)], ids=str)
def test_threads_and_arrays_do_not_matter(shape, axis, dtype, activation):
    """To the last bit: for any number of threads, and for dx in dy's array."""
    arrays = kernel_cases.inputs(Case(shape, axis, dtype))
    settings = {"axis": axis, "activation": activation, "in_place": True}
    vectors = arrays["scale"], arrays["offset"]
    forward = tfops_kernels.forward(arrays["x"], *vectors, **settings)
    saved = forward.saved_mean, forward.saved_inv_std
    results = [
        tfops_kernels.backward(arrays["dy"], forward.y, *vectors, *saved, **settings, threads=threads)
        for threads in (1, 2, 5)
    ]
    for result in results[1:]:
        for got, want in zip(result[:3], results[0][:3], strict=True):
            np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("activation", in_place_cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((50, 24), -1), ((3, 7, 40), 1)], ids=str)
def test_scale_near_zero_is_refused(shape, axis, dtype, activation):
    case = Case(shape, axis, dtype, activation=activation)
    arrays = in_place_cases.refused(case)
    settings = {"axis": axis, "activation": activation, "in_place": True}
    with pytest.raises(
        ValueError, match=r"^scale is too near 0 for in_place, .* in channel 1 it is 0, and offset is 1$"
    ):
        tfops_kernels.forward(arrays["x"], arrays["scale"], arrays["offset"], **settings)
    in_place_cases.check_refusal(case, _identity, tfops_kernels)
    arrays["scale"][[1, 3, 4]] = 1
    tfops_kernels.forward(arrays["x"], arrays["scale"], arrays["offset"], **settings)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_nan_is_not_refused(dtype):
    """A training that has failed goes on, and shows it."""
    arrays = kernel_cases.inputs(Case((50, 3), -1, dtype))
    arrays["scale"][1] = arrays["offset"][2] = np.nan
    forward = tfops_kernels.forward(arrays["x"], arrays["scale"], arrays["offset"], in_place=True)
    saved = forward.saved_mean, forward.saved_inv_std
    gradient = tfops_kernels.backward(arrays["dy"], forward.y, arrays["scale"], arrays["offset"], *saved, in_place=True)
    assert np.isnan(gradient.x.astype(np.float64)).any(0).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_elu_that_has_rounded_to_minus_one_has_finite_gradients(dtype):
    x = np.linspace(-1, 1, 2001)[:, None].astype(kernel_cases.numpy_dtype(dtype))
    param = np.float64 if dtype == "float64" else np.float32
    scale, offset = np.full(1, 60, param), np.full(1, -40, param)
    forward = tfops_kernels.forward(x, scale, offset, activation="elu", in_place=True)
    assert (forward.y == -1).any()
    saved = forward.saved_mean, forward.saved_inv_std
    gradient = tfops_kernels.backward(x, forward.y, scale, offset, *saved, activation="elu", in_place=True)
    assert all(np.isfinite(each.astype(np.float64)).all() for each in gradient[:3])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"training": False}, "in_place must be False in inference, but it is True"),
        ({"residual": True}, "in_place must be False where there is a residual, but it is True"),
        (
            {"activation": "relu"},
            "activation must be one of '', 'leaky_relu', 'elu' where in_place is True, but it is 'relu'",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(keywords, message):
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    if "residual" in keywords:
        keywords = {"residual": x}
    with pytest.raises(ValueError, match=f"^{message}$"):
        tfops_kernels.forward(x, v, v, v, v, **keywords, in_place=True)
