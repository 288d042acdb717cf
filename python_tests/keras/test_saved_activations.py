"""What a residual block keeps of its forward pass for its backward pass, with Keras' layers and with tfops'."""

from __future__ import annotations

import itertools

import keras
import pytest
import tensorflow as tf
from keras import layers

from tfops.keras import BatchNormalization, convert
from tfops_testing.kept import kept_bytes


def _block(activation, policy):
    """Two convolutions with batch norm, a shortcut around them, and a convolution that reads the result."""

    def convolution(x):
        return layers.Conv2D(16, 3, padding="same", use_bias=False, dtype=policy)(x)

    inputs = keras.Input((32, 32, 16), dtype=keras.DTypePolicy(policy).compute_dtype)
    y = layers.BatchNormalization(dtype=policy)(convolution(inputs))
    y = layers.Activation(activation, dtype=policy)(y)
    y = layers.BatchNormalization(dtype=policy)(convolution(y))
    y = layers.Add(dtype=policy)([y, inputs])
    return keras.Model(inputs, convolution(layers.Activation(activation, dtype=policy)(y)))


def _kept(model):
    """Bytes for each element of the block's input."""
    return kept_bytes(model, batch=8) / (8 * 32 * 32 * 16)


@pytest.mark.parametrize(
    ("activation", "policy", "wanted"),
    # Keras' layers; tfops' batch norm in their place; with the addition and the activation fused.
    [
        ("relu", "float32", (20, 20, 20.125)),  # convolutions read all but what they make, batch norms read that
        ("relu6", "float32", (20, 20, 20.125)),
        ("leaky_relu", "float32", (28, 28, 20.125)),  # the gradient reads what the activation was given
        ("silu", "float32", (28, 28, 20)),
        ("relu", "mixed_bfloat16", (14, 10, 10.125)),  # Keras' layer keeps its input as a float32
        ("silu", "mixed_bfloat16", (18, 14, 10)),
    ],
)
def test_residual_block_keeps_the_stated_bytes(activation, policy, wanted):
    model = _block(activation, policy)
    variants = model, convert(model, fold=False, verbose=0), convert(model, verbose=0)
    assert tuple(map(_kept, variants)) == wanted


class _Recomputed(layers.Layer):
    """A model that keeps its input alone; the class of docs/keras.md."""

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.model = model

    def call(self, x, training=None):
        return tf.recompute_grad(lambda x: self.model(x, training=training))(x)


def _in_parts(model, ends):
    """The same, with the parts that end at these layers each computed again for the gradient."""
    tensors = [model.input, *(model.get_layer(name).output for name in ends), model.output]
    x = inputs = keras.Input(model.input_shape[1:])
    for start, end in itertools.pairwise(tensors):
        x = _Recomputed(keras.Model(start, end))(x)
    return keras.Model(inputs, x)


NETWORKS = {
    "ResNet50": [f"conv{stage}_block{i + 1}_out" for stage, n in ((2, 3), (3, 4), (4, 6), (5, 3)) for i in range(n)],
    "DenseNet121": [f"conv{s}_block{i + 1}_concat" for s, n in ((2, 6), (3, 12), (4, 24), (5, 16)) for i in range(n)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "wanted"),
    # MB for an image: Keras' layers; tfops' with all folded; each of these in a RematScope; Keras' and tfops' in parts.
    [("ResNet50", (83.5, 80.5, 90.1, 22.7, 22.7)), ("DenseNet121", (129.3, 125.9, 133.2, 41.3, 41.3))],
)
def test_networks_keep_the_stated_megabytes(network, wanted):
    make = getattr(keras.applications, network)
    stock = make(weights=None)
    # All but the model itself and its dense layer, which Keras calls by keywords: recomputed, they fail in graphs.
    with keras.RematScope("list_of_layers", layer_names=[layer.name for layer in stock.layers[:-1]]):
        scoped = convert(make(weights=None), verbose=0)
    fused, ends = convert(stock, verbose=0), NETWORKS[network]
    variants = stock, fused, scoped, _in_parts(stock, ends), _in_parts(fused, ends)
    assert tuple(round(kept_bytes(model, batch=4) / 4e6, 1) for model in variants) == wanted


def _with_leaky_relu(layer):
    if isinstance(layer, layers.Activation):
        return layers.Activation("leaky_relu", name=layer.name)
    return type(layer).from_config(layer.get_config())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "with_addition", "wanted"),
    # MB for an image, with leaky_relu: Keras' layers; tfops' with all folded; the same in place where nothing is added.
    [("ResNet50", ("_0_bn", "_3_bn"), (116.2, 80.5, 69.5)), ("DenseNet121", (), (188.6, 125.9, 67.4))],
)
def test_networks_in_place_keep_the_stated_megabytes(network, with_addition, wanted):
    stock = getattr(keras.applications, network)(weights=None)
    stock = keras.models.clone_model(stock, clone_function=_with_leaky_relu)
    fused = convert(stock, verbose=0)
    kept = [kept_bytes(model, batch=4) for model in (stock, fused)]
    for layer in fused.layers:
        if isinstance(layer, BatchNormalization):
            layer.in_place = not layer.name.endswith(with_addition)
    assert tuple(round(each / 4e6, 1) for each in (*kept, kept_bytes(fused, batch=4))) == wanted
