"""`tfops.gradcheck.check` of Keras layers and models: both modes, their own variables, and no trace left in them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import gradcheck

RNG = np.random.default_rng(0)


def batch(*shape, dtype="float32"):
    return tf.constant(RNG.normal(size=shape), dtype)


def network(norm):
    layers = [
        keras.layers.Conv2D(3, 3),
        norm(),
        keras.layers.ReLU(),
        keras.layers.MaxPooling2D(),
        keras.layers.Dropout(0.5, seed=3),
        keras.layers.Flatten(),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential([keras.Input([6, 6, 2]), *layers])
    for variable in model.trainable_variables:
        variable.assign(RNG.normal(size=variable.shape) * 0.5)
    return model


@pytest.mark.parametrize(("norm", "order"), [(keras.layers.BatchNormalization, 1), (tfops.keras.BatchNormalization, 2)])
def test_models_pass_in_both_modes_and_stay_as_they_are(norm, order):
    model = network(norm)
    before = [variable.numpy() for variable in model.variables]
    report = gradcheck.check(model, batch(4, 6, 6, 2), order=order, samples=0)
    assert report, report
    assert {row.mode for row in report.rows} == {"training", "inference"}
    assert {row.dtype for row in report.rows} == {"float64", "float32"}
    (row,) = [row for row in report.rows if row.kind == "output"]  # dropout
    assert (row.mode, row.dtype) == ("training", "float32")
    assert "other values than in float64" in row.note
    wanted = {"inputs", *(variable.path for variable in model.trainable_variables)}
    assert {row.input for row in report.rows if row.kind == "gradient"} == wanted
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_second_derivative_of_keras_batch_norm_is_wrong_and_that_of_tfops_right():
    """Keras' moments are tf.nn.moments, whose variance takes the mean for a constant."""
    x = batch(6, 2)
    report = gradcheck.check(keras.layers.BatchNormalization(), x, forward=False)
    wrong = {(row.kind, row.input, row.mode) for row in report.rows if not row.ok}
    assert wrong == {("gradient of gradient", "inputs", "training")}
    assert gradcheck.check(tfops.keras.BatchNormalization(), x, forward=False)


def test_a_model_is_checked_once_where_its_modes_do_not_differ():
    inputs = {name: keras.Input([3], name=name) for name in "ab"}
    outputs = keras.layers.Dense(2, activation="silu")(inputs["a"] * inputs["b"])
    model = keras.Model(inputs, {"y": outputs, "z": inputs["b"]})
    report = gradcheck.check(model, {"a": batch(2, 3), "b": batch(2, 3)})
    assert report, report
    assert {row.mode for row in report.rows} == {""}
    assert {"inputs['a']", "inputs['b']"} < {row.input for row in report.rows}


def test_layers_take_several_arguments_and_are_built():
    layer = keras.layers.MultiHeadAttention(2, 3)
    report = gradcheck.check(layer, (batch(2, 3, 4), batch(2, 5, 4)), samples=1)
    assert report, report
    assert {"inputs[0]", "inputs[1]"} < {row.input for row in report.rows}


def test_embeddings_take_integers():
    model = keras.Sequential([keras.layers.Embedding(5, 3), keras.layers.LSTM(2)])
    report = gradcheck.check(model, tf.constant([[1, 2, 2], [0, 4, 1]]), order=1, samples=2)
    assert report, report
    assert any(row.input.endswith("embeddings") and row.dtype == "float64" for row in report.rows)


@keras.saving.register_keras_serializable("tests")
class Wrong(keras.layers.Layer):
    """x * scale, with another gradient of scale."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones", name="scale")

    def call(self, x, training=False):
        @tf.custom_gradient
        def multiply(x, scale):
            factor = 1.001 if training else 1.0
            return x * scale, lambda dy: (dy * scale, factor * tf.reduce_sum(dy * x, axis=0))

        return multiply(x, tf.convert_to_tensor(self.scale)) + (0.5 if training else 0.0)


def test_wrong_gradient_of_a_variable_is_named_with_its_mode():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(3, name="first"), Wrong(name="wrong")])
    report = gradcheck.check(model, batch(4, 3), forward=False, order=1)
    wrong = [row for row in report.rows if not row.ok]
    assert {(row.mode, row.input.split("/")[-1]) for row in wrong} == {("training", "scale")}
    assert "FAILED: gradient by " in str(report)
    assert " in training: " in str(report)


def test_models_without_a_config_are_checked_as_they_are():
    class Own(keras.Model):
        def __init__(self, units):
            super().__init__()
            self.dense = keras.layers.Dense(units)

        def call(self, x):
            return tf.sin(self.dense(x))

    report = gradcheck.check(Own(3), batch(4, 3))
    assert report, report
    assert {row.dtype for row in report.rows} == {"float32"}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_16_bit_models_pass(policy):
    layers = [
        keras.layers.Dense(4, activation="silu", dtype=policy),
        tfops.keras.BatchNormalization(dtype=policy),
        keras.layers.Dense(2, dtype=policy),
    ]
    report = gradcheck.check(keras.Sequential(layers), batch(8, 3), order=1)
    assert report, report
    assert {row.dtype for row in report.rows} > {"float64"}


def test_random_layers_without_a_seed_of_their_own_are_told():
    model = keras.Sequential([keras.Input([3]), keras.layers.Lambda(lambda x: x * tf.random.uniform([]))])
    report = gradcheck.check(model, batch(4, 3))
    assert not report
    assert all("the function is not deterministic" in row.note for row in report.rows)


def test_variables_of_layers_are_their_own():
    layer = keras.layers.Dense(2)
    with pytest.raises(ValueError, match="variables must be None where function is a Keras layer, but they are"):
        gradcheck.check(layer, batch(2, 3), variables=[tf.Variable(1.0)])
    layer(batch(2, 3))
    report = gradcheck.check(lambda x: layer(x), batch(2, 3), variables=layer.variables, order=1)
    assert report, report
    assert {row.input for row in report.rows} == {"inputs", *(each.path for each in layer.variables)}


def test_frozen_layers_have_no_derivative_by_their_variables():
    layer = keras.layers.Dense(2)
    layer.trainable = False
    report = gradcheck.check(layer, batch(2, 3), order=1)
    assert report, report
    assert {row.input for row in report.rows} == {"inputs"}
