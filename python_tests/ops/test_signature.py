"""What `tf.compat.v1.nn.fused_batch_norm` accepts, tfops.fused_batch_norm does, and with the same meaning."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops._library import ops
from tfops_testing.requirements import JIT, needs_renorm

X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
RNG = np.random.default_rng(1)
SCALE, OFFSET, MEAN, VARIANCE = (RNG.uniform(0.5, 2, 5).astype(np.float32) for _ in range(4))
EMPTY = (None, [], np.zeros(0), tf.zeros(0))
STATISTICS = {
    "float64": (MEAN.astype(np.float64), VARIANCE.astype(np.float64)),
    "lists": (MEAN.tolist(), VARIANCE.tolist()),
    "tuple and array": (tuple(MEAN.tolist()), VARIANCE),
    "float16": (MEAN.astype(np.float16), VARIANCE.astype(np.float16)),
    "integers": (np.arange(5), np.arange(1, 6)),
    "bools": (np.arange(5) > 2, np.ones(5, bool)),
    "objects": (MEAN.astype(object), VARIANCE.astype(object)),
    "a variable": (tf.Variable(MEAN), VARIANCE),
}


def _same(arguments, keywords):
    ours = tfops.fused_batch_norm(*arguments, **keywords)
    theirs = tf.compat.v1.nn.fused_batch_norm(*arguments, **keywords)
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistics", STATISTICS.values(), ids=STATISTICS)
def test_statistics_of_every_type_are_taken(statistics):
    _same((X, SCALE, OFFSET, *statistics), {"is_training": False})
    _same((X, SCALE, OFFSET, *statistics), {"exponential_avg_factor": 0.25})
    _same((X, SCALE, OFFSET, *statistics), {})


@pytest.mark.parametrize(("mean", "variance"), [*itertools.product((*EMPTY, MEAN), repeat=2)], ids=lambda _: "")
def test_statistics_that_are_not_needed_may_be_empty(mean, variance):
    _same((X, SCALE, OFFSET, mean, variance), {})
    # An empty batch leaves them as they were given.
    _, *ours = tfops.fused_batch_norm(X[:0], SCALE, OFFSET, mean, variance)
    for got, given in zip(ours, (mean, variance), strict=True):
        np.testing.assert_array_equal(got, MEAN if given is MEAN else np.zeros(5))


def test_statistics_may_turn_out_empty_at_run_time():
    @tf.function(input_signature=[tf.TensorSpec(None)] * 2)
    def run(mean, variance):
        return tfops.fused_batch_norm(X, SCALE, OFFSET, mean, variance)

    want = tfops.fused_batch_norm(X, SCALE, OFFSET)
    for mean, variance in ((MEAN, VARIANCE), (MEAN[:0], VARIANCE[:0]), (MEAN, VARIANCE[:0])):
        for g, w in zip(run(mean, variance), want, strict=True):
            np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("data_format", [None, "NHWC", b"NHWC"])
def test_data_formats_mean_the_same(data_format):
    _same((X, SCALE, OFFSET), {"data_format": data_format})
    _same((X, SCALE, OFFSET, MEAN, VARIANCE, 0.01, data_format, False), {})


def test_data_formats_of_five_dimensions_are_taken():
    x = X[:, None]
    _same((x, SCALE, OFFSET), {"data_format": b"NDHWC"})
    ours = tfops.fused_batch_norm(np.moveaxis(x, -1, 1), SCALE, OFFSET, data_format=b"NCDHW")[0]
    np.testing.assert_allclose(np.moveaxis(ours, 1, -1), tfops.fused_batch_norm(x, SCALE, OFFSET)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "number", [1, np.float32(0.25), np.float64(0.25), np.int64(1), np.array(0.25), tf.constant(0.25)], ids=repr
)
def test_numbers_of_every_type_are_taken(number):
    _same((X, SCALE, OFFSET, MEAN, VARIANCE), {"epsilon": float(number), "exponential_avg_factor": float(number)})
    want = tfops.fused_batch_norm(X, SCALE, OFFSET, MEAN, VARIANCE, float(number), exponential_avg_factor=float(number))

    def run():
        return tfops.fused_batch_norm(X, SCALE, OFFSET, MEAN, VARIANCE, number, exponential_avg_factor=number)

    for got in (run(), tf.function(run)()):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g, w)


def test_none_is_the_default_of_tensorflows_op():
    statistics = (MEAN, VARIANCE)
    _same((X, SCALE, OFFSET, *statistics), {"epsilon": None})
    _same((X, SCALE, OFFSET, *statistics), {"is_training": None})
    _same((X, SCALE, OFFSET, *statistics), {"exponential_avg_factor": None})
    _same((X, SCALE, OFFSET, *statistics, None, None, None, None, None), {})


@pytest.mark.parametrize("keywords", [{"is_training": False}, {}, {"exponential_avg_factor": 0.5}], ids=str)
def test_graphs_infer_the_shapes_that_tensorflow_infers(keywords):
    """All that TensorFlow's function knows."""
    unknown = tf.TensorSpec([None])
    shapes = []
    for function in (tfops.fused_batch_norm, tf.compat.v1.nn.fused_batch_norm):

        def run(x, scale, mean, function=function):
            return function(x, scale, scale, mean, mean, **keywords)

        traced = tf.function(run, input_signature=[tf.TensorSpec([None, 4, None, 3]), unknown, unknown])
        shapes.append([each.shape.as_list() for each in traced.get_concrete_function().structured_outputs])
    assert shapes[0] == shapes[1]


def test_epsilon_that_is_not_known_is_refused():
    @tf.function
    def run(epsilon):
        return tfops.fused_batch_norm(X, SCALE, OFFSET, epsilon=epsilon)

    with pytest.raises(TypeError, match=r"epsilon must be a number that is known when .* it is .*Tensor"):
        run(tf.constant(0.1))


def test_eager_calls_take_tensorflows_fast_path(monkeypatch):
    """TensorFlow has a slow one, for what its fast one does not know, such as attributes that are left to defaults."""
    for name in [name for name in vars(ops) if name.endswith("_eager_fallback")]:
        monkeypatch.setattr(ops, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    for dtype, training, residual in itertools.product((tf.float32, tf.float64), (True, False), (True, False)):
        x = tf.cast(X, dtype)
        vectors = [tf.cast(v, dtype) for v in (SCALE, OFFSET, MEAN, VARIANCE)]
        settings = {"is_training": training, "residual": x if residual else None, "activation": "silu"}
        with tf.GradientTape() as tape:
            tape.watch([x, *vectors])
            y, *_ = tfops.fused_batch_norm(x, *vectors, exponential_avg_factor=0.5, **settings)
        tape.gradient(y, [x, *vectors])
        layer = tfops.keras.BatchNormalization(dtype=dtype.name, activation="relu")
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=tf.ones(X.shape[:-1], tf.bool) if residual else None)
        tape.gradient(y, x)


# ----------------------------------------------------------------------------------------------------------------------
# float64 is float64: epsilon and exponential_avg_factor are not rounded to the ops' float32 attributes.

EPSILONS = (1e-3, 1.1e-7, 0.1)


def _wide(seed=0, shape=(6, 5)):
    rng = np.random.default_rng(seed)
    x = tf.constant(1e-3 * rng.standard_normal(shape))  # epsilon counts for all of it
    vectors = [tf.constant(rng.uniform(0.5, 2, shape[-1])) for _ in range(4)]
    return [x, *vectors[:3], vectors[3] * 1e-6, tf.constant(rng.standard_normal(shape))]


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("style", ["eager", "function", JIT])
def test_float64_attributes_are_not_rounded(style, training, epsilon):
    variables = _wide()
    settings = {"epsilon": epsilon, "exponential_avg_factor": 0.1 + epsilon, "is_training": training}
    settings |= {"axis": -1, "activation": "silu"}

    def everything(function):
        with tf.GradientTape() as outer:
            outer.watch(variables)
            with tf.GradientTape() as inner:
                inner.watch(variables)
                *others, residual = variables
                outputs = function(*others, residual=residual, **settings)
                loss = tf.add_n([tf.reduce_sum(tf.sin(each)) for each in outputs])
            first = inner.gradient(loss, variables)
            penalty = tf.add_n([tf.reduce_sum(each**2) for each in first])
        return [*outputs, *first, *outer.gradient(penalty, variables)]

    run = everything if style == "eager" else tf.function(everything, jit_compile=style == "jit")
    for got, want in zip(run(tfops.fused_batch_norm), everything(tfops.reference.fused_batch_norm), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * (np.abs(want).max() + 1))


@pytest.mark.parametrize("options", [{}, pytest.param({"renorm": True}, marks=needs_renorm), {"mask": True}], ids=str)
def test_float64_layer_agrees_with_keras(options):
    """As Keras' layer, with its own epsilon and momentum and with odd ones: outputs, gradients, moving statistics."""
    x = tf.constant(1e-3 * np.random.default_rng(0).standard_normal((6, 4, 5)))
    mask = tf.constant(np.random.default_rng(1).random((6, 4)) < 0.7) if options.get("mask") else None
    options = {name: value for name, value in options.items() if name != "mask"}
    for settings in ({}, {"epsilon": 1.3e-5, "momentum": 0.9}, {"epsilon": 0.1, "momentum": 0.123456789}):

        def run(cls, settings=settings):
            layer = cls(dtype="float64", **settings, **options)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask)
                loss = tf.reduce_sum(tf.sin(y * 3))
            gradients = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
            return [y, *gradients, *(v.value for v in layer.non_trainable_variables), layer(x, training=False)]

        for got, want in zip(run(tfops.keras.BatchNormalization), run(keras.layers.BatchNormalization), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * (np.abs(want).max() + 1))


@pytest.mark.parametrize("epsilon", [1e-50, 1e-42, 1.1e-38, 1e-32, 3e40])
def test_float64_epsilons_beyond_float32_are_not_rounded(epsilon):
    x = tf.constant(np.sqrt(epsilon) * np.random.default_rng(0).standard_normal((6, 3)))
    one, zero = tf.ones(3, x.dtype), tf.zeros(3, x.dtype)
    for training in (True, False):
        arguments = (x, one, zero, zero, one * epsilon, epsilon)
        got = tfops.fused_batch_norm(*arguments, is_training=training, axis=-1)[0]
        want = tfops.reference.fused_batch_norm(*arguments, is_training=training, axis=-1)[0]
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_graphs_without_float64_attributes_load():
    """Files written before there were any load, and mean what they meant: a float32 epsilon."""
    wide = _wide()[:5]
    graph = tf.Graph()
    with graph.as_default():
        x, *vectors = (tf.constant(v.numpy()) for v in wide)
        y = tfops.fused_batch_norm(x, *vectors, epsilon=0.1, is_training=False, axis=-1, name="norm")[0]
    definition = graph.as_graph_def()
    node = next(node for node in definition.node if node.op == "Tfops>BatchNormInference")
    assert node.attr["epsilon_bits"].i != 0
    del node.attr["epsilon_bits"]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        (got,) = tf.import_graph_def(definition, return_elements=[y.name])
        got = session.run(got)
    want = tfops.reference.fused_batch_norm(*wide, epsilon=float(np.float32(0.1)), is_training=False, axis=-1)[0]
    np.testing.assert_allclose(got, want, rtol=1e-14)
