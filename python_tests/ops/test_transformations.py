"""TensorFlow's transformations of the op give what they give of the reference: forward mode, and vectorized loops."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import _phases
from tfops._library import ops
from tfops_testing.requirements import JIT, has_keras

NAMES = ("x", "scale", "offset", "mean", "variance", "residual")


def _variables(shape, axis, dtype=tf.float64, stacked=(), iterations=3, seed=0):
    """Inputs of the op by name, and of those in `stacked` one for each iteration."""
    rng = np.random.default_rng(seed)
    variables = {}
    for name in NAMES:
        size = list(shape) if name in ("x", "residual") else [shape[axis]]
        size = [iterations, *size] if name in stacked else size
        values = rng.uniform(0.5, 2, size) if name in ("scale", "variance") else 2 * rng.standard_normal(size)
        wide = dtype if name in ("x", "residual") or dtype is tf.float64 else tf.float32
        variables[name] = tf.constant(values, wide)
    return variables


def _apply(function, variables, **settings):
    """y, mean and variance. (Of inference, mean and variance are inputs, not outputs.)"""
    return function(**variables, exponential_avg_factor=0.25, epsilon=0.003, **settings)


def _masked(function, x, scale, offset, residual, keep, **settings):
    """The phases one by one, or the same in plain TensorFlow."""
    axis = settings["axis"]
    if function is tfops.fused_batch_norm:
        statistics = _phases.batch_statistics(x, axis, keep=keep, ballast=0.125)
        y = _phases.normalize(x, scale, offset, statistics, residual=residual, epsilon=0.003, **settings)
        return y, statistics.mean, statistics.variance
    axis %= len(x.shape)
    others = [i for i in range(len(x.shape)) if i != axis]
    kept = tf.broadcast_to(tf.cast(keep, x.dtype)[..., None], tf.shape(x))
    count = tf.reduce_sum(kept, others, keepdims=True) + 0.125
    mean = tf.reduce_sum(kept * x, others, keepdims=True) / count
    variance = tf.reduce_sum(kept * (x - mean) ** 2, others, keepdims=True) / count
    statistics = [tf.reshape(each, [-1]) for each in (mean, variance)]
    settings |= {"epsilon": 0.003, "is_training": False, "residual": residual}
    return tfops.reference.fused_batch_norm(x, scale, offset, *statistics, **settings)[0], *statistics


LAYOUTS = [((4, 3, 5), -1), ((3, 7, 2, 2), 1), ((5, 2, 3), 0)]
MODES = ["training", "inference", "masked"]
# How the function is called: op by op, as a function, compiled by XLA.
STYLES = {
    "eager": lambda f: f,
    "function": tf.function,
    "jit": lambda f: tf.function(f, jit_compile=True),
}


def _function(which, mode, shape, **settings):
    """y, mean and variance of the variables, by tfops or by the reference."""
    if mode == "masked":
        keep = tf.constant(np.random.default_rng(5).random(shape[:-1]) < 0.7)
        return lambda x, scale, offset, mean, variance, residual: _masked(
            which, x, scale, offset, residual, keep, **settings
        )
    settings["is_training"] = mode == "training"
    return lambda *variables: _apply(which, dict(zip(NAMES, variables, strict=True)), **settings)


def _assert_close(got, want, rtol=1e-9, what=""):
    for i, (g, w) in enumerate(zip(tf.nest.flatten(got), tf.nest.flatten(want), strict=True)):
        w = w.numpy()
        np.testing.assert_allclose(g, w, rtol=0, atol=rtol * (np.abs(w).max(initial=0) + 1), err_msg=f"{what} {i}")


@pytest.mark.parametrize("style", ["eager", "function", JIT])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
def test_forward_mode_agrees_with_the_reference(shape, axis, mode, style):
    """Directional derivatives of all outputs, and of gradients: products with the Hessian."""
    variables = list(_variables(shape, axis).values())
    rng = np.random.default_rng(1)
    directions = [tf.constant(rng.standard_normal(v.shape)) for v in variables]
    weights = tf.constant(rng.standard_normal(shape))
    for activation in ("silu", "leaky_relu", None) if style == "eager" else ("silu",):

        def derivatives(which, style, activation=activation):
            f = _function(which, mode, shape, axis=axis, activation=activation)
            # The statistics count in training, where they follow from x; in inference they are inputs.
            outputs = STYLES[style](lambda *v: f(*v)[: 1 if mode == "inference" else 3])
            loss = STYLES[style](lambda *v: tf.reduce_sum(weights * tf.square(f(*v)[0])))
            with tf.autodiff.ForwardAccumulator(variables, directions) as accumulator:
                results = outputs(*variables)
                with tf.GradientTape() as tape:
                    tape.watch(variables)
                    value = loss(*variables)
                gradients = tape.gradient(value, variables, unconnected_gradients="zero")
            return accumulator.jvp([results, gradients], unconnected_gradients="zero")

        got, want = derivatives(tfops.fused_batch_norm, style), derivatives(tfops.reference.fused_batch_norm, "eager")
        _assert_close(got, want, what=f"{activation}")


@pytest.mark.parametrize("style", ["eager", "function"])
def test_forward_mode_of_a_layer_agrees_with_keras(style):
    """Masked, corrected and plain layers, by Keras' layer."""
    modes = [({}, None), ({}, [[True, True, False], [True, False, True]])]
    if has_keras("3.14"):
        modes.append(({"renorm": True}, None))
    for options, mask in modes:
        x = tf.constant(np.random.default_rng(0).standard_normal((2, 3, 4)))
        direction = tf.constant(np.random.default_rng(1).standard_normal(x.shape))

        def product(cls, options=options, mask=mask, x=x, direction=direction):
            layer = cls(dtype="float64", epsilon=0.003, **options)
            layer.build(x.shape)
            run = STYLES[style](lambda x: layer(x, training=True, mask=None if mask is None else tf.constant(mask)))
            with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
                y = run(x)
            return accumulator.jvp(y)

        _assert_close(product(tfops.keras.BatchNormalization), product(keras.layers.BatchNormalization), 1e-8)


def test_gradient_given_as_indexed_slices_is_taken():
    """A gradient that comes as tf.IndexedSlices: of a gather from the first gradient."""
    x = tf.constant(np.random.default_rng(0).standard_normal((5, 3)))

    def second(function):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = function(x, tf.ones(3, x.dtype), tf.zeros(3, x.dtype), activation="silu")[0] ** 2
            loss = tf.reduce_sum(tf.gather(inner.gradient(y, x), [1, 3, 3]) ** 2)
        return outer.gradient(loss, x)

    _assert_close(second(tfops.fused_batch_norm), second(tfops.reference.fused_batch_norm))


# ----------------------------------------------------------------------------------------------------------------------
# Vectorized loops


def _vectorized(function, stacked, iterations=3):
    """function(**tensors) for each iteration, without a loop; and in one."""
    one = lambda tensors: function(**tensors)  # noqa: E731
    got = tf.vectorized_map(one, stacked, fallback_to_while_loop=False)
    want = [one({name: value[i] for name, value in stacked.items()}) for i in range(iterations)]
    return got, tf.nest.map_structure(lambda *each: tf.stack(each), *want)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [
        *((*layout, tf.float64) for layout in LAYOUTS),
        ((4, 1), -1, tf.float64),
        ((1, 2, 9), 1, tf.float64),
        ((2, 24), -1, tf.float32),
        ((3, 7, 2, 2), 1, tf.float16),
        ((4, 3, 5), -1, tf.bfloat16),
    ],
    ids=str,
)
def test_vectorized_map_gives_what_a_loop_gives(shape, axis, training, dtype):
    """Whichever inputs differ from one iteration to another: what a loop gives, gradients and masks included."""
    for activation, stacked in itertools.product(
        (None, "relu", "silu"), (("x",), ("x", "residual"), ("residual",), ("scale", "variance"), NAMES)
    ):
        variables = _variables(shape, axis, dtype, stacked)
        fixed = {name: value for name, value in variables.items() if name not in stacked}
        settings = {"axis": axis, "activation": activation, "is_training": training}

        def run(fixed=fixed, settings=settings, **tensors):
            everything = {**fixed, **tensors}
            with tf.GradientTape() as tape:
                tape.watch(everything)
                y, mean, variance = _apply(tfops.fused_batch_norm, everything, **settings)
                loss = tf.reduce_sum(tf.cast(y, tf.float64) ** 2)
            return y, mean, variance, tape.gradient(loss, everything, unconnected_gradients="zero")

        got, want = _vectorized(run, {name: variables[name] for name in stacked})
        # The kernels sum in an order that depends on the shape; the rounding of y moves with it by a step at most.
        tolerance = {tf.float64: 1e-13, tf.float32: 1e-5, tf.float16: 2**-9, tf.bfloat16: 2**-6}[dtype]
        got, want = (tf.nest.map_structure(lambda t: tf.cast(t, tf.float64), each) for each in (got, want))
        _assert_close(got, want, tolerance, f"{activation} {stacked}")


@pytest.mark.parametrize(("shape", "axis"), [*LAYOUTS, ((2, 24), -1)], ids=str)
def test_vectorized_phases_give_what_a_loop_gives(shape, axis):
    """Moments, and gradients through the phases, with flags that differ from one iteration to another or do not."""
    rng = np.random.default_rng(2)
    keeps = tf.constant(rng.random([3, *shape[:-1]]) < 0.6)
    for activation, stacked in itertools.product((None, "relu"), (("x",), ("keep",), ("x", "keep"), ("scale",))):
        variables = _variables(shape, axis, stacked=stacked)
        tensors = {name: variables[name] for name in ("x", "scale", "offset", "residual")}
        tensors["keep"] = keeps if "keep" in stacked else keeps[0]
        fixed = {name: value for name, value in tensors.items() if name not in stacked}

        def run(fixed=fixed, activation=activation, **tensors):
            everything = {**fixed, **tensors}
            keep = everything.pop("keep")
            with tf.GradientTape() as tape:
                tape.watch(everything)
                outputs = _masked(tfops.fused_batch_norm, keep=keep, axis=axis, activation=activation, **everything)
                loss = tf.reduce_sum(outputs[0] ** 2)
            return outputs, tape.gradient(loss, everything)

        _assert_close(*_vectorized(run, {name: tensors[name] for name in stacked}), 1e-12, f"{activation} {stacked}")


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
def test_vectorized_gradient_ops_give_what_a_loop_gives(shape, axis):
    """The phases' ops one by one, with whatever inputs stacked."""
    rng = np.random.default_rng(3)
    channels = shape[axis]
    data = {name: rng.standard_normal([3, *shape]) for name in ("dy", "x", "residual")}
    vectors = {name: rng.uniform(0.5, 2, [3, channels]) for name in ("scale", "offset", "mean", "variance")}
    more = {name: rng.uniform(0.5, 2, [3, channels]) for name in ("tilt", "shift")}
    keep = {"keep": rng.random([3, *shape[:-1]]) < 0.6}
    lists = ("residual", "keep")
    calls = {
        ops.tfops_batch_norm_gradient_moments: {**data, **vectors},
        ops.tfops_batch_norm_gradient_normalize: {**data, **vectors, **more, **keep},
    }
    for op, inputs in calls.items():
        inputs = {name: tf.constant(value) for name, value in inputs.items()}
        for stacked in (("dy",), ("mean",), ("dy", "x", "residual"), tuple(inputs)):
            fixed = {name: value[0] for name, value in inputs.items() if name not in stacked}

            def run(op=op, fixed=fixed, **tensors):
                everything = {**fixed, **tensors}
                arguments = {name: [value] if name in lists else value for name, value in everything.items()}
                return list(op(**arguments, axis=axis, activation="silu"))

            _assert_close(*_vectorized(run, {name: inputs[name] for name in stacked}), 1e-12, f"{op} {stacked}")


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("mode", MODES)
def test_jacobians_and_hessians_agree_with_the_reference(mode, graph):
    shape, axis = (3, 2, 4), -1
    variables = list(_variables(shape, axis).values())
    x = variables[0]

    def everything(which, pfor):
        f = _function(which, mode, shape, axis=axis, activation="silu")
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(variables)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = f(*variables)[0]
                loss = tf.reduce_sum(y**3)
            gradient = inner.gradient(loss, x)
        batch = outer.batch_jacobian(y, x, experimental_use_pfor=pfor) if mode == "inference" else y
        hessians = outer.jacobian(gradient, [x, variables[1], variables[-1]], experimental_use_pfor=pfor)
        return outer.jacobian(y, variables[:3], experimental_use_pfor=pfor), batch, hessians

    run = tf.function(everything) if graph else everything
    _assert_close(run(tfops.fused_batch_norm, True), everything(tfops.reference.fused_batch_norm, False))


@pytest.mark.parametrize("style", ["eager", "function", JIT])
def test_vectorized_loops_in_loops_work(style):
    """Two of them, or one with a mode that differs from one iteration to another; and the gradient of all that."""
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 3, 5, 4)))
    modes = tf.constant([True, False])
    one = tf.ones(4, x.dtype)

    def norm(x, training):
        settings = {"axis": -1, "activation": "relu", "residual": x, "exponential_avg_factor": 0.5}
        return tfops.fused_batch_norm(x, one, one, one, 2 * one, is_training=training, **settings)[:2]

    def nested(x):
        inner = lambda x: tf.vectorized_map(lambda x: norm(x, True), x, fallback_to_while_loop=False)  # noqa: E731
        return tf.vectorized_map(inner, x, fallback_to_while_loop=False)

    def mixed(x):
        return tf.vectorized_map(lambda each: norm(*each), (x[:, 0], modes), fallback_to_while_loop=False)

    def stacked(results):
        return [tf.stack(each) for each in zip(*results, strict=True)]

    def with_gradient(function):
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = function(x)
                loss = tf.add_n([tf.reduce_sum(each**2) for each in outputs])
            return list(outputs), tape.gradient(loss, x)

        return run

    one_by_one = lambda x: stacked([stacked([norm(each, True) for each in tf.unstack(row)]) for row in tf.unstack(x)])  # noqa: E731
    _assert_close(STYLES[style](with_gradient(nested))(x), with_gradient(one_by_one)(x), 1e-13)
    if style != "jit":  # where XLA does not know the numbers of iterations in either mode
        two = lambda x: stacked([norm(x[0, 0], True), norm(x[1, 0], False)])  # noqa: E731
        _assert_close(STYLES[style](with_gradient(mixed))(x), with_gradient(two)(x), 1e-13)


def test_vectorized_map_works_without_elements():
    for shape in ((0, 4), (3, 0)):
        x = tf.zeros([5, *shape])
        vector = tf.zeros(shape[-1])

        def run(x, vector=vector):
            return tfops.fused_batch_norm(x, vector, vector, axis=-1, activation="relu", residual=x)

        got = tf.vectorized_map(run, x, fallback_to_while_loop=False)
        assert [t.shape.as_list() for t in got] == [[5, *shape], [5, shape[-1]], [5, shape[-1]]]
    got = tf.vectorized_map(
        lambda x: tfops.fused_batch_norm(x, tf.ones(4), tf.ones(4), axis=-1, activation="relu", residual=x),
        tf.zeros([0, 3, 4]),
        fallback_to_while_loop=False,
    )
    assert [t.shape.as_list() for t in got] == [[0, 3, 4], [0, 4], [0, 4]]


def test_unknown_rank_falls_back_to_a_loop():
    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)])
    def run(x):
        one = lambda x: tfops.fused_batch_norm(tf.reshape(x, tf.shape(x)), tf.ones(4), tf.zeros(4), axis=-1)[0]  # noqa: E731
        return tf.vectorized_map(one, x)

    x = tf.constant(np.random.default_rng(0).standard_normal((3, 8, 4)), tf.float32)
    want = tf.stack([tfops.fused_batch_norm(each, tf.ones(4), tf.zeros(4), axis=-1)[0] for each in x])
    np.testing.assert_allclose(run(x), want, rtol=1e-6, atol=1e-6)
