"""in_place=True: the gradient computes x from y, and is that of the op without it, to every order; y has x's memory."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing import oracle
from tfops_testing.requirements import JIT

ACTIVATIONS = (None, "leaky_relu", "elu", "leaky_relu(negative_slope=0.5)", "elu(alpha=1.5)")
LAYOUTS = {"NC": ((12, 5), -1), "NHWC": ((3, 4, 2, 5), -1), "NCHW": ((3, 5, 2, 4), 1)}
# How far gradients are from those with x: a few units of the type times |offset / scale| and exp(-z), of sizes below.
TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "float16": 0.02, "bfloat16": 0.15}


def _inputs(layout, dtype="float64", seed=0):
    shape, axis = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    param = "float64" if dtype == "float64" else "float32"
    x = tf.cast(rng.standard_normal(shape) * 1.5 + 1, dtype)
    scale, offset, mean, variance = (
        tf.cast(each, param) for each in (rng.uniform(0.5, 1.5, 5), *rng.uniform(0.2, 1, (3, 5)))
    )
    return [x, scale, offset, mean, variance], axis


def _function(axis, activation, seed=1, **keywords):
    """A loss of all that the op returns."""

    def loss(*inputs, function=tfops.fused_batch_norm, in_place=True):
        rng = np.random.default_rng(seed)
        y, mean, variance = function(
            *inputs, axis=axis, activation=activation, exponential_avg_factor=0.25, in_place=in_place, **keywords
        )
        weights = [tf.cast(rng.standard_normal(each.shape), mean.dtype) for each in (y, mean, variance)]
        outputs = (tf.cast(y, mean.dtype), mean, variance)
        return tf.add_n([tf.reduce_sum(w * tf.sin(each)) for w, each in zip(weights, outputs, strict=True)])

    return loss


def _gradients(loss, inputs, **keywords):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(*inputs, **keywords)
    return tape.gradient(value, inputs)


def _assert_near(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        g, w = (np.asarray(each).astype(np.float64) for each in (g, w))
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(np.abs(w).max(), 1e-3))


@pytest.mark.parametrize("mode", ["eager", "graph", JIT])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_with_x(layout, activation, mode):
    for dtype, tolerance in TOLERANCE.items():
        inputs, axis = _inputs(layout, dtype)
        loss = _function(axis, activation)
        run = _gradients if mode == "eager" else tf.function(_gradients, jit_compile=mode == "jit")
        _assert_near(run(loss, inputs), _gradients(loss, inputs, in_place=False), tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_difference_quotients(layout, activation):
    inputs, axis = _inputs(layout)
    loss = _function(axis, activation)
    analytic, numerical = tf.test.compute_gradient(loss, inputs, delta=1e-6)
    _assert_near(analytic, numerical, 1e-7)


def _second(loss, inputs, **keywords):
    """The gradients of a function of the gradients."""

    def of_first(*inputs):
        first = _gradients(loss, list(inputs), **keywords)
        return tf.add_n([tf.reduce_sum(tf.cos(3 * each + i)) for i, each in enumerate(first)])

    return of_first


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_are_those_of_difference_quotients(layout, activation):
    inputs, axis = _inputs(layout)
    of_first = _second(_function(axis, activation), inputs)
    analytic, numerical = tf.test.compute_gradient(of_first, inputs, delta=1e-6)
    _assert_near(analytic, numerical, 1e-6)


@pytest.mark.parametrize(
    ("mode", "activation", "unbiased", "factor"),
    [
        ("eager", None, True, 0.0),
        ("eager", "leaky_relu", True, 0.25),
        ("eager", "elu", True, 1.0),
        ("eager", "elu", False, 0.25),
        pytest.param("jit", "elu", True, 0.25, marks=pytest.mark.xla),
    ],
)
def test_second_and_third_derivatives_are_those_with_x(mode, activation, unbiased, factor):
    inputs, axis = _inputs("NHWC")

    def loss(*inputs, in_place=True):
        y, mean, variance = tfops.fused_batch_norm(
            *inputs,
            axis=axis,
            activation=activation,
            exponential_avg_factor=factor,
            unbiased=unbiased,
            in_place=in_place,
        )
        return tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(tf.cos(mean) + tf.sin(variance))

    def third(in_place):
        second = _second(loss, inputs, in_place=in_place)
        of_second = _second(second, inputs)
        return _gradients(second, inputs) + _gradients(of_second, inputs)

    run = third if mode == "eager" else tf.function(third, jit_compile=mode == "jit")
    _assert_near(run(True), run(False), 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("graph", [False, True])
def test_forward_mode_is_that_with_x(activation, graph):
    inputs, axis = _inputs("NCHW")
    tangents = [tf.random.stateless_normal(each.shape, [1, i], dtype=each.dtype) for i, each in enumerate(inputs)]
    loss = _function(axis, activation)

    def run(in_place):
        with tf.autodiff.ForwardAccumulator(inputs, tangents) as forward:
            gradients = _gradients(loss, inputs, in_place=in_place)
            value = loss(*inputs, in_place=in_place)
        return [forward.jvp(each) for each in (*gradients, value)]

    if graph:
        run = tf.function(run)
    _assert_near(run(True), run(False), 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_vectorized_map_is_a_loop(activation):
    inputs, axis = _inputs("NHWC")
    stacked = [tf.stack([each * s for s in (1.0, 0.5, 2.0)]) for each in inputs]
    loss = _function(axis, activation)

    def run(each):
        return _gradients(loss, list(each))

    got = tf.vectorized_map(run, stacked, fallback_to_while_loop=False)
    want = tf.map_fn(run, stacked, fn_output_signature=[tf.float64] * 5)
    _assert_near(got, want, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hessians_are_those_with_x(activation):
    inputs, axis = _inputs("NC")
    loss = _function(axis, activation)

    def hessian(in_place):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            gradient = _gradients(loss, inputs, in_place=in_place)[0]
        return tape.jacobian(gradient, inputs, experimental_use_pfor=True)

    _assert_near(hessian(True), hessian(False), 1e-10)


def test_gradient_does_not_read_x():
    """In a graph nothing but the forward op does, so that TensorFlow lets go of it."""

    @tf.function
    def step(x, v):
        inner = x * 2
        with tf.GradientTape() as tape:
            tape.watch(inner)
            y = tfops.fused_batch_norm(inner, v, v, activation="elu", in_place=True)[0]
        return tape.gradient(y, inner)

    graph = step.get_concrete_function(tf.zeros([4, 3]), tf.ones(3)).graph
    (op,) = [each for each in graph.get_operations() if each.type == "Tfops>BatchNormTraining"]
    assert [each.type for each in op.inputs[0].consumers()] == ["Tfops>BatchNormTraining"]
    (gradient,) = [each for each in graph.get_operations() if each.type == "Tfops>BatchNormTrainingGrad"]
    assert gradient.inputs[1] is op.outputs[0]
    assert gradient.get_attr("in_place")


@pytest.mark.parametrize("in_place", [False, True])
def test_memory_of_y_is_that_of_x(in_place):
    """In a function with a gradient: the addresses of both, as a function of NumPy arrays sees them."""

    def address(array):
        return np.int64(array.__array_interface__["data"][0])

    @tf.function
    def step(x, v):
        x = x * 2
        (of_x,) = [tf.numpy_function(address, [x], tf.int64)]
        with tf.control_dependencies([of_x]):  # which reads it before
            v = tf.identity(v)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tfops.fused_batch_norm(x, v, v, activation="leaky_relu", in_place=in_place)[0]
            of_y = tf.numpy_function(address, [y], tf.int64)
        return of_x, of_y, tape.gradient(y, x)

    with tf.device("/CPU:0"):  # for arrays of a GPU are copied to be seen
        of_x, of_y, _ = step(tf.random.stateless_normal([1000, 256], [1, 2]), tf.ones(256))
    assert (of_x == of_y).numpy() == in_place


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"activation": "relu"},
            "activation must be one of None, 'leaky_relu', 'elu' where in_place is True, but it is 'relu'",
        ),
        (
            {"residual": np.ones((4, 3), np.float32)},
            r"residual must be None where in_place is True, but it is of shape \(4, 3\)",
        ),
        (
            {"activation": "leaky_relu(negative_slope=-0.5)"},
            "negative_slope of activation must be > 0 where in_place is True, but it is -0.5",
        ),
        ({"virtual_batch_size": 2}, "virtual_batch_size must be None where in_place is True, but it is 2"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keywords, message):
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    for function in (tfops.fused_batch_norm, tfops.reference.fused_batch_norm):
        with pytest.raises(ValueError, match=f"^{message}$"):
            function(x, v, v, in_place=True, **keywords)
    with pytest.raises(TypeError, match=r"^in_place must be a bool, but it is 'yes'"):
        tfops.fused_batch_norm(x, v, v, in_place="yes")


@pytest.mark.parametrize("mode", ["eager", "graph", JIT])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scale_near_zero_is_refused(dtype, mode):
    unit = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    inputs, axis = _inputs("NHWC", dtype)
    scale = inputs[1].numpy()

    def run(scale):
        return tfops.fused_batch_norm(inputs[0], scale, tf.ones_like(scale), axis=axis, in_place=True)[0]

    run = run if mode == "eager" else tf.function(run, jit_compile=mode == "jit")
    refused = pytest.raises(
        tf.errors.InvalidArgumentError, match=r"scale is too near 0 for in_place, .* in channel 3 it"
    )
    with tf.device("/CPU:0"):  # a GPU makes the gradient NaN: see kernels/test_gpu.py
        scale[3] = -4.04 * unit
        assert np.isfinite(run(tf.constant(scale)).numpy().astype(np.float64)).all()
        scale[3] = -3.96 * unit
        with refused:
            run(tf.constant(scale))


@pytest.mark.parametrize("training", [False, "tensor"])
def test_inference_is_what_it_is_without(training):
    inputs, axis = _inputs("NHWC", "float32")
    value = training if training is False else tf.constant(False)

    def run(in_place):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = tfops.fused_batch_norm(*inputs, is_training=value, axis=axis, in_place=in_place)[0]
        return [y, *tape.gradient(y, inputs)]

    for got, want in zip(tf.function(run)(True), run(False), strict=True):
        np.testing.assert_array_equal(got, want)


def test_empty_batches_are_what_they_are_without():
    for shape, axis in (((0, 3), -1), ((2, 0), -1), ((2, 3, 0), 1)):
        v = tf.ones([shape[axis]])

        def run(in_place, shape=shape, v=v, axis=axis):
            x = tf.zeros(shape)
            with tf.GradientTape() as tape:
                tape.watch([x, v])
                y, mean, _ = tfops.fused_batch_norm(x, v, v, v, v, axis=axis, in_place=in_place)
            return [y, mean, *tape.gradient([y, mean], [x, v])]

        for got, want in zip(run(True), run(False), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_within_the_stated_bound(activation, dtype):
    """x comes back with an error of u (|xhat| + |offset / scale|), of elu exp(-z) times that: see docs/numerics.md.

    Told from the gradient of scale for a dy that is 0 but in one place, which is dz xhat there.
    """
    unit = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    inputs, axis = _inputs("NC", dtype, seed=3)
    wide = [each.numpy().astype(np.float64) for each in inputs[:3]]
    x, scale, offset = wide
    xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + 2.0**-10)
    z = xhat * scale + offset
    for row in range(len(x)):
        with tf.GradientTape() as tape:
            tape.watch(inputs[1])
            y = tfops.fused_batch_norm(*inputs[:3], epsilon=2.0**-10, axis=axis, activation=activation, in_place=True)[
                0
            ]
        dy = np.zeros(x.shape)
        dy[row] = 1
        dscale = tape.gradient(y, inputs[1], tf.cast(dy, dtype)).numpy()
        y = y.numpy().astype(np.float64)
        is_elu = (activation or "").startswith("elu")
        slope = np.where(y > 0, 1, oracle.slope_of(activation, np.zeros(())) + y * is_elu)
        got = dscale / (slope * np.ones_like(x))[row]
        amplified = np.exp(-np.minimum(z, 0)) if is_elu else 1
        bound = 8 * unit * (np.abs(xhat) + np.abs(offset / scale)) * amplified
        assert (np.abs(got - xhat[row]) <= bound[row]).all()
