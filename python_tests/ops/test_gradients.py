"""First and second derivatives agree with those of plain TensorFlow, which differentiates its own ops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing import kernel_cases
from tfops_testing.op_cases import make_problem, parameter_type, to_float64

NAMES = ("x", "scale", "offset", "mean", "variance", "residual")


def _loss(outputs, weights):
    # Not linear in y: the second derivative takes part in it.
    y, mean, variance = (tf.cast(t, tf.float64) for t in outputs)
    return (
        tf.reduce_sum(weights[0] * (y + 0.25 * y * y))
        + tf.reduce_sum(weights[1] * mean)
        + tf.reduce_sum(weights[2] * variance)
    )


def _first_and_second(function, variables, weights, directions, settings):
    """Gradients of the loss, and of their product with `directions`."""
    with tf.GradientTape() as outer:
        outer.watch(variables)
        with tf.GradientTape() as inner:
            inner.watch(variables)
            *others, residual = variables
            loss = _loss(function(*others, residual=residual, **settings), weights)
        first = inner.gradient(loss, variables)
        product = tf.add_n(
            [tf.reduce_sum(tf.cast(f, tf.float64) * d) for f, d in zip(first, directions, strict=True) if f is not None]
        )
    return first, outer.gradient(product, variables)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", kernel_cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [tf.float64, tf.float32, tf.float16, tf.bfloat16], ids=lambda d: d.name)
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5), -1), ((6, 3, 2, 2), 1), ((40, 65), -1)], ids=str)
def test_first_and_second_derivatives_agree_with_the_reference(shape, axis, dtype, activation, training):
    rng = np.random.default_rng(3)
    variables = make_problem(shape, axis, dtype)
    y_weights = rng.standard_normal(shape)
    weights = [y_weights, rng.standard_normal(variables[1].shape), rng.standard_normal(variables[1].shape)]
    directions = [rng.standard_normal(v.shape) for v in variables]
    settings = {
        "axis": axis,
        "activation": activation,
        "is_training": training,
        "exponential_avg_factor": 0.25,
        "epsilon": 0.0078125,
    }
    fused = _first_and_second(tfops.fused_batch_norm, variables, weights, directions, settings)
    wide = [tf.cast(v, tf.float64) for v in variables]
    plain = _first_and_second(tfops.reference.fused_batch_norm, wide, weights, directions, settings)
    # Between the two gradients, y, dy and dx are rounded to the data type, each element of a sum by itself.
    tolerance = {tf.float64: 1e-11, tf.float32: 2e-5, tf.float16: 2**-9, tf.bfloat16: 2**-6}[dtype]
    for order, got, want in zip(("first", "second"), fused, plain, strict=True):
        for name, g, w in zip(NAMES, got, want, strict=True):
            assert g is not None, f"{order} derivative with respect to {name} is None"
            expected = np.zeros(g.shape) if w is None else w.numpy()
            scale = np.abs(expected).max() + 1
            np.testing.assert_allclose(
                to_float64(g), expected, rtol=0, atol=tolerance * scale, err_msg=f"{order}, {name}"
            )


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16], ids=lambda d: d.name)
@pytest.mark.parametrize("channels", [1, 3, 7, 24, 65, 129, 2049])
def test_first_derivative_is_no_worse_than_tensorflows(channels, dtype, training):
    """The error against float64 is at most twice that of TensorFlow's own gradient op."""
    x, scale, offset, mean, variance, _ = make_problem((3, 4, 5, channels), -1, dtype)
    dy = tf.cast(np.random.default_rng(1).standard_normal(x.shape), dtype)
    statistics = () if training else (mean, variance)

    def gradients(function, variables, dy):
        with tf.GradientTape() as tape:
            tape.watch(variables)
            y = function(*variables, epsilon=0.0078125, is_training=training)[0]
        return tape.gradient(y, variables, dy)

    variables = [x, scale, offset, *statistics]
    ours = gradients(tfops.fused_batch_norm, variables, dy)
    theirs = gradients(tf.compat.v1.nn.fused_batch_norm, variables, dy)
    want = gradients(
        tfops.reference.fused_batch_norm, [tf.cast(v, tf.float64) for v in variables], tf.cast(dy, tf.float64)
    )
    for name, our, their, w in zip(NAMES, ours, theirs, want, strict=False):
        # TensorFlow's op has no gradient with respect to mean and variance.
        their_error = 0 if their is None else np.abs(to_float64(their) - w.numpy()).max()
        rounding = kernel_cases.ROUNDING[dtype.name if name == "x" else "float32"]
        magnitude = np.abs(w.numpy()).max() + (np.abs(to_float64(dy)).sum() / channels if name != "x" else 0)
        our_error = np.abs(to_float64(our) - w.numpy()).max()
        assert our_error <= max(2 * their_error, 2 * rounding * magnitude), f"{name}: {our_error}, theirs {their_error}"


def test_second_derivative_agrees_with_tensorflow():
    x, scale, offset, *_ = make_problem((4, 5, 6, 7), -1, tf.float32)
    weights = tf.random.stateless_normal(x.shape, [1, 2])

    def second(function):
        with tf.GradientTape() as outer:
            outer.watch([x, scale, offset])
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = function(x, scale, offset)[0]
                loss = tf.reduce_sum(weights * y * y)
            penalty = tf.reduce_sum(tf.square(inner.gradient(loss, x)))
        return outer.gradient(penalty, [x, scale, offset])

    for got, want in zip(second(tfops.fused_batch_norm), second(tf.compat.v1.nn.fused_batch_norm), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(tf.reduce_max(tf.abs(want))))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_third_derivative_agrees_with_the_reference(activation):
    x, scale, offset, *_ = make_problem((4, 3), -1, tf.float64)

    def third(function):
        variable = x
        tapes = [tf.GradientTape() for _ in range(3)]
        for tape in tapes:
            tape.__enter__()
            tape.watch(variable)
        y, _, _ = function(variable, scale, offset, activation=activation, epsilon=0.0078125)
        value = tf.reduce_sum(y * y * y)
        for tape in reversed(tapes):
            tape.__exit__(None, None, None)
            value = tf.reduce_sum(tf.sin(tape.gradient(value, variable)))
        return value

    np.testing.assert_allclose(third(tfops.fused_batch_norm), third(tfops.reference.fused_batch_norm), rtol=1e-9)


def test_one_gradient_does_not_need_the_others():
    """Whatever subset of outputs a loss uses, its gradient is that of plain TensorFlow."""
    variables = make_problem((6, 5), -1, tf.float64)
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2)):

        def gradients(function, used=used):
            with tf.GradientTape() as tape:
                tape.watch(variables)
                *others, residual = variables
                outputs = function(*others, residual=residual, exponential_avg_factor=0.5, epsilon=0.0078125)
                loss = tf.add_n([tf.reduce_sum(tf.sin(outputs[i])) for i in used])
            return tape.gradient(loss, variables, unconnected_gradients="zero")

        fused, plain = gradients(tfops.fused_batch_norm), gradients(tfops.reference.fused_batch_norm)
        for name, got, want in zip(NAMES, fused, plain, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, err_msg=name)


def test_gradient_types_are_the_inputs_types():
    for dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64):
        variables = make_problem((4, 6, 5), -1, dtype)
        with tf.GradientTape() as tape:
            tape.watch(variables)
            *others, residual = variables
            y, _, _ = tfops.fused_batch_norm(*others, residual=residual, activation="relu", exponential_avg_factor=0.5)
        gradients = tape.gradient(y, variables)
        assert [g.dtype for g in gradients] == [dtype] + [parameter_type(dtype)] * 4 + [dtype]
