"""Folded networks compute what they did, and their exports have no batch norm."""

from __future__ import annotations

import collections
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfops.keras import fold

# Image size, and how many batch norms go into weights, of how many. Every network of keras.applications that has any.
APPLICATIONS = {
    "DenseNet121": (32, 60, 121),
    "DenseNet169": (32, 84, 169),
    "DenseNet201": (32, 100, 201),
    "EfficientNetB0": (32, 49, 49),
    "EfficientNetB1": (32, 69, 69),
    "EfficientNetB2": (32, 69, 69),
    "EfficientNetB3": (32, 78, 78),
    "EfficientNetB4": (32, 96, 96),
    "EfficientNetB5": (32, 116, 116),
    "EfficientNetB6": (32, 135, 135),
    "EfficientNetB7": (32, 165, 165),
    "EfficientNetV2B0": (32, 0, 0),
    "EfficientNetV2B1": (32, 0, 0),
    "EfficientNetV2B2": (32, 0, 0),
    "EfficientNetV2B3": (32, 0, 0),
    "EfficientNetV2L": (32, 0, 0),
    "EfficientNetV2M": (32, 0, 0),
    "EfficientNetV2S": (32, 0, 0),
    "InceptionResNetV2": (75, 0, 0),
    "InceptionV3": (75, 94, 94),
    "MobileNet": (32, 27, 27),
    "MobileNetV2": (32, 52, 52),
    "MobileNetV3Large": (32, 0, 0),
    "MobileNetV3Small": (32, 0, 0),
    "NASNetLarge": (32, 0, 0),
    "NASNetMobile": (32, 0, 0),
    "ResNet101": (32, 0, 0),
    "ResNet101V2": (32, 0, 0),
    "ResNet152": (32, 0, 0),
    "ResNet152V2": (32, 0, 0),
    "ResNet50": (32, 53, 53),
    "ResNet50V2": (32, 33, 49),
    "Xception": (71, 40, 40),
}
TOLERANCE = 1e-5  # of the largest output, in float32
FAST = ("MobileNet", "MobileNetV2", "ResNet50V2")


def _randomize(model):
    """Batch norms like those of a trained network."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean"):
            variable.assign(rng.normal(0, 0.1, variable.shape))


def _norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in FAST else pytest.mark.slow) for each in APPLICATIONS]
)
def test_applications(name):
    size, into, norms = APPLICATIONS[name]
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None)
    _randomize(model)
    folded = fold(model, verbose=0)
    assert (len(_norms(model)) - len(_norms(folded)), len(_norms(model))) == (into, norms)
    images = tf.random.stateless_uniform((3, size, size, 3), (0, 0))
    images *= 255 if name.startswith(("Eff", "MobileNetV3")) else 1
    want = model(images, training=False).numpy()
    np.testing.assert_allclose(folded(images), want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.slow
def test_every_application_with_batch_norms_is_tested():
    for name in [name for name in dir(keras.applications) if name[0].isupper() and name not in APPLICATIONS]:
        assert not _norms(getattr(keras.applications, name)(weights=None)), name


# ----------------------------------------------------------------------------------------------------------------------
# Exports


@pytest.fixture(scope="module")
def net():
    """Convolutions of three kinds, a residual, and a dense layer, each with a batch norm; and the network folded."""
    inputs = keras.Input((16, 16, 3), batch_size=2)
    x = y = keras.layers.Conv2D(8, 3, use_bias=False)(inputs)
    x = y = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = keras.layers.ReLU(6)(keras.layers.BatchNormalization()(x))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(8, 1)(x))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add()([x, y]))
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Dense(8)(x)))
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    _randomize(model)
    folded = fold(model, verbose=0)
    assert (len(_norms(model)), len(_norms(folded))) == (4, 0)
    return model, folded


def _images():
    return tf.random.stateless_uniform((2, 16, 16, 3), (0, 1))


def test_a_saved_model_has_no_batch_norm(net, tmp_path):
    model, folded = net
    folded.export(tmp_path / "folded", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "folded")
    np.testing.assert_allclose(loaded.serve(_images()), model(_images()), rtol=1e-5, atol=1e-6)
    graph = loaded.signatures["serving_default"].graph.as_graph_def()
    operations = collections.Counter(
        node.op for nodes in (graph.node, *(each.node_def for each in graph.library.function)) for node in nodes
    )
    assert not [name for name in operations if "Norm" in name or "tfops" in name.lower()]
    assert not {"Mul", "Sub", "Rsqrt"} & operations.keys()
    assert operations["AddV2"] + operations["Add"] <= 1 + 5  # the residual, and biases where Keras adds them so


def test_tflite_has_no_batch_norm(net, capfd):
    model, folded = net
    content = tf.lite.TFLiteConverter.from_keras_model(folded).convert()
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], _images())
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(y, model(_images()), rtol=1e-5, atol=1e-6)
    capfd.readouterr()
    tf.lite.experimental.Analyzer.analyze(model_content=content)
    operations = collections.Counter(re.findall(r"Op#\d+ (\w+)\(", capfd.readouterr().out))
    assert operations == {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 1, "ADD": 1, "MEAN": 1, "FULLY_CONNECTED": 2}
