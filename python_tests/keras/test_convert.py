"""A converted model computes what the original does, forward and backward, under the same names; whole networks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops.keras import convert

# Image size, and what is to be folded in: additions with and without an activation after them, activations alone.
APPLICATIONS = {
    "ResNet50": (32, (0, 16, 33)),
    "ResNet50V2": (32, (0, 0, 49)),
    "MobileNet": (32, (0, 0, 27)),
    "MobileNetV2": (32, (10, 0, 35)),
    "MobileNetV3Small": (32, (6, 0, 23)),
    "DenseNet121": (32, (0, 0, 121)),
    "EfficientNetB0": (32, (0, 0, 33)),
    "InceptionV3": (75, (0, 0, 94)),
    "Xception": (71, (12, 0, 24)),
    "NASNetMobile": (32, (52, 0, 80)),
}
TOLERANCE = 1e-7  # of the largest element of a tensor, in float64


def _randomize(model):
    """Batch norms like those of a trained network."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean"):
            variable.assign(rng.normal(0, 0.1, variable.shape))


def _run(model, inputs, training):
    """Outputs, gradients by path, and weights by path after it."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = keras.tree.flatten(model(inputs, training=training))
        loss = sum(tf.reduce_sum(y * tf.cos(tf.reshape(tf.range(tf.size(y), dtype=y.dtype), y.shape))) for y in outputs)
    dx, gradients = tape.gradient(loss, [inputs, [variable.value for variable in model.trainable_variables]])
    return {
        "dx": dx,
        **{f"output {i}": y for i, y in enumerate(outputs)},
        **{f"gradient of {v.path}": each for v, each in zip(model.trainable_variables, gradients, strict=True)},
        **{weight.path: weight.numpy() for weight in model.weights},
    }


def _assert_same(got, want, inputs, tolerance=TOLERANCE):
    """That the models agree in training, then, with the moving statistics of that, in inference."""
    assert {v.path: v.trainable for v in got.weights} == {v.path: v.trainable for v in want.weights}
    for training in (True, False):
        wanted, results = (_run(model, inputs, training) for model in (want, got))
        assert results.keys() == wanted.keys()
        gradients = [np.abs(value).max() for name, value in wanted.items() if "gradient" in name and value is not None]
        for name, value in wanted.items():
            if value is None:
                assert results[name] is None, name
                continue
            scale = np.abs(value).max()
            if "gradient" in name:  # of a bias before a batch norm it is 0 but for rounding errors
                scale = max(scale, 1e-6 * max(gradients))
            np.testing.assert_allclose(results[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


def _folds(model):
    """How many batch norms have an addition alone, an addition and an activation, an activation alone."""
    calls = [node.arguments.kwargs for layer in model.layers for node in layer._inbound_nodes]
    folded = [kwargs["folded"] for kwargs in calls if "folded" in kwargs]
    added = [what for what in folded if what.startswith("add")]
    return added.count("add"), len(added) - added.count("add"), len(folded) - len(added)


# Ten seconds each, and their graphs are like the others'.
SLOW = {name: [pytest.mark.slow] for name in ("DenseNet121", "InceptionV3", "NASNetMobile", "ResNet50V2", "Xception")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, [])) for name in APPLICATIONS])
def test_applications_convert_there_and_back(name, float64):
    size, folds = APPLICATIONS[name]
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None)
    _randomize(model)
    config, weights = model.get_config(), model.get_weights()
    fused = convert(model, verbose=0)
    assert not [layer for layer in fused.layers if type(layer) is keras.layers.BatchNormalization]
    assert _folds(fused) == folds
    back = convert(fused, to="keras", verbose=0)
    assert not [layer for layer in back._flatten_layers() if isinstance(layer, tfops.keras.BatchNormalization)]
    for each in (fused, back):
        assert [layer.name for layer in each.layers] == [layer.name for layer in model.layers]
        assert [variable.path for variable in each.weights] == [variable.path for variable in model.weights]
        for got, want in zip(each.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(got, want)
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in model.layers]
    # The original is as it was.
    assert model.get_config() == config
    for got, want in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(got, want)
    images = tf.random.stateless_uniform((3, size, size, 3), (0, 0), dtype=tf.float64)
    images *= 255 if name.startswith(("Eff", "MobileNetV3")) else 1
    y = model(images, training=False)
    np.testing.assert_allclose(back(images, training=False), y, rtol=0, atol=TOLERANCE * np.abs(y).max())
    _assert_same(fused, model, images)
