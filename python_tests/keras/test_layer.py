"""The Keras layer computes what Keras' own does, trains models, and survives saving."""

from __future__ import annotations

import functools
import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing import kernel_cases


def _pair(shape, axis=-1, **kwargs):
    """Keras' layer and tfops' with the same random weights."""
    layers = [
        keras.layers.BatchNormalization(axis=axis, **kwargs),
        tfops.keras.BatchNormalization(axis=axis, **kwargs),
    ]
    rng = np.random.default_rng(0)
    for layer in layers:
        layer.build(shape)
    weights = [rng.uniform(0.5, 2, w.shape) for w in layers[0].weights]
    for layer in layers:
        layer.set_weights(weights)
    return layers


def test_arguments_are_those_of_keras():
    """Names, order and defaults; then those that are new, by name alone."""
    stock, fused = (
        inspect.signature(cls.__init__).parameters
        for cls in (keras.layers.BatchNormalization, tfops.keras.BatchNormalization)
    )
    lacking = set() if "renorm" in stock else {"renorm", "renorm_clipping", "renorm_momentum"}  # in older Keras
    own = [each.name for each in fused.values() if each.kind is each.KEYWORD_ONLY]
    assert own == ["activation", "skip_nonfinite", "virtual_batch_size", "in_place"]
    ours = [(each.name, each.default) for each in fused.values() if each.name not in {*lacking, *own}]
    assert ours == [(each.name, each.default) for each in stock.values()]


def test_every_argument_reaches_keras():
    """By place, too."""
    values = [1, 0.9, 0.01, False, False, "ones", "zeros", "ones", "zeros", "l1", "l2", "non_neg", "unit_norm"]
    renorm = {"renorm": True, "renorm_clipping": {"rmax": 2.0}, "renorm_momentum": 0.5}
    if "renorm" not in inspect.signature(keras.layers.BatchNormalization.__init__).parameters:
        renorm = {}  # in older Keras
    options = {**renorm, "synchronized": True, "name": "norm", "dtype": "mixed_float16", "trainable": False}
    stock, fused = (
        cls(*values, **options) for cls in (keras.layers.BatchNormalization, tfops.keras.BatchNormalization)
    )
    assert fused.get_config() == stock.get_config()
    for name in inspect.signature(keras.layers.BatchNormalization.__init__).parameters:
        if name not in ("self", "kwargs"):
            assert stock.get_config()[name] != keras.layers.BatchNormalization().get_config()[name], name


@pytest.mark.parametrize("axis", ["relu", None, [1, 2]])
def test_axis_that_is_no_integer_is_named(axis):
    with pytest.raises(ValueError, match=re.escape(f"axis must be an integer, but it is {axis!r}")):
        tfops.keras.BatchNormalization(axis)


def test_arguments_that_keras_does_not_know_are_refused():
    with pytest.raises(ValueError, match="momentun"):
        tfops.keras.BatchNormalization(momentun=0.9)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float64", "float16"])
@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize(("shape", "axis"), [((16, 5), -1), ((4, 6, 5, 3), -1), ((4, 3, 6, 5), 1)], ids=str)
def test_outputs_gradients_and_moving_statistics_agree_with_keras(shape, axis, training, policy):
    stock, fused = _pair(shape, axis, dtype=policy, epsilon=0.0078125)
    x = tf.constant(np.random.default_rng(1).standard_normal(shape) * 2 + 1, stock.compute_dtype)
    results = []
    for layer in (stock, fused):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
            loss = tf.reduce_sum(tf.cast(y, tf.float64) ** 2)
        assert y.dtype == stock.compute_dtype
        results.append([y, *tape.gradient(loss, [x, *layer.trainable_weights]), *layer.weights])
    tolerance = {"float64": 1e-7, "float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}[stock.compute_dtype]
    for got, want in zip(results[1], results[0], strict=True):
        want = tf.cast(want, tf.float64).numpy()
        np.testing.assert_allclose(tf.cast(got, tf.float64), want, rtol=0, atol=tolerance * (1 + np.abs(want).max()))


@pytest.mark.parametrize("kwargs", [{"scale": False}, {"center": False}, {"scale": False, "center": False}], ids=str)
def test_without_scale_or_center_agrees_with_keras(kwargs):
    stock, fused = _pair((8, 4), **kwargs)
    assert [w.name for w in fused.weights] == [w.name for w in stock.weights]
    x = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    for training in (True, False):
        np.testing.assert_allclose(fused(x, training=training), stock(x, training=training), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fused.moving_variance, stock.moving_variance, rtol=1e-6)


@pytest.mark.parametrize("activation", kernel_cases.ACTIVATIONS[1:])
def test_activation_and_residual_agree_with_keras(activation):
    stock, fused = _pair((4, 6, 6, 5))
    fused.activation = activation
    parameters = {
        "gelu_tanh": {"approximate": True},
        "leaky_relu(negative_slope=0.01)": {"negative_slope": 0.01},
        "elu(alpha=0.5)": {"alpha": 0.5},
        kernel_cases.BOUNDED_RELU: {"max_value": 2.5, "negative_slope": 0.125, "threshold": 0.5},
    }
    function = getattr(keras.activations, activation.partition("(")[0].removesuffix("_tanh"))
    plain = functools.partial(function, **parameters.get(activation, {}))
    rng = np.random.default_rng(1)
    x, residual = (tf.constant(rng.standard_normal((4, 6, 6, 5)).astype(np.float32)) for _ in range(2))
    for training in (True, False):
        want = plain(stock(x, training=training) + residual)
        np.testing.assert_allclose(fused(x, training=training, residual=residual), want, rtol=2e-5, atol=2e-5)
        mask = np.ones((4, 6, 6), bool)
        np.testing.assert_allclose(
            fused(x, training=training, residual=residual, mask=mask),
            plain(stock(x, training=training, mask=mask) + residual),
            rtol=2e-5,
            atol=2e-5,
        )


def test_frozen_layer_runs_in_inference_mode():
    _, fused = _pair((8, 4))
    fused.trainable = False
    before = [w.numpy() for w in fused.weights]
    x = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    np.testing.assert_array_equal(fused(x, training=True), fused(x, training=False))
    for weight, was in zip(fused.weights, before, strict=True):
        np.testing.assert_array_equal(weight, was)


def _residual_model():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    shortcut = tfops.keras.BatchNormalization(activation="relu")(x)
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(shortcut)
    x = tfops.keras.BatchNormalization(activation="relu")(x, residual=shortcut)
    outputs = keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs)


def test_model_trains_saves_and_loads(tmp_path):
    keras.utils.set_random_seed(0)
    model = _residual_model()
    assert model.output_shape == (None, 4)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    y = rng.integers(4, size=64)
    x = (rng.standard_normal((64, 8, 8, 3)) + 2 * y[:, None, None, None]).astype(np.float32)
    history = model.fit(x, y, batch_size=8, epochs=10, verbose=0)
    assert history.history["loss"][-1] < 0.7 * history.history["loss"][0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert again.layers[2].activation == "relu"
    # Keras' weights are this layer's weights.
    model.save_weights(tmp_path / "w.weights.h5")
    _residual_model().load_weights(tmp_path / "w.weights.h5")


def test_bad_activation_is_named():
    with pytest.raises(ValueError, match=r"activation must be one of .* but it is 'softsign'"):
        tfops.keras.BatchNormalization(activation="softsign")


@pytest.mark.parametrize("activation", kernel_cases.ACTIVATIONS[1:])
def test_own_activation_becomes_keras_own(activation, tmp_path):
    """Where a model is converted back, or folded into convolutions; also for what Keras has no name for."""
    inputs = keras.Input((4, 4, 3))
    y = tfops.keras.BatchNormalization(activation=activation)(keras.layers.Conv2D(5, 2)(inputs))
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1)(y))
    x = np.random.default_rng(1).standard_normal((2, 4, 4, 3)).astype(np.float32)
    for plain in (tfops.keras.convert(model, to="keras", verbose=0), tfops.keras.fold(model, verbose=0)):
        assert not any(isinstance(layer, tfops.keras.BatchNormalization) for layer in plain.layers)
        plain.save(tmp_path / "plain.keras")
        for each in (plain, keras.saving.load_model(tmp_path / "plain.keras", compile=False)):
            np.testing.assert_allclose(each(x), model(x), rtol=1e-5, atol=1e-5)
