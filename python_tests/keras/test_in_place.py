"""in_place=True of the layer: the same training, with less memory; and what goes with it, and what does not."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfops.keras import BatchNormalization, convert
from tfops_testing.kept import kept_bytes
from tfops_testing.requirements import JIT_COMPILE, needs_renorm

RNG = np.random.default_rng(0)


def _network(in_place, activation="leaky_relu"):
    keras.utils.set_random_seed(3)
    inputs = x = keras.Input((8, 8, 3))
    for filters in (8, 16):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = BatchNormalization(activation=activation, in_place=in_place)(x)
    outputs = keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("jit_compile", [False, JIT_COMPILE])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "elu"])
def test_training_is_what_it_is_without(activation, jit_compile):
    x, y = RNG.standard_normal((32, 8, 8, 3)).astype("float32"), RNG.integers(0, 4, 32)
    weights = []
    for in_place in (True, False):
        model = _network(in_place, activation)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for got, want in zip(*weights, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_config_holds_it():
    assert "in_place" not in BatchNormalization().get_config()
    assert BatchNormalization.from_config(keras.layers.BatchNormalization().get_config()).in_place is False
    layer = BatchNormalization.from_config(BatchNormalization(in_place=True, activation="elu").get_config())
    assert layer.in_place is True
    assert layer.activation == "elu"


def _weights_of_keras(model, folder):
    """A file of the same model's with Keras' layers, which know nothing of it."""
    convert(model, to="keras", verbose=0).save_weights(folder / "model.weights.h5")
    return folder / "model.weights.h5"


def test_files_hold_it(tmp_path):
    model = _network(True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [layer.in_place for layer in again.layers if isinstance(layer, BatchNormalization)] == [True, True]
    x = RNG.standard_normal((4, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(again(x), model(x))
    again.load_weights(_weights_of_keras(model, tmp_path))
    np.testing.assert_array_equal(again(x), model(x))


def test_saved_training_steps_hold_it(tmp_path):
    """A SavedModel of a step with its gradient."""
    layer = BatchNormalization(activation="elu", in_place=True)
    layer.build((None, 5))

    class Step(tf.Module):
        def __init__(self):
            self.layer = layer

        @tf.function(input_signature=[tf.TensorSpec([None, 5])])
        def __call__(self, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = self.layer(x, training=True)
            return tape.gradient(y, x, tf.sin(y))

    step, x = Step(), tf.constant(RNG.standard_normal((7, 5)), tf.float32)
    want = step(x)
    tf.saved_model.save(step, tmp_path)
    np.testing.assert_array_equal(tf.saved_model.load(tmp_path)(x), want)


def test_conversions_carry_it():
    model = _network(True, None)
    there = convert(model, to="keras", verbose=0)
    assert not any(hasattr(layer, "in_place") for layer in there.layers)
    back = convert(there, verbose=0)
    assert not any(getattr(layer, "in_place", False) for layer in back.layers)
    again = convert(model, verbose=0)
    assert [layer.in_place for layer in again.layers if isinstance(layer, BatchNormalization)] == [True, True]


@pytest.mark.parametrize(("activation", "kept"), [("leaky_relu", False), ("elu", False), ("relu", True)])
@pytest.mark.parametrize("sequential", [False, True])
def test_what_follows_is_folded_where_it_has_an_inverse(activation, kept, sequential):
    layers = [keras.Input((8,)), BatchNormalization(in_place=True), keras.layers.Activation(activation)]
    layers.append(keras.layers.Dense(2))
    model = keras.Sequential(layers)
    if not sequential:
        model = keras.Model(model.inputs, model.outputs)
    copy = convert(model, verbose=0)
    x = RNG.standard_normal((16, 8)).astype("float32")
    np.testing.assert_allclose(copy(x, training=True), model(x, training=True), rtol=1e-5, atol=1e-6)
    with tf.GradientTape() as tape:
        y = copy(x, training=True)
    assert all(each is not None for each in tape.gradient(y, copy.trainable_variables))
    # In place nothing is kept twice: a folded activation's result is the batch norm's.
    folded = [layer for layer in copy.layers if "Folded" in type(layer).__name__]
    assert bool(folded) != kept


def test_addition_that_follows_is_not_folded():
    inputs = keras.Input((8,))
    y = keras.layers.Add()([BatchNormalization(in_place=True)(inputs), inputs])
    model = keras.Model(inputs, keras.layers.Dense(2)(y))
    copy = convert(model, verbose=0)
    x = RNG.standard_normal((16, 8)).astype("float32")
    np.testing.assert_allclose(copy(x, training=True), model(x, training=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"activation": "relu"},
            "activation must be one of None, 'leaky_relu', 'elu' where in_place is True, but .* 'relu'",
        ),
        ({"synchronized": True}, "synchronized must be False where in_place is True, but it is True"),
        pytest.param(
            {"renorm": True}, "renorm must be False where in_place is True, but it is True", marks=needs_renorm
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(keywords, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        BatchNormalization(in_place=True, **keywords)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_it_is_a_bool(value):
    with pytest.raises(TypeError, match=f"in_place must be a bool, but it is {value!r}"):
        BatchNormalization(in_place=value)


def test_calls_that_do_not_go_with_it_are_refused():
    layer = BatchNormalization(in_place=True)
    x = np.ones((4, 6, 3), "float32")
    with pytest.raises(
        ValueError, match=r"residual must be None where in_place is True, but it is of shape \(4, 6, 3\)"
    ):
        layer(x, training=True, residual=x)
    with pytest.raises(ValueError, match=r"mask must be None where in_place is True, but it is of shape \(4, 6\)"):
        layer(x, training=True, mask=np.ones((4, 6), bool))
    # In inference nothing is kept, and all goes.
    want = x + layer(x)
    np.testing.assert_array_equal(layer(x, residual=x), want)
    layer.in_place = False
    layer(x, training=True, residual=x)


def test_gamma_near_zero_is_refused():
    layer = BatchNormalization(in_place=True, gamma_initializer="zeros")
    error = pytest.raises(tf.errors.InvalidArgumentError, match="scale is too near 0 for in_place")
    with tf.device("/CPU:0"), error:  # a GPU makes the gradient NaN
        layer(np.ones((4, 3), "float32"), training=True)
    layer(np.ones((4, 3), "float32"))


@pytest.mark.parametrize(
    ("activation", "policy"), [("leaky_relu", "float32"), ("elu", "float32"), ("elu", "mixed_bfloat16")]
)
def test_a_convolution_with_batch_norm_keeps_half(activation, policy):
    """What the convolution reads and what the batch norm returns, and not what is in between."""

    def kept(in_place):
        inputs = keras.Input((32, 32, 16), dtype=keras.DTypePolicy(policy).compute_dtype)
        x = inputs
        for _ in range(3):
            x = keras.layers.Conv2D(16, 3, padding="same", use_bias=False, dtype=policy)(x)
            x = BatchNormalization(activation=activation, in_place=in_place, dtype=policy)(x)
        return kept_bytes(keras.Model(inputs, x), batch=8) / (8 * 32 * 32 * 16)

    size = 2 if policy == "mixed_bfloat16" else 4
    assert (kept(False), kept(True)) == (6 * size, 4 * size)
