"""Folded networks compute what they did, and their exports have no batch norm."""

from __future__ import annotations

import collections
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfops.keras import fold
from tfops_testing.folded_models import norms, randomize

# How many batch norms do not follow a convolution, in every network of keras.applications that has batch norms.
SOME = {
    **{"DenseNet121": 62, "DenseNet169": 86, "DenseNet201": 102},
    **{"ResNet50V2": 17, "ResNet101V2": 34, "ResNet152V2": 51},
    **{"NASNetLarge": 4, "NASNetMobile": 4},  # which put two convolutions side by side
}
OTHERS = (
    *("EfficientNetB0", "EfficientNetB1", "EfficientNetB2", "EfficientNetB3", "EfficientNetB4", "EfficientNetB5"),
    *("EfficientNetB6", "EfficientNetB7", "EfficientNetV2B0", "EfficientNetV2B1", "EfficientNetV2B2"),
    *("EfficientNetV2B3", "EfficientNetV2S", "EfficientNetV2M", "EfficientNetV2L", "InceptionResNetV2", "InceptionV3"),
    *("MobileNet", "MobileNetV2", "MobileNetV3Large", "MobileNetV3Small"),
    *("ResNet50", "ResNet101", "ResNet152", "Xception"),
)
KEPT = SOME | dict.fromkeys(OTHERS, 0)
SIZES = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}  # of images; others take 32 pixels
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}  # of the largest output
FAST = ("MobileNet", "MobileNetV2", "ResNet50V2")


def _check(name, dtype):
    size = SIZES.get(name, 32)
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None)
    randomize(model, kernels=False)
    folded = fold(model, verbose=0)
    assert len(norms(folded)) == KEPT[name] < len(norms(model))
    images = tf.random.stateless_uniform((3, size, size, 3), (0, 0), dtype=dtype)
    images *= 255 if name.startswith(("Eff", "MobileNetV3")) else 1
    want = model(images, training=False).numpy()
    np.testing.assert_allclose(folded(images), want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max())


@pytest.mark.parametrize("name", [pytest.param(each, marks=[] if each in FAST else pytest.mark.slow) for each in KEPT])
def test_applications(name):
    _check(name, "float32")


@pytest.mark.parametrize("name", FAST)
def test_applications_in_float64(name, float64):
    _check(name, "float64")


@pytest.mark.slow
def test_every_application_with_batch_norms_is_tested():
    for name in [name for name in dir(keras.applications) if name[0].isupper() and name not in KEPT]:
        assert not norms(getattr(keras.applications, name)(weights=None)), name


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
    randomize(model, kernels=False)
    folded = fold(model, verbose=0)
    assert (len(norms(model)), len(norms(folded))) == (4, 0)
    return model, folded


def _images():
    return tf.random.stateless_uniform((2, 16, 16, 3), (0, 1))


def test_a_saved_model_has_no_batch_norm(net, tmp_path):
    model, folded = net
    folded.export(tmp_path / "folded")
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
