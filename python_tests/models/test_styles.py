"""Graph and Keras style are the same networks: from the same weights, the same outputs and the same training steps."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer import alexnet_graph, alexnet_keras, mnist_graph, mnist_keras
from trainer.norms import graph_norm_relu, norm_relu

ALEXNET = {"image_size": 67, "classes": 12, "width": 1 / 32}


def graph_names(model: keras.Model, norm: str) -> list[str]:
    """The graph's names for `model.weights`, in order."""
    convolutions = [f"convolution_{i}" for i in (1, 2)]
    dense = ["dense", "logits"]
    if model.name == "alexnet":
        convolutions = [f"convolution_{i}" for i in ("1", "2_1", "2_2", "3", "4_1", "4_2", "5_1", "5_2")]
        dense = ["dense_1", "dense_2", "logits"]
    left = {"Conv2D": iter(convolutions), "Dense": iter(dense), "Norm": iter(["norm_1", "norm_2", "norm_3"])}
    names = []
    for layer in model.layers:
        kind = "Norm" if isinstance(layer, keras.layers.BatchNormalization) else type(layer).__name__
        if layer.weights:
            scope = next(left[kind])
            names += [f"{scope}/{weight.name}" for weight in layer.weights]
    if norm == "none" and model.name == "mnist":  # the bias is where batch norm would be
        for bias, other in (("convolution_1", "norm_1"), ("convolution_2", "norm_2"), ("dense", "norm_3")):
            names[names.index(f"{bias}/bias")] = f"{other}/beta"
    return names


def build(name: str, norm: str, style_norm: str):
    """A graph with one norm and a Keras model with the other, without dropout."""
    keras.utils.set_random_seed(0)
    if name == "mnist":
        network = mnist_graph.build_graph(steps=1000, norm=norm, dropout=0.0)
        model = mnist_keras.build_model(style_norm, dropout=0.0)
        mnist_keras.compile_model(model, 1000)
        shape, classes = (28, 28, 1), 10
    else:
        network = alexnet_graph.build_graph(steps=1000, norm=norm, dropout=0.0, **ALEXNET)
        model = alexnet_keras.build_model(norm=style_norm, dropout=0.0, **ALEXNET)
        alexnet_keras.compile_model(model, 1000)
        shape, classes = (67, 67, 3), 12
    rng = np.random.default_rng(1)
    images = rng.random((24, *shape), np.float32)
    labels = rng.integers(0, classes, 24).astype(np.int32)
    return network, model, images, labels


@pytest.mark.parametrize("name", ["mnist", "alexnet"])
@pytest.mark.parametrize(
    ("norm", "style_norm"), [("tfops", "tfops"), ("keras", "tf"), ("tf", "keras"), ("none", "none")]
)
def test_styles_have_the_same_outputs_and_first_steps(name, norm, style_norm):
    network, model, images, labels = build(name, norm, style_norm)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.weights])
    names, weights = graph_names(model, norm), model.get_weights()
    assert network.parameters == model.count_params()

    with contextlib.closing(tf.compat.v1.Session(graph=network.graph)) as session:  # the graph is not to be the default
        session.run(network.initialize)
        collection = network.graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES)
        variables = {each.op.name: each for each in collection}

        def load(names: list[str], values: list[np.ndarray]) -> None:
            with network.graph.as_default():
                for variable, value in zip(names, values, strict=True):
                    assert variables[variable].shape == value.shape
                    variables[variable].load(value, session)

        def read(names: list[str]) -> list[np.ndarray]:
            with network.graph.as_default():
                return session.run([variables[each] for each in names])

        load(names, weights)
        feed = {network.images: images, network.labels: labels}
        got, want = session.run(network.logits, feed), model.predict_on_batch(images)
        assert np.abs(want).max() > 1e-2
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())

        feed |= {network.training: True, network.dropout: network.dropout_rate}
        trained = [each for each in names if "moving" not in each]
        slots = [f"{each}/{'Adam' if name == 'mnist' else 'Momentum'}" for each in trained]
        start = weights
        for first in (True, False, False):
            step, of_graph = session.run([network.train, network.loss], feed)
            values = read(names)
            decay = float(sum(model.losses))  # a part of Keras' loss
            loss, _ = model.train_on_batch(images, labels)
            model.reset_metrics()
            np.testing.assert_allclose(of_graph, loss - decay, rtol=1e-4)
            if first:
                factor = -0.01 if name == "alexnet" else 1.0
                check_gradients([factor * each for each in read(slots)], momenta(model))
            # By the mean: Adam's first steps go by a gradient's sign, whatever its size, and a ReLU whose input is all
            # but 0 may be on in one of the two only. Few elements show it.
            for each, value, was, now in zip(names, values, start, model.get_weights(), strict=True):
                change = np.abs(now - was).mean()
                assert change > 0, each
                assert np.abs(value - now).mean() <= 2e-2 * change + 1e-6 * np.abs(now).mean(), each
        assert step == 3


def momenta(model: keras.Model) -> list[np.ndarray]:
    return [each.numpy() for each in model.optimizer.variables if each.path.endswith("momentum")]


def check_gradients(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """By the momenta after the first step, which are the gradients but for a factor."""
    largest = max(np.abs(each).mean() for each in wanted)
    for value, want in zip(got, wanted, strict=True):
        assert np.abs(value - want).mean() <= 5e-3 * np.abs(want).mean() + 1e-6 * largest


@pytest.mark.parametrize("norm", ["tfops", "keras", "tf"])
def test_norms_agree_with_numpy(norm):
    """Outputs, and moving averages of the population variance, in both styles, in float64."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 4, 4, 5)) * 2 + 1).astype(np.float32)
    wide = x.astype(np.float64)
    mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    normalized = np.maximum((wide - mean) / np.sqrt(variance + 1e-3), 0)
    moving = 0.2 * mean, 0.8 + 0.2 * variance
    later = np.maximum((wide - moving[0]) / np.sqrt(moving[1] + 1e-3), 0)

    def check(got, want):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)

    layers = norm_relu(norm)
    for training, want in ((True, normalized), (False, later)):
        y = tf.constant(x)
        for layer in layers:
            y = layer(y, training=training) if layer is layers[0] else layer(y)
        check(y, want)
    check(layers[0].moving_mean, moving[0])
    check(layers[0].moving_variance, moving[1])

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        training = tf.compat.v1.placeholder(tf.bool, [])
        y = graph_norm_relu(tf.constant(x), training, norm, "norm")
        updates = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
        session.run(tf.compat.v1.global_variables_initializer())
        check(session.run(y, {training: True}), normalized)
        got, *_ = session.run([y, *updates], {training: True})
        check(got, normalized)
        check(session.run(y, {training: False}), later)
        for each, want in zip(("moving_mean", "moving_variance"), moving, strict=True):
            check(session.run(session.graph.get_tensor_by_name(f"norm/{each}/Read/ReadVariableOp:0")), want)


def test_parameters_of_alexnet_are_the_papers():
    """The paper's layers: 60,965,224 weights and biases; batch norm has four vectors in place of the first biases."""
    layers = [  # inputs of each unit, units
        (11 * 11 * 3, 96),
        (5 * 5 * 48, 256),
        (3 * 3 * 256, 384),
        (3 * 3 * 192, 384),
        (3 * 3 * 192, 256),
        (6 * 6 * 256, 4096),
        (4096, 4096),
        (4096, 1000),
    ]
    paper = sum(inputs * units + units for inputs, units in layers)
    assert paper == 60_965_224
    model = alexnet_keras.build_model(norm="none")
    assert model.count_params() == paper
    assert model.output_shape == (None, 1000)
    shapes = [each.output.shape[1:] for each in model.layers if isinstance(each, keras.layers.MaxPooling2D)]
    assert shapes == [(27, 27, 96), (13, 13, 256), (6, 6, 256)]
    del model
    assert alexnet_graph.build_graph(steps=1).parameters == paper + 3 * (96 + 256)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_graphs_train_in_16_bits(precision):
    """16-bit activations change outputs a little, gradients arrive in float32 variables, and training goes on."""
    outputs = {}
    images = np.random.default_rng(0).random((16, 28, 28, 1), np.float32)
    labels = np.arange(16, dtype=np.int32) % 10
    for each in ("float32", precision):
        network = mnist_graph.build_graph(steps=100, precision=each, dropout=0.0)
        with tf.compat.v1.Session(graph=network.graph) as session:
            session.run(network.initialize)
            feed = {network.images: images, network.labels: labels, network.training: True}
            losses = [session.run([network.loss, network.train], feed)[0] for _ in range(15)]
            assert session.run(network.step) == 15  # float16 may have skipped steps, for a loss scale too large
            outputs[each] = losses
            assert losses[-1] < 0.5 * losses[0]
    assert outputs["float32"][0] != outputs[precision][0]
    np.testing.assert_allclose(outputs[precision][0], outputs["float32"][0], rtol=0.02)
