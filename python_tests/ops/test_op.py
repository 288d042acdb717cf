"""tfops.fused_batch_norm agrees with TensorFlow's own batch norm and with float64 NumPy: outputs and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing import kernel_cases, oracle
from tfops_testing.op_cases import make_problem, parameter_type, to_float64

CHANNELS = (1, 3, 7, 24, 65, 129, 2049)
DTYPES = (tf.float32, tf.float16, tf.bfloat16, tf.float64)


def _errors(got, want):
    return [float(np.max(np.abs(to_float64(g) - w))) if w.size else 0.0 for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16], ids=lambda d: d.name)
@pytest.mark.parametrize("channels", CHANNELS)
def test_no_worse_than_tensorflow(channels, dtype, is_training, data_format):
    """The error against float64 is at most twice that of TensorFlow's fused op (NHWC only), or 2 ulp."""
    shape = (3, 4, 5, channels) if data_format == "NHWC" else (3, channels, 4, 5)
    axis = -1 if data_format == "NHWC" else 1
    x, scale, offset, mean, variance, _ = make_problem(shape, axis, dtype)
    statistics = {} if is_training else {"mean": mean, "variance": variance}
    ours = tfops.fused_batch_norm(x, scale, offset, **statistics, data_format=data_format, is_training=is_training)
    nhwc = x if data_format == "NHWC" else tf.transpose(x, [0, 2, 3, 1])
    theirs = tf.compat.v1.nn.fused_batch_norm(nhwc, scale, offset, **statistics, is_training=is_training)
    if data_format == "NCHW":
        theirs = (tf.transpose(theirs[0], [0, 3, 1, 2]), *theirs[1:])
    want = oracle.forward(
        to_float64(x),
        scale,
        offset,
        *((mean, variance) if statistics else ()),
        axis=axis,
        epsilon=float(np.float32(0.001)),
        training=is_training,
    )[:3]
    for name, our_error, their_error, w in zip(
        ("y", "mean", "variance"), _errors(ours, want), _errors(theirs, want), want, strict=True
    ):
        rounding = kernel_cases.ROUNDING[dtype.name if name == "y" else "float32"] * np.abs(w).max()
        assert our_error <= max(2 * their_error, 4 * rounding), (
            f"{name}: {our_error} against TensorFlow's {their_error}"
        )


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5)], ids=lambda s: f"rank{len(s)}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_batch_normalization_of_every_rank_and_axis(shape, dtype):
    for axis in range(-len(shape), len(shape)):
        x, scale, offset, mean, variance, _ = make_problem(shape, axis, dtype)
        y, new_mean, new_variance = tfops.fused_batch_norm(
            x, scale, offset, mean, variance, is_training=False, axis=axis, epsilon=0.0078125
        )
        vector = [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
        wide = tf.cast(x, parameter_type(dtype))
        want = tf.nn.batch_normalization(
            wide, *(tf.reshape(v, vector) for v in (mean, variance, offset, scale)), variance_epsilon=0.0078125
        )
        tolerance = 4 * kernel_cases.ROUNDING[dtype.name]
        np.testing.assert_allclose(
            to_float64(y), to_float64(want), rtol=tolerance, atol=8 * max(tolerance, 1e-7 * (tolerance > 1e-9))
        )
        np.testing.assert_array_equal(new_mean, mean)
        np.testing.assert_array_equal(new_variance, variance)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", kernel_cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_reference_agrees(dtype, activation, residual, training):
    for shape, axis in (((5, 6, 23), -1), ((4, 23, 3, 3), 1)):
        x, scale, offset, mean, variance, r = make_problem(shape, axis, dtype)
        arguments = (x, scale, offset, mean, variance)
        settings = {
            "axis": axis,
            "activation": activation,
            "residual": r if residual else None,
            "is_training": training,
            "exponential_avg_factor": 0.25,
            "unbiased": False,
        }
        fused = tfops.fused_batch_norm(*arguments, **settings)
        plain = tfops.reference.fused_batch_norm(*arguments, **settings)
        for name, got, want in zip(("y", "mean", "variance"), fused, plain, strict=True):
            assert got.dtype == want.dtype
            # epsilon is a float32 attribute: 5e-8 of 1e-3
            rounding = max(kernel_cases.ROUNDING[got.dtype.name], 1e-10)
            np.testing.assert_allclose(
                to_float64(got), to_float64(want), rtol=4 * rounding, atol=64 * rounding, err_msg=name
            )


def test_calls_of_tensorflows_op_mean_the_same():
    """Every call of TensorFlow's op, positional and by keyword, means the same."""
    x, scale, offset, mean, variance, _ = make_problem((4, 5, 6, 7), -1, tf.float32)
    calls = [
        ((x, scale, offset), {}),
        ((x, scale, offset, None, None, 0.01, "NHWC", True, "bn"), {}),
        ((x, scale, offset, mean, variance, 0.01, "NHWC", False), {}),
        ((x, scale, offset, mean, variance), {"is_training": True, "exponential_avg_factor": 0.1}),
        ((x[None], scale, offset), {"data_format": "NDHWC"}),
    ]
    for args, kwargs in calls:
        ours = tfops.fused_batch_norm(*args, **kwargs)
        theirs = tf.compat.v1.nn.fused_batch_norm(*args, **kwargs)
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_numpy_arrays_lists_and_variables_are_taken():
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    want, _, _ = tfops.fused_batch_norm(tf.constant(x), tf.constant([1.0, 2.0, 3.0]), tf.zeros(3))
    got, _, _ = tfops.fused_batch_norm(x, [1, 2, 3], np.zeros(3, np.float32))
    variable, _, _ = tfops.fused_batch_norm(tf.Variable(x), tf.Variable([1.0, 2.0, 3.0]), tf.Variable([0.0, 0.0, 0.0]))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(variable, want)


def test_inputs_are_left_alone():
    """Outputs may live in inputs' buffers only where nobody else holds those."""
    x, scale, offset, mean, variance, residual = make_problem((64, 64, 16), -1, tf.float32)
    before = [t.numpy().copy() for t in (x, residual)]
    for training in (True, False):
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y, _, _ = tfops.fused_batch_norm(
                x, scale, offset, mean, variance, is_training=training, residual=residual, activation="relu"
            )
        dy = tf.ones_like(y)
        tape.gradient(y, [x, residual], dy)
        np.testing.assert_array_equal(x, before[0])
        np.testing.assert_array_equal(residual, before[1])
        np.testing.assert_array_equal(dy, np.ones(dy.shape))
