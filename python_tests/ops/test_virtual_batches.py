"""`virtual_batch_size`: the op, its derivatives and TensorFlow's transformations, against NumPy and against parts."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import _gpus, gradcheck
from tfops_testing import oracle
from tfops_testing.requirements import JIT

LAYOUTS = [((6, 3, 5), -1, 2), ((4, 7, 3, 2), 1, 2), ((6, 2, 5, 3), 2, 3), ((8, 1), -1, 4)]
NAMES = ("x", "scale", "offset", "mean", "variance", "residual")
FACTOR = 0.25


def _inputs(shape, axis, dtype=tf.float64, seed=0):
    rng = np.random.default_rng(seed)
    param = tf.float64 if dtype is tf.float64 else tf.float32
    vectors = [rng.uniform(0.5, 2, shape[axis]) for _ in range(4)]
    return [
        tf.constant(rng.standard_normal(shape), dtype),
        *(tf.constant(v, param) for v in vectors),
        tf.constant(rng.standard_normal(shape), dtype),
    ]


def _apply(function, x, scale, offset, mean, variance, residual, **settings):
    return function(
        x, scale, offset, mean, variance, residual=residual, exponential_avg_factor=FACTOR, epsilon=0.003, **settings
    )


def _one_by_one(x, scale, offset, mean, variance, residual, *, virtual_batch_size, **settings):
    """An op for each virtual batch, and the average of what they return."""
    parts = x.shape[0] // virtual_batch_size
    results = [
        _apply(tfops.fused_batch_norm, a, scale, offset, mean, variance, b, **settings)
        for a, b in zip(tf.split(x, parts), tf.split(residual, parts), strict=True)
    ]
    y, means, variances = zip(*results, strict=True)
    return tf.concat(y, 0), tf.add_n(means) / parts, tf.add_n(variances) / parts


def _loss(results):
    """Of all results, each element with another weight."""
    total = 0.0
    for i, result in enumerate(results):
        weights = tf.cos(tf.range(tf.size(result), dtype=tf.float64) * 1.7 + i)
        total += tf.reduce_sum(tf.cast(tf.reshape(result, [-1]), tf.float64) * weights)
    return total


def _derivatives(function, inputs, **settings):
    """Results, gradients, and gradients of a function of these."""
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            results = function(*inputs, **settings)
            loss = _loss(results)
        first = inner.gradient(loss, inputs)
        of_first = _loss([tf.sin(each) for each in first[:3]])
    return [*results, *first, *outer.gradient(of_first, inputs, unconnected_gradients="zero")]


def _assert_close(got, want, rtol):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1, float(np.abs(b).max(initial=0))), err_msg=str(i))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize(("shape", "axis", "size"), LAYOUTS, ids=str)
def test_agrees_with_an_op_for_each(shape, axis, size, activation):
    """In y, statistics, and first and second derivatives."""
    settings = {"axis": axis, "activation": activation, "virtual_batch_size": size}
    inputs = _inputs(shape, axis)
    got = _derivatives(lambda *a, **s: _apply(tfops.fused_batch_norm, *a, **s), inputs, **settings)
    want = _derivatives(_one_by_one, inputs, **settings)
    np.testing.assert_array_equal(got[0], want[0])
    _assert_close(got, want, 1e-10)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64], ids=lambda d: d.name)
@pytest.mark.parametrize(("shape", "axis", "size"), LAYOUTS, ids=str)
def test_agrees_with_numpy(shape, axis, size, dtype):
    x, scale, offset, mean, variance, residual = (each.numpy() for each in _inputs(shape, axis, dtype))
    y, new_mean, new_variance = tfops.fused_batch_norm(
        x, scale, offset, mean, variance, residual=residual, axis=axis, virtual_batch_size=size,
        exponential_avg_factor=FACTOR, epsilon=0.003, activation="relu",
    )  # fmt: skip
    want = [
        oracle.forward(
            x[i : i + size], scale, offset, mean, variance, axis=axis, epsilon=0.003, activation="relu",
            exponential_avg_factor=FACTOR, residual=residual[i : i + size], training=True,
        )
        for i in range(0, len(x), size)
    ]  # fmt: skip
    tolerance = {tf.float16: 2e-3, tf.bfloat16: 2e-2, tf.float32: 1e-5, tf.float64: 1e-12}[dtype]
    _assert_close([y.numpy().astype(np.float64)], [np.concatenate([w.y for w in want])], tolerance)
    statistics = [np.mean([getattr(w, name) for w in want], 0) for name in ("mean", "variance")]
    _assert_close([new_mean, new_variance], statistics, 1e-12 if dtype is tf.float64 else 1e-5)


@pytest.mark.parametrize("how", ["graph", JIT])
@pytest.mark.parametrize(("shape", "axis", "size"), LAYOUTS, ids=str)
def test_functions(shape, axis, size, how):
    """As a function, also one of any batch size, and compiled by XLA: to the last bit what it is op by op."""
    inputs = _inputs(shape, axis, tf.float32)
    settings = {"axis": axis, "activation": "relu", "virtual_batch_size": size}

    def step(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            results = _apply(tfops.fused_batch_norm, *inputs, **settings)
            y = results[0]
            loss = tf.reduce_sum(y * y) + tf.reduce_sum(results[1] * results[2])
        return [*results, *tape.gradient(loss, inputs)]

    want = step(*inputs)
    got = tf.function(step, jit_compile=how == "jit")(*inputs)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert a.shape == b.shape
    if how == "graph":
        specs = [tf.TensorSpec([None] * len(each.shape), each.dtype) for each in inputs]
        for a, b in zip(tf.function(step, input_signature=specs)(*inputs), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "axis", "size"), LAYOUTS, ids=str)
@pytest.mark.parametrize("function", [tfops.fused_batch_norm, "fallback"], ids=["op", "fallback"])
def test_numerical_gradients(shape, axis, size, function, monkeypatch):
    """Also forward mode, and the gradient's own gradient."""
    if function == "fallback":
        monkeypatch.setattr(_gpus, "need_fallback", lambda: True)

    def apply(*inputs):
        return _apply(tfops.fused_batch_norm, *inputs, axis=axis, activation="silu", virtual_batch_size=size)

    inputs = _inputs(shape, axis)
    assert gradcheck.check(apply, tuple(inputs)).ok
    if function == "fallback":
        return

    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs[:3])
            loss = _loss(apply(*inputs))
        return tape.gradient(loss, inputs[:3])

    assert gradcheck.check(gradient, tuple(inputs)).ok


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "axis", "size"), LAYOUTS, ids=str)
@pytest.mark.parametrize("stacked", [("x", "residual"), NAMES, ("scale",)], ids=["data", "all", "scale"])
def test_vectorized_map(shape, axis, size, activation, stacked):
    """As a loop of calls, with the gradient of each."""
    each = [_inputs(shape, axis, seed=seed) for seed in range(3)]
    inputs = [tf.stack([e[i] for e in each]) if name in stacked else each[0][i] for i, name in enumerate(NAMES)]

    def step(values):
        arguments = [values[name] if name in values else inputs[i] for i, name in enumerate(NAMES)]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            results = _apply(
                tfops.fused_batch_norm, *arguments, axis=axis, activation=activation, virtual_batch_size=size
            )
            loss = _loss(results)
        return (*results, *tape.gradient(loss, arguments))

    elements = {name: inputs[NAMES.index(name)] for name in stacked}
    got = tf.vectorized_map(step, elements, fallback_to_while_loop=False)
    want = [step({name: v[k] for name, v in elements.items()}) for k in range(3)]
    _assert_close(got, [tf.stack(w) for w in zip(*want, strict=True)], 1e-10)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "axis", "size"), LAYOUTS, ids=str)
def test_fallback_and_reference(monkeypatch, shape, axis, size, activation):
    inputs, settings = _inputs(shape, axis), {"axis": axis, "activation": activation, "virtual_batch_size": size}
    want = _derivatives(lambda *a, **s: _apply(tfops.fused_batch_norm, *a, **s), inputs, **settings)
    got = _derivatives(lambda *a, **s: _apply(tfops.reference.fused_batch_norm, *a, **s), inputs, **settings)
    _assert_close(got, want, 1e-9)
    monkeypatch.setattr(_gpus, "need_fallback", lambda: True)
    got = _derivatives(lambda *a, **s: _apply(tfops.fused_batch_norm, *a, **s), inputs, **settings)
    _assert_close(got, want, 1e-9)


def test_no_effect_in_inference():
    x, scale, offset, mean, variance, _ = _inputs((5, 3), -1, tf.float32)
    plain = tfops.fused_batch_norm(x, scale, offset, mean, variance, is_training=False)
    for function in (tfops.fused_batch_norm, tfops.reference.fused_batch_norm):
        got = function(x, scale, offset, mean, variance, is_training=False, virtual_batch_size=2)
        _assert_close(got, plain, 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_training_that_is_a_tensor(training):
    inputs = _inputs((6, 3), -1, tf.float32)
    settings = {"virtual_batch_size": 2, "axis": -1}
    want = _apply(tfops.fused_batch_norm, *inputs, is_training=training, **settings)
    for function in (tfops.fused_batch_norm, tfops.reference.fused_batch_norm):
        step = tf.function(lambda t, f=function: _apply(f, *inputs, is_training=t, **settings))
        _assert_close(step(tf.constant(training)), want, 1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_empty(shape):
    x, ones = tf.zeros(shape), tf.ones(3)
    for function in (tfops.fused_batch_norm, tfops.reference.fused_batch_norm):
        with tf.GradientTape() as tape:
            tape.watch(ones)
            y, mean, variance = function(
                x, ones, ones, 2 * ones, 3 * ones, exponential_avg_factor=0.5, virtual_batch_size=2,
                axis=1 if shape[1] == 3 else -1,
            )  # fmt: skip
        assert y.shape == shape
        np.testing.assert_array_equal(mean, [2, 2, 2])
        np.testing.assert_array_equal(variance, [3, 3, 3])
        assert tape.gradient([y, mean, variance], ones).shape == [3]


def test_shapes_are_inferred():
    @tf.function(input_signature=[tf.TensorSpec([None, 4, 3])])
    def apply(x):
        results = tfops.fused_batch_norm(x, [1.0] * 3, [0.0] * 3, virtual_batch_size=2)
        return [r.shape.as_list() for r in results], [o.shape.as_list() for o in results[0].op.outputs]

    function = apply.get_concrete_function().graph
    op = next(op for op in function.get_operations() if op.type == "Tfops>BatchNormTraining")
    assert [o.shape.as_list() for o in op.outputs] == [[None, 4, 3], [3], [3], [None, 3], [None, 3], [0]]
    graph = tf.Graph()
    with graph.as_default():
        y, *_ = tfops.fused_batch_norm(tf.zeros([8, 4, 3]), [1.0] * 3, [0.0] * 3, virtual_batch_size=2)
        assert y.op.outputs[3].shape.as_list() == [4, 3]


BAD = [
    ({"virtual_batch_size": 3}, "virtual_batch_size must divide the batch, dimension 0 of x, but it is 3, and the "),
    ({"virtual_batch_size": 2, "axis": 0}, "virtual_batch_size must be .* where the channels are dimension 0"),
    ({"virtual_batch_size": 0}, "virtual_batch_size must be > 0 or None, but it is 0"),
    ({"virtual_batch_size": True}, "virtual_batch_size must be > 0 or None, but it is True"),
    ({"virtual_batch_size": 2.0}, "virtual_batch_size must be an integer or None, but it is 2.0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[str(each[0]) for each in BAD])
@pytest.mark.parametrize("style", ["eager", "graph", "reference", "fallback"])
def test_errors_name_the_argument(monkeypatch, settings, message, style):
    if style == "fallback":
        monkeypatch.setattr(_gpus, "need_fallback", lambda: True)
    function = tfops.reference.fused_batch_norm if style == "reference" else tfops.fused_batch_norm

    def apply():
        return function(tf.zeros([4, 4]), [1.0] * 4, [0.0] * 4, **settings)

    with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError), match=message):
        (tf.function(apply) if style == "graph" else apply)()


def test_sizes_are_checked_when_a_graph_runs():
    for function in (tfops.fused_batch_norm, tfops.reference.fused_batch_norm):
        step = tf.function(
            lambda x, f=function: f(x, [1.0] * 3, [0.0] * 3, virtual_batch_size=2)[0],
            input_signature=[tf.TensorSpec([None, 3])],
        )
        step(tf.zeros([4, 3]))
        with pytest.raises(tf.errors.InvalidArgumentError, match="virtual_batch_size must divide the batch"):
            step(tf.zeros([5, 3]))
