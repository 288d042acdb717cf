"""The phases by themselves: moments of chosen elements, and normalization, whose gradient takes these in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tfops import _activations, _phases
from tfops._library import ops
from tfops_testing import kernel_cases
from tfops_testing.op_cases import parameter_type, to_float64

# (shape, axis): folded, ragged and wide rows; one channel; planes, small and large; chunks; elements each by itself.
SHAPES = [
    ((37, 3), -1),
    ((6, 50, 24), -1),
    ((3, 2049), -1),
    ((4500, 40), -1),
    ((300, 1), -1),
    ((5, 6, 4, 9), 1),
    ((2, 3, 150, 151), 1),
    ((40, 7, 5), 1),
    ((2, 1, 30, 20), 1),
    ((30, 5, 1), 1),
    ((4, 5, 6), 0),
]
KEEPS = ("all", "half", "padding", "one", "none")


def _keep(kind, shape, rng):
    """Flags for the rows of the last dimension; `one`: a single row."""
    if kind == "all":
        return None
    flags = np.zeros(shape[:-1], bool)
    if kind == "half":
        flags = rng.random(shape[:-1]) < 0.5
    elif kind == "padding":
        flags[..., : (shape[-2] + 1) // 2] = True
    elif kind == "one":
        flags.flat[flags.size // 2] = True
    return flags


def _oracle_moments(x, axis, keep):
    """count, mean and variance in long double."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    x = x.astype(np.longdouble)
    kept = np.broadcast_to(True if keep is None else keep[..., None], x.shape)
    count = kept.sum(others)
    n = np.maximum(count, 1)
    mean = np.where(kept, x, 0).sum(others) / n
    xc = x - mean.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return count, mean, np.where(kept, xc**2, 0).sum(others) / n


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16, tf.float64], ids=lambda d: d.name)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_moments_agree_with_numpy(shape, axis, keep, dtype):
    rng = np.random.default_rng(5)
    x = tf.constant(rng.standard_normal(shape) * 3 + 2, dtype)
    flags = _keep(keep, shape, rng)
    got = _phases.moments(x, axis, flags)
    count, mean, variance = _oracle_moments(to_float64(x), axis, flags)
    np.testing.assert_array_equal(got[0], count.astype(np.float64))
    eps = kernel_cases.ROUNDING[parameter_type(dtype).name]
    np.testing.assert_allclose(to_float64(got[1]), mean.astype(np.float64), rtol=0, atol=20 * eps)
    np.testing.assert_allclose(to_float64(got[2]), variance.astype(np.float64), rtol=40 * eps, atol=4 * eps)
    assert all(t.dtype == parameter_type(dtype) for t in got)


@pytest.mark.parametrize("keep", ["all", "half", "padding"])
@pytest.mark.parametrize(("shape", "axis"), [((4500, 40), -1), ((2, 3, 150, 151), 1)], ids=str)
@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-5), (1e5, 1e-3)])
def test_moments_of_a_large_mean_keep_the_stated_bounds(ratio, bound, shape, axis, keep):
    rng = np.random.default_rng(5)
    x = tf.constant(rng.standard_normal(shape) + ratio, tf.float32)
    flags = _keep(keep, shape, rng)
    _, _, variance = _phases.moments(x, axis, flags)
    np.testing.assert_allclose(variance, _oracle_moments(x.numpy(), axis, flags)[2].astype(np.float64), rtol=bound)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
def test_moments_of_no_elements_are_zero(shape):
    for keep in (None, np.ones(shape[:-1], bool)):
        for got in _phases.moments(tf.zeros(shape), -1, keep):
            np.testing.assert_array_equal(got, np.zeros(shape[-1]))


def test_nan_spoils_its_channel_alone_and_only_if_kept():
    x = tf.tensor_scatter_nd_update(tf.ones((50, 3)), [[7, 1]], [np.nan])
    keep = np.ones(50, bool)
    _, mean, variance = _phases.moments(x, -1, keep)
    np.testing.assert_array_equal(np.isnan([mean, variance]), [[False, True, False]] * 2)
    keep[7] = False
    _, mean, variance = _phases.moments(x, -1, keep)
    np.testing.assert_array_equal([mean, variance], [[1, 1, 1], [0, 0, 0]])


# ----------------------------------------------------------------------------------------------------------------------
# Normalization and its gradients.


def _plain(x, scale, offset, keep, ballast, residual, axis, epsilon, activation):
    """What batch_statistics and normalize compute, in plain TensorFlow."""
    others = [i for i in range(x.shape.rank) if i != axis % x.shape.rank]
    vector = [-1 if i == axis % x.shape.rank else 1 for i in range(x.shape.rank)]
    weights = tf.ones_like(x) if keep is None else tf.broadcast_to(tf.cast(keep, x.dtype)[..., None], x.shape)
    divisor = tf.reduce_sum(weights, others) + ballast
    mean = tf.math.divide_no_nan(tf.reduce_sum(weights * x, others), divisor)
    xc = x - tf.reshape(mean, vector)
    variance = tf.math.divide_no_nan(tf.reduce_sum(weights * xc * xc, others), divisor)
    z = xc * tf.reshape(scale * tf.math.rsqrt(variance + epsilon), vector) + tf.reshape(offset, vector)
    z = z if residual is None else z + residual
    return _activations.apply(activation, z), mean, variance


def _fused(x, scale, offset, keep, ballast, residual, axis, epsilon, activation):
    statistics = _phases.batch_statistics(x, axis, keep=keep, ballast=ballast)
    settings = {"axis": axis, "epsilon": epsilon, "activation": activation, "residual": residual}
    return _phases.normalize(x, scale, offset, statistics, **settings), statistics.mean, statistics.variance


def _derivatives(function, variables, y_weights, directions, **settings):
    """The outputs, the gradients of a loss, and those of their product with `directions`."""
    with tf.GradientTape() as outer:
        outer.watch(variables)
        with tf.GradientTape() as inner:
            inner.watch(variables)
            outputs = function(*variables[:3], residual=variables[3] if len(variables) > 3 else None, **settings)
            y = tf.cast(outputs[0], tf.float64)
            loss = tf.reduce_sum(y_weights * (y + 0.25 * y * y))
        first = inner.gradient(loss, variables)
        product = tf.add_n([tf.reduce_sum(tf.cast(f, tf.float64) * d) for f, d in zip(first, directions, strict=True)])
    return outputs, first, outer.gradient(product, variables)


@pytest.mark.parametrize("activation", kernel_cases.ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "graph"),
    [
        ((4, 3, 5), -1, tf.float64, True),
        ((6, 3, 2, 2), 1, tf.float64, False),
        ((2, 20, 65), -1, tf.float32, False),
        ((6, 3, 2, 2), 1, tf.float32, False),
        ((2, 20, 65), -1, tf.bfloat16, False),
    ],
    ids=str,
)
def test_outputs_and_derivatives_agree_with_plain_tensorflow(shape, axis, dtype, graph, activation):
    rng = np.random.default_rng(3)
    arrays = kernel_cases.inputs(kernel_cases.Case(shape, axis, dtype.name))
    y_weights = rng.standard_normal(shape)
    for residual, keep in itertools.product((False, True), ("all", "half")):
        names = ["x", "scale", "offset"] + ["residual"] * residual
        types = {"scale": parameter_type(dtype), "offset": parameter_type(dtype)}
        variables = [tf.constant(arrays[name].astype(np.float64), types.get(name, dtype)) for name in names]
        directions = [rng.standard_normal(v.shape) for v in variables]
        settings = {
            "keep": _keep(keep, shape, np.random.default_rng(4)),
            "ballast": 0.0 if keep == "all" else 0.125,
            "axis": axis,
            "epsilon": 0.0078125,
            "activation": activation,
        }
        got = _derivatives(tf.function(_fused) if graph else _fused, variables, y_weights, directions, **settings)
        want = _derivatives(_plain, [tf.cast(v, tf.float64) for v in variables], y_weights, directions, **settings)
        # Between the two gradients, y, dy and dx are rounded to the data type, each element of a sum by itself.
        tolerance = {tf.float64: 1e-11, tf.float32: 2e-5, tf.bfloat16: 2**-6}[dtype]
        for what, ours, theirs in zip(("outputs", "first", "second"), got, want, strict=True):
            for i, (g, w) in enumerate(zip(ours, theirs, strict=True)):
                expected = np.zeros(g.shape) if w is None else w.numpy()
                bound = tolerance * (np.abs(expected).max() + 1)
                np.testing.assert_allclose(
                    to_float64(g), expected, rtol=0, atol=bound, err_msg=f"{what} {i} {settings}"
                )


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_gradient_of_kept_elements_agrees_with_numpy(shape, axis):
    """Large and awkward shapes: dx where some elements are kept, in float32 and with an activation."""
    rng = np.random.default_rng(6)
    channels = shape[axis]
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    scale, offset, mean, tilt, shift = rng.standard_normal((5, channels)).astype(np.float32)
    variance = rng.uniform(0.5, 2, channels).astype(np.float32)
    for kind in ("half", "padding", "none"):
        keep = _keep(kind, shape, rng)
        dx, _ = ops.tfops_batch_norm_gradient_normalize(
            dy,
            x,
            scale,
            offset,
            mean,
            variance,
            tilt,
            shift,
            keep=[keep],
            residual=[],
            axis=axis,
            activation="leaky_relu",
        )

        def vector(v):
            return v.astype(np.float64).reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])

        xc = x - vector(mean)
        slope = vector(scale / np.sqrt(variance + np.float32(0.001)))
        z = xc * slope + vector(offset)
        want = dy * np.where(z > 0, 1, np.float32(0.2)) * slope + keep[..., None] * (xc * vector(tilt) + vector(shift))
        sure = np.abs(z) > 1e-4
        np.testing.assert_allclose(np.where(sure, dx, 0), np.where(sure, want, 0), rtol=1e-5, atol=1e-5)


def test_statistics_have_gradients():
    """Of count none; of mean and variance as TensorFlow's."""
    x = tf.constant(np.random.default_rng(0).standard_normal((6, 4, 3)))
    keep = np.random.default_rng(1).random((6, 4)) < 0.6
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        _, mean, variance = _phases.moments(x, -1, keep)
        ours = tf.reduce_sum(mean**2) + tf.reduce_sum(variance**3)
        means, variances = tf.nn.moments(tf.boolean_mask(x, keep), 0)
        theirs = tf.reduce_sum(means**2) + tf.reduce_sum(variances**3)
    np.testing.assert_allclose(tape.gradient(ours, x), tape.gradient(theirs, x), rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes and bad input.


def test_shapes_are_inferred():
    @tf.function(
        input_signature=[tf.TensorSpec([None, 4, 3]), tf.TensorSpec([None, None], tf.bool), tf.TensorSpec([None])]
    )
    def shapes(x, keep, v):
        moments = _phases.moments(x, -1, keep)
        sums = ops.tfops_batch_norm_gradient_moments(x, x, v, v, v, v, residual=[])
        dx, dresidual = ops.tfops_batch_norm_gradient_normalize(
            x, x, v, v, v, v, v, v, keep=[], residual=[x], activation="relu"
        )
        assert [t.shape.as_list() for t in (*moments, *sums)] == [[3]] * 7
        assert dx.shape.as_list() == dresidual.shape.as_list() == [None, 4, 3]
        return moments

    shapes.get_concrete_function()


def _calls():
    x, v, keep = tf.ones([4, 3]), tf.ones([3]), tf.ones([4], tf.bool)
    vectors = {name: v for name in ("scale", "offset", "mean", "variance")}
    gradient = {"dy": x, "x": x, **vectors, "residual": [x], "activation": "relu"}
    return {
        "moments": (ops.tfops_batch_norm_moments, {"x": x, "keep": [keep], "U": tf.float32}),
        "gradient_moments": (ops.tfops_batch_norm_gradient_moments, gradient),
        "gradient_normalize": (
            ops.tfops_batch_norm_gradient_normalize,
            gradient | {"tilt": v, "shift": v, "keep": [keep]},
        ),
    }


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("moments", {"keep": [tf.ones([3], tf.bool)]}, "keep must have"),
        ("moments", {"keep": [tf.ones([4, 1], tf.bool)]}, "keep must have"),
        ("moments", {"keep": [tf.ones([4], tf.bool)] * 2}, "num_keeps must be 0 or 1"),
        ("moments", {"x": tf.ones([4])}, "rank"),
        ("moments", {"axis": 2}, "axis"),
        *(("gradient_moments", {name: tf.ones([2])}, name) for name in ("dy", "scale", "offset", "mean", "variance")),
        ("gradient_moments", {"residual": [tf.ones([2])]}, "residual"),
        ("gradient_moments", {"epsilon": -1.0}, "epsilon"),
        *(("gradient_normalize", {name: tf.ones([2])}, name) for name in ("dy", "variance", "tilt", "shift")),
        ("gradient_normalize", {"keep": [tf.ones([2], tf.bool)]}, "keep must have"),
        ("gradient_normalize", {"residual": [tf.ones([2])]}, "residual"),
    ],
    ids=str,
)
def test_bad_input_is_named(op, changes, message, graph):
    call, inputs = _calls()[op]
    call(**inputs)
    run = tf.function(lambda: call(**{**inputs, **changes})) if graph else lambda: call(**{**inputs, **changes})
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
        run()
