"""Edges are defined: empty batches, single elements, non-finite data, bad arguments."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

import tfops
import tfops_kernels
from tfops import _phases
from tfops_testing import kernel_cases, oracle

INVALID = (ValueError, tf.errors.InvalidArgumentError)
DTYPES = (tf.float32, tf.float16, tf.bfloat16, tf.float64)


def _param(dtype):
    return tf.float64 if dtype == tf.float64 else tf.float32


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 3, 4), (5, 0, 4), (2, 4, 0), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_empty_batch_keeps_statistics_and_has_zero_gradients(dtype, shape):
    axis = 1 if shape[-1] != 4 else -1
    param = _param(dtype)
    x = tf.zeros(shape, dtype)
    scale, offset, mean, variance = (tf.cast(tf.range(1.0, 5.0) * k, param) for k in (1, 2, 3, 4))
    for kwargs in ({}, {"activation": "relu", "residual": x}):
        for is_training in (True, False):
            variables = [x, scale, offset, mean, variance]
            with tf.GradientTape() as tape:
                tape.watch(variables)
                y, new_mean, new_variance = tfops.fused_batch_norm(
                    *variables, is_training=is_training, axis=axis, exponential_avg_factor=0.25, **kwargs
                )
            assert y.shape == shape
            np.testing.assert_array_equal(new_mean, mean)
            np.testing.assert_array_equal(new_variance, variance)
            for variable, gradient in zip(variables, tape.gradient(y, variables), strict=True):
                np.testing.assert_array_equal(gradient, np.zeros(variable.shape))
    _, new_mean, new_variance = tfops.fused_batch_norm(x, scale, offset, axis=axis)
    np.testing.assert_array_equal(new_mean, np.zeros(4))
    np.testing.assert_array_equal(new_variance, np.zeros(4))


def test_no_channels():
    empty = tf.zeros([0])
    y, mean, variance = tfops.fused_batch_norm(tf.zeros([3, 2, 0]), empty, empty)
    assert (y.shape, mean.shape, variance.shape) == ((3, 2, 0), (0,), (0,))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_one_element_a_channel_has_no_variance(dtype):
    x = tf.constant([[1.0, -2.0, 1000.0]], dtype)
    scale, offset = tf.ones(3, _param(dtype)), tf.constant([1.0, 2.0, 3.0], _param(dtype))
    with tf.GradientTape() as tape:
        tape.watch([x, scale, offset])
        y, mean, variance = tfops.fused_batch_norm(x, scale, offset)
    np.testing.assert_array_equal(tf.cast(y, tf.float32), [[1, 2, 3]])
    np.testing.assert_array_equal(mean, [1, -2, 1000])
    np.testing.assert_array_equal(variance, [0, 0, 0])
    dx, dscale, doffset = tape.gradient(y, [x, scale, offset])
    np.testing.assert_array_equal(tf.cast(dx, tf.float32), [[0, 0, 0]])
    np.testing.assert_array_equal(dscale, [0, 0, 0])
    np.testing.assert_array_equal(doffset, [1, 1, 1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "axis"), [((50, 23), -1), ((3, 23, 6, 6), 1), ((9, 300), -1)], ids=str)
def test_nonfinite_channel_spoils_no_other(shape, axis, value):
    case = kernel_cases.Case(shape, axis, "float32")
    arrays = kernel_cases.inputs(case)
    spoiled = arrays["x"].copy()
    where = [0] * len(shape)
    where[axis] = 5
    spoiled[tuple(where)] = value

    def run(x):
        f = tfops_kernels.forward(x, arrays["scale"], arrays["offset"], axis=axis, activation="relu")
        b = tfops_kernels.backward(
            arrays["dy"],
            x,
            arrays["scale"],
            arrays["offset"],
            f.saved_mean,
            f.saved_inv_std,
            axis=axis,
            activation="relu",
        )
        return f.y, f.mean, f.variance, b.x, b.scale, b.offset

    for clean, dirty in zip(run(arrays["x"]), run(spoiled), strict=True):
        channel = axis if clean.ndim > 1 else 0
        np.testing.assert_array_equal(np.delete(clean, 5, channel), np.delete(dirty, 5, channel))
    y, mean, variance, *_ = run(spoiled)
    assert np.isnan(np.take(y, 5, axis)).all()
    np.testing.assert_array_equal(mean[5], value)  # an infinity is its channel's mean
    assert np.isnan(variance[5])


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((700, 24), -1), ((5000, 3), 1), ((40, 12, 9, 9), 1), ((2, 3, 9000), 1)])
def test_mean_of_infinities_is_that_of_numpy(shape, axis, dtype):
    """Wherever they lie, and however many: that infinity, or NaN of both signs or where there is one. As in NumPy."""
    rng = np.random.default_rng(0)
    channels = shape[axis]
    clean = rng.standard_normal(shape).astype(kernel_cases.numpy_dtype(dtype))
    for case in range(12):
        x = np.moveaxis(clean.copy(), axis, 0).reshape(channels, -1)
        places = rng.choice(x.shape[1], (channels, 1 + case % 4 * 3))
        places[:, 0] = [0, x.shape[1] - 1, x.shape[1] // 2][case % 3]
        for c, of_channel in enumerate(places):
            x[c, of_channel] = np.inf if c % 2 else -np.inf
            if c % 5 == 4:
                x[c, of_channel[-1] :] = np.nan if c % 2 else np.inf
        want = x.astype(np.float64)
        with np.errstate(invalid="ignore"):
            want = want.mean(1)
        x = np.moveaxis(x.reshape(channels, *np.delete(shape, axis)), 0, axis)
        one = np.ones(channels, "float64" if dtype == "float64" else "float32")
        for threads in (1, 3):
            f = tfops_kernels.forward(np.ascontiguousarray(x), one, one, axis=axis, threads=threads)
            np.testing.assert_array_equal(f.mean, want)
            assert np.isnan(f.variance).all()
            assert np.isnan(f.y.astype(np.float32)).all()
        _, mean, _ = _phases.moments(tf.constant(x), axis, tf.ones(shape[:-1], tf.bool))
        np.testing.assert_array_equal(mean, want)


def test_epsilon_of_zero_means_zero():
    """Means what it says, as in Keras' layer: channels without variance are NaN, the others what they are."""
    x = np.random.default_rng(0).standard_normal((6, 3)) * [1, 0, 1e-9]
    one, zero = np.ones(3), np.zeros(3)
    for training in (True, False):
        statistics = (x.mean(0), x.var(0))
        y, *_ = tfops.fused_batch_norm(tf.constant(x), one, zero, *statistics, epsilon=0, is_training=training, axis=-1)
        with np.errstate(invalid="ignore"):
            want = (x - statistics[0]) / np.sqrt(statistics[1])
        np.testing.assert_allclose(y, want, rtol=1e-6)
        assert np.isnan(y[:, 1]).all()


def test_relu_gradient_at_zero_is_zero():
    x = tf.constant([[1.0, -1.0], [1.0, -1.0]])
    for name in ("relu", "relu6", "leaky_relu"):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _, _ = tfops.fused_batch_norm(
                x,
                tf.ones(2),
                tf.zeros(2),
                tf.constant([1.0, -1.0]),
                tf.ones(2),
                is_training=False,
                activation=name,
            )
        gradient = tape.gradient(y, x).numpy()
        expected = 0.2 / np.sqrt(1.001) if name == "leaky_relu" else 0.0
        np.testing.assert_allclose(gradient, np.full((2, 2), expected), rtol=1e-6)


def test_large_means_keep_the_stated_bounds():
    """The bounds of the README: no cancellation, in any layout, eager or not."""
    rng = np.random.default_rng(0)
    for ratio, relative in ((1e3, 1e-5), (1e5, 1e-3)):
        for dtype, shape, axis in (
            ("float32", (20000, 24), -1),
            ("float32", (10, 7, 50, 51), 1),
            ("float32", (64, 2049), -1),
        ):
            channels = shape[axis]
            x = (rng.standard_normal(shape) + ratio).astype(dtype)
            scale, offset = (rng.uniform(0.5, 2, channels).astype(np.float32) for _ in range(2))
            got = tfops_kernels.forward(x, scale, offset, axis=axis)
            want = oracle.forward(x, scale, offset, axis=axis)
            np.testing.assert_allclose(got.variance, want.variance, rtol=relative)
            eps = 2.0**-23
            bound = 8 * eps * (1 + ratio) * (scale + np.abs(offset) + 1)
            assert (np.abs(got.y - want.y) <= oracle.vector_like(bound, x, axis)).all()


@pytest.mark.parametrize("value", [7.25, 1e-30, -3e30])
def test_constant_input_has_no_variance(value):
    for shape, axis in (((1000, 3), -1), ((4, 65, 100), 1)):
        x = np.full(shape, value, np.float32)
        v = np.ones(shape[axis], np.float32)
        got = tfops_kernels.forward(x, v, v, axis=axis)
        np.testing.assert_array_equal(got.variance, np.zeros_like(v))
        np.testing.assert_array_equal(got.mean, np.full_like(v, value))
        np.testing.assert_array_equal(got.y, np.ones_like(x))


GOOD = {
    "x": np.ones((4, 3), np.float32),
    "scale": np.ones(3, np.float32),
    "offset": np.ones(3, np.float32),
    "mean": np.ones(3, np.float32),
    "variance": np.ones(3, np.float32),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.ones(3, np.float32)}, "rank"),
        ({"x": np.ones((4, 3), np.int32)}, "x must be of dtype"),
        ({"scale": np.ones(4, np.float32)}, "scale"),
        ({"scale": np.ones((3, 1), np.float32)}, "scale"),
        ({"scale": np.float32(1)}, "scale"),
        ({"scale": np.ones(3, np.float64)}, "scale must be of dtype float32, but it is float64"),
        ({"offset": np.ones(2, np.float32)}, "offset"),
        ({"mean": np.ones(4, np.float32)}, r"mean must have shape \[3\]"),
        ({"variance": np.ones(7, np.float32)}, r"variance must have shape \[3\]"),
        ({"mean": np.ones(0, np.float32), "exponential_avg_factor": 0.5}, r"mean must have shape \[3\]"),
        ({"variance": np.ones(0, np.float32), "is_training": False}, r"variance must have shape \[3\]"),
        ({"mean": np.array(["a"] * 3)}, "mean must be of dtype float32, but it is string"),
        ({"mean": np.array(["a", 1.0, 2.0], object)}, "mean must hold numbers"),
        ({"mean": np.float64(1)}, r"mean must have shape \[3\]"),
        ({"offset": [1.0, "a", 2.0]}, "offset cannot be made a tensor of dtype float32"),
        ({"x": None}, "x cannot be made a tensor"),
        ({"x": tf.ragged.constant([[1.0], [2.0, 3.0]])}, "x cannot be made a tensor: it is a RaggedTensor"),
        ({"axis": "x"}, "axis must be an integer, but it is 'x'"),
        ({"axis": 1.7}, "axis must be an integer, but it is 1.7"),
        ({"epsilon": [0.1]}, "epsilon must be a number that is known when the op is made, but it is"),
        ({"epsilon": "0.1"}, "epsilon must be a number that is known when the op is made, but it is '0.1'"),
        ({"epsilon": 10**400}, "epsilon must be a number that is known when the op is made"),
        ({"exponential_avg_factor": 1.0001}, "exponential_avg_factor must be in .* but it is 1.0001"),
        ({"unbiased": None}, "unbiased must be a bool, but it is None"),
        ({"is_training": "False"}, "is_training must be a bool, but it is 'False'"),
        ({"is_training": []}, r"is_training must be a bool, but it is \[\]"),
        ({"activation": ["relu"]}, "activation must be one of .* but it is "),
        ({"data_format": b"\xff"}, "data_format must be one of .* but it is "),
        ({"exponential_avg_factor": "a"}, "exponential_avg_factor must be a number"),
        ({"data_format": b"CHWN"}, "data_format must be one of .* but it is b'CHWN'"),
        ({"residual": np.ones((4, 1), np.float32)}, "residual"),
        ({"residual": np.ones((4, 3), np.float16)}, "residual must be of dtype float32, but it is float16"),
        ({"epsilon": -8.0}, "epsilon must be finite and >= 0"),
        ({"epsilon": float("nan")}, "epsilon must be finite and >= 0"),
        ({"epsilon": float("inf")}, "epsilon must be finite and >= 0"),
        ({"exponential_avg_factor": -0.1}, "exponential_avg_factor must be in"),
        ({"exponential_avg_factor": 1.1}, "exponential_avg_factor must be in"),
        ({"exponential_avg_factor": float("nan")}, "exponential_avg_factor must be in"),
        ({"axis": 2}, "axis must be in"),
        ({"axis": -3}, "axis must be in"),
        ({"data_format": "NHCW"}, "data_format must be one of .* but it is 'NHCW'"),
        ({"activation": "softsign"}, "activation must be one of .* but it is 'softsign'"),
        ({"is_training": tf.constant([True])}, "is_training"),
        ({"mean": None, "is_training": False}, "mean and variance must be given"),
        ({"mean": None, "exponential_avg_factor": 0.5}, "mean and variance must be given"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises((*INVALID, TypeError), match=message) as raised:
        tfops.fused_batch_norm(**{**GOOD, **changes})
    assert "running" not in str(raised.value)  # which the op calls two of the arguments
    with pytest.raises((*INVALID, TypeError), match=message.partition(" must ")[0]):
        tfops.reference.fused_batch_norm(**{**GOOD, **changes})
    if not {"mean", "axis", "data_format", "activation", "is_training"} & set(changes):
        with pytest.raises((*INVALID, TypeError), match=message) as raised:
            tf.function(lambda: tfops.fused_batch_norm(**{**GOOD, **changes}))()
        assert "running" not in str(raised.value)


def _gradient_call(op):
    """A raw gradient op, and inputs that suit it."""
    from tfops._library import ops

    x, v = tf.ones([4, 3]), tf.ones([3])
    inputs = {"dy": x, "x": x, "scale": v, "offset": v}
    if op == "training_grad":
        inputs |= {"saved_mean": v, "saved_inv_std": v, "mask": tf.zeros([4], tf.uint8), "drunning": [v, v]}
        inputs |= {"residual": []}
        call = ops.tfops_batch_norm_training_grad
    else:
        inputs |= {"mean": v, "variance": v, "residual": [x]}
        call = ops.tfops_batch_norm_inference_grad
    return functools.partial(call, activation="relu", has_residual=True), inputs


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("training_grad", n) for n in ("dy", "scale", "offset", "saved_mean", "saved_inv_std", "mask", "drunning")),
        *(("inference_grad", n) for n in ("dy", "scale", "offset", "mean", "variance", "residual")),
    ],
)
def test_gradient_ops_check_their_inputs(op, name):
    """Called raw, as a broken graph would: an error that names the input, and no crash."""
    call, inputs = _gradient_call(op)
    assert call(**inputs)[0].shape == inputs["x"].shape
    bad = tf.zeros([2], tf.uint8) if name == "mask" else tf.ones([2])
    inputs[name] = [bad] * len(inputs[name]) if isinstance(inputs[name], list) else bad
    with pytest.raises(tf.errors.InvalidArgumentError, match="dmean must have" if name == "drunning" else name):
        call(**inputs)


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("training_grad", {"residual": [tf.ones([4, 3])]}, "num_residuals must be 0"),
        ("inference_grad", {"residual": []}, "num_residuals must be 1"),
        ("training_grad", {"drunning": [tf.ones([3])]}, "num_running must be 0, or 2"),
    ],
    ids=["training_grad-residual", "inference_grad-residual", "drunning"],
)
def test_gradient_ops_check_the_lengths_of_lists(op, changes, message):
    call, inputs = _gradient_call(op)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a numpy.ndarray"),
        ({"x": np.ones((4, 3), np.int8)}, TypeError, "x must be of dtype"),
        ({"x": np.ones((3, 4), np.float32).T}, ValueError, "x must be dense"),
        ({"scale": np.ones(4, np.float32)}, ValueError, r"scale must have shape \(3,\), but it has \(4,\)"),
        ({"offset": np.ones(3)}, TypeError, "offset must be of dtype float32, but it is float64"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
        ({"activation": "softsign"}, ValueError, "'softsign'"),
        ({"axis": 5}, ValueError, "axis"),
        ({"mean": None, "training": False}, TypeError, "mean"),
    ],
)
def test_kernels_module_names_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        tfops_kernels.forward(**{**GOOD, **changes})


def test_vectors_of_another_type_are_refused():
    from tfops._library import ops

    x, v = tf.ones([4, 3]), tf.ones([3], tf.float64)
    for call in (
        lambda: ops.tfops_batch_norm_training(x, v, v, [], []),
        lambda: ops.tfops_batch_norm_inference_grad(x, x, v, v, v, v, []),
        lambda: ops.tfops_batch_norm_moments(x, [], U=tf.float64),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="statistics must be float where x is float, but they"):
            call()


@pytest.mark.parametrize(
    ("dy", "scale", "message"),
    [
        ([None, 3], [None], None),
        ([None, 3], [4], r"scale must have shape \[3\], x's dimension -1, but it has \[4\]"),
        ([3], [3], r"dy must have the shape of x, but it has \[3\]: x must have rank >= 2"),
        ([], [3], r"dy must have the shape of x, but it has \[\]: x must have rank >= 2"),
    ],
    ids=str,
)
def test_shape_of_x_is_inferred_from_dy(dy, scale, message):
    from tfops._library import ops

    def build():
        with tf.Graph().as_default():
            x, dy_, scale_ = (tf.compat.v1.placeholder(tf.float32, shape) for shape in (None, dy, scale))
            keep = tf.compat.v1.placeholder(tf.bool)
            return ops.tfops_batch_norm_gradient_normalize(dy_, x, *[scale_] * 6, [keep], [])

    if message:
        with pytest.raises(ValueError, match=message):
            build()
    else:
        assert build().dx.shape.as_list() == [None, 3]


def test_residual_of_other_channels_is_refused_in_a_graph():
    from tfops._library import ops

    with tf.Graph().as_default():
        x, vector, residual = (tf.compat.v1.placeholder(tf.float32, shape) for shape in (None, [4], [2, 3]))
        with pytest.raises(ValueError, match=r"residual must have 4 elements in dimension -1, as scale and offset do"):
            ops.tfops_batch_norm_training(x, vector, vector, [], [residual])
