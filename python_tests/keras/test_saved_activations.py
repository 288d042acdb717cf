"""What a residual block keeps of its forward pass for its backward pass, with Keras' layers and with tfops'."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf
from keras import layers

from tfops.keras import convert

_ONLY_SHAPES = {"Shape", "ShapeN", "ZerosLike", "Rank", "Size"}


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
    """Bytes for each element of the block's input: of all tensors of the forward pass that the gradients read."""
    x = model.inputs[0]
    found = {}

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
        operations = tf.compat.v1.get_default_graph().get_operations
        forward = {operation.name for operation in operations()}
        gradients = tape.gradient(y, [x, *(variable.value for variable in model.trainable_variables)])
        for operation in operations():
            if operation.name not in forward and operation.type not in _ONLY_SHAPES:
                found.update((tensor.name, tensor) for tensor in operation.inputs if tensor.op.name in forward)
        return gradients

    step.get_concrete_function(tf.TensorSpec((8, *x.shape[1:]), x.dtype))
    parameters = {tuple(variable.shape) for variable in model.variables}
    kept = [tensor for tensor in found.values() if tensor.dtype.size and tuple(tensor.shape) not in parameters]
    sizes = [tensor.shape.num_elements() * tensor.dtype.size for tensor in kept if tensor.shape.is_fully_defined()]
    return sum(size for size in sizes if size > 4096) / (8 * 32 * 32 * 16)  # the rest has an element a channel


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
