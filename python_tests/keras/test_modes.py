"""Masks and renorm: the Keras layer computes what Keras' own does, with an activation and a residual fused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing.requirements import has_keras, needs_keras, needs_renorm

RENORM = {"renorm": True, "renorm_momentum": 0.8, "renorm_clipping": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.2}}
MODES = [
    pytest.param(False, {}, id="plain"),
    pytest.param(True, {}, id="mask"),
    pytest.param(False, RENORM, id="renorm", marks=needs_renorm),
    pytest.param(True, RENORM, id="mask+renorm", marks=needs_renorm),
    pytest.param(True, {"scale": False, "center": False, **RENORM}, id="bare", marks=needs_renorm),
]


def _pair(shape, axis=-1, activation=None, **kwargs):
    """Keras' layer and tfops' with the same random weights."""
    layers = [
        keras.layers.BatchNormalization(axis=axis, **kwargs),
        tfops.keras.BatchNormalization(axis=axis, activation=activation, **kwargs),
    ]
    rng = np.random.default_rng(0)
    for layer in layers:
        layer.build(shape)
    weights = [rng.uniform(0.5, 2, w.shape) for w in layers[0].weights]
    for layer in layers:
        layer.set_weights(weights)
    return layers


def _results(layer, x, residual, **kwargs):
    """y, the gradients of a loss, and the weights afterwards."""
    inputs = [x] if residual is None else [x, residual]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        if isinstance(layer, tfops.keras.BatchNormalization):
            y = layer(x, **({} if residual is None else {"residual": residual}), **kwargs)
        else:
            y = layer(x, **kwargs)
            if residual is not None:
                y = keras.activations.get("relu")(y + residual)
        loss = tf.reduce_sum(tf.cast(y, tf.float64) ** 2)
    assert y.dtype == layer.compute_dtype
    return [y, *tape.gradient(loss, [*inputs, *layer.trainable_weights]), *layer.weights]


def _assert_same(stock, fused, dtype):
    tolerance = {"float64": 1e-7, "float32": 2e-5, "float16": 4e-3, "bfloat16": 2.5e-2}[dtype]
    assert len(stock) == len(fused)
    for i, (got, want) in enumerate(zip(fused, stock, strict=True)):
        want = tf.cast(want, tf.float64).numpy()
        bound = tolerance * (1 + np.abs(want).max())
        np.testing.assert_allclose(tf.cast(got, tf.float64), want, rtol=0, atol=bound, err_msg=str(i))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((6, 7, 5), -1), ((4, 3, 6, 5), 1), ((9, 4), -1), ((5, 3, 4), 1)], ids=str)
@pytest.mark.parametrize(("masked", "kwargs"), MODES)
def test_masks_and_renorm_agree_with_keras(masked, kwargs, shape, axis, policy):
    if masked and axis == 1 and not has_keras("3.9"):
        pytest.skip("needs Keras 3.9: masks are broadcast before they are summed")
    stock, fused = _pair(shape, axis, dtype=policy, epsilon=0.0078125, momentum=0.75, **kwargs)
    assert [(w.name, w.shape) for w in fused.weights] == [(w.name, w.shape) for w in stock.weights]
    rng = np.random.default_rng(1)
    mask = tf.constant(rng.random(shape[:-1]) < 0.6) if masked else None
    for training in (True, True, False):  # twice: the second step starts from moved statistics
        x = tf.constant(rng.standard_normal(shape) * 2 + 1, stock.compute_dtype)
        _assert_same(
            *(_results(layer, x, None, training=training, mask=mask) for layer in (stock, fused)), x.dtype.name
        )


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("masked", "kwargs"), MODES)
def test_activation_and_residual_agree_with_keras(masked, kwargs, mixed):
    shape = (4, 6, 5, 3)
    policy = "mixed_bfloat16" if mixed else "float32"
    stock, fused = _pair(shape, activation="relu", dtype=policy, **kwargs)
    rng = np.random.default_rng(1)
    x, residual = (tf.constant(rng.standard_normal(shape), stock.compute_dtype) for _ in range(2))
    if mixed:
        # Keras rounds before it adds and so may fall on the other side of a kink: no element is near one here.
        residual = tf.where(rng.random(shape) < 0.5, tf.cast(8.0, x.dtype), tf.cast(-8.0, x.dtype))
    mask = tf.constant(rng.random(shape[:-1]) < 0.6) if masked else None
    for training in (True, False):
        ours, theirs = (_results(layer, x, residual, training=training, mask=mask) for layer in (fused, stock))
        _assert_same(theirs, ours, x.dtype.name)


@needs_keras("3.9", "masks are broadcast before they are summed")
@pytest.mark.parametrize(
    "mask", [np.ones((1, 4)), np.ones((6, 1), bool), np.array([[0, 1, 1, 0]]), np.zeros((6, 4))], ids=str
)
def test_masks_are_broadcast(mask):
    stock, fused = _pair((6, 4, 3))
    x = tf.constant(np.random.default_rng(1).standard_normal((6, 4, 3)), tf.float32)
    mask = tf.constant(mask)
    _assert_same(*(_results(layer, x, None, training=True, mask=mask) for layer in (stock, fused)), "float32")


def test_mask_of_wrong_rank_is_named():
    for training in (True, False):
        with pytest.raises(ValueError, match=r"mask must have one dimension less than inputs, .*\(6, 4, 3\)"):
            tfops.keras.BatchNormalization()(tf.ones((6, 4, 3)), training=training, mask=tf.ones((6, 4, 3)))


def _masked_model(layer, with_residual):
    inputs = keras.Input((5, 2))
    x = keras.layers.Masking(mask_value=7.0)(inputs)
    if with_residual:
        outputs = layer(x, residual=keras.layers.Dense(2, kernel_initializer="ones", trainable=False)(inputs))
    else:
        outputs = layer(x)
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("with_residual", [False, True])
def test_mask_of_the_inputs_is_used_and_passed_on(with_residual):
    """A mask that comes with the inputs is used, beside a residual too, and goes on with the outputs."""
    x = np.random.default_rng(0).standard_normal((8, 5, 2)).astype(np.float32)
    x[:, 3:] = 7.0
    model = _masked_model(tfops.keras.BatchNormalization(momentum=0.0), with_residual)
    y = model(x, training=True)
    layer = model.layers[-1]
    np.testing.assert_allclose(layer.moving_mean, x[:, :3].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, x[:, :3].var((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(y._keras_mask, (x != 7).any(-1))


def test_empty_batches_leave_the_moving_statistics():
    for kwargs in ({}, RENORM):
        if kwargs and "renorm" not in tfops.keras.BatchNormalization().get_config():
            continue
        _, fused = _pair((4, 3), **kwargs)
        if kwargs:
            fused.moving_variance.assign(tf.square(fused.moving_stddev) - fused.epsilon)
        before = [w.numpy() for w in fused.weights]
        assert fused(tf.zeros((0, 3)), training=True).shape == (0, 3)
        for was, weight in zip(before, fused.weights, strict=True):
            np.testing.assert_allclose(weight, was, rtol=1e-6)


@pytest.mark.parametrize("autocast", [True, pytest.param(False, marks=needs_keras("3.6", "layers that do not cast"))])
@pytest.mark.parametrize("inputs", ["float16", "float32", "float64", "int32"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float64"])
def test_dtypes_of_inputs_agree_with_keras(policy, inputs, autocast):
    stock, fused = _pair((64, 3), dtype=policy, autocast=autocast, epsilon=0.0078125)
    x = tf.constant(np.random.default_rng(0).standard_normal((64, 3)) * 9, inputs)
    for training in (True, False):
        got = fused(x, training=training)
        try:
            want = stock(x, training=training)
        except TypeError:
            pytest.skip(f"this Keras' own layer takes no {inputs} here")
        assert got.dtype == want.dtype
        # Keras computes in float32 if the inputs are integers, whatever the policy.
        tolerance = "float32" if inputs == "int32" and policy == "float64" else want.dtype.name
        _assert_same([want, *stock.weights], [got, *fused.weights], tolerance)
