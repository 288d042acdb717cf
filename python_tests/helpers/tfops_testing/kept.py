"""What a model keeps of its forward pass for its backward pass, counted in the graph of a step."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

_ONLY_SHAPES = {"Shape", "ShapeN", "ZerosLike", "Rank", "Size"}
_SAME_MEMORY = {"Identity", "IdentityN", "StopGradient", "Reshape"}


def kept_bytes(model: keras.Model, batch: int, least: int = 4096) -> int:
    """The bytes of all tensors of the forward pass that the gradients read, each counted once.

    A tensor that is another's under a new name or shape is that. What is computed again for the gradient is no part of
    the forward pass: it lives for a while in the backward pass.

    Args:
      model: of one input, of known shape but for the batch.
      least: tensors of this many bytes or less do not count, nor do parameters.
    """
    x = model.inputs[0]
    found: dict[str, Any] = {}

    def origin(tensor: Any) -> Any:
        while tensor.op.type in _SAME_MEMORY:
            tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
        return tensor

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
        operations = tf.compat.v1.get_default_graph().get_operations
        forward = {operation.name for operation in operations()}
        gradients = tape.gradient(y, [x, *(variable.value for variable in model.trainable_variables)])
        for operation in operations():
            if operation.name not in forward and operation.type not in _ONLY_SHAPES:
                read = [origin(tensor) for tensor in operation.inputs if tensor.op.name in forward]
                found.update((tensor.name, tensor) for tensor in read)
        return gradients

    step.get_concrete_function(tf.TensorSpec((batch, *x.shape[1:]), x.dtype))
    parameters = {tuple(variable.shape) for variable in model.variables}
    kept = [tensor for tensor in found.values() if tensor.dtype.size and tuple(tensor.shape) not in parameters]
    sizes = [tensor.shape.num_elements() * tensor.dtype.size for tensor in kept if tensor.shape.is_fully_defined()]
    return sum(size for size in sizes if size > least)
