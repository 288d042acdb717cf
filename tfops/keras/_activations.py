"""Which of Keras' layers and operations are activations that the fused op has."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

_FUNCTIONS = [
    (keras.activations.relu, "relu"),
    (keras.activations.relu6, "relu6"),
    (keras.activations.leaky_relu, "leaky_relu"),
    (keras.activations.silu, "silu"),
    (tf.nn.relu, "relu"),
    (tf.nn.relu6, "relu6"),
    (tf.nn.leaky_relu, "leaky_relu"),
    (tf.nn.silu, "silu"),
]


def kind_of(operation: Any) -> str:
    """The class name of one of Keras' own layers or operations that has no loss of its own, else ""."""
    if getattr(operation, "activity_regularizer", None) is not None:
        return ""
    return type(operation).__name__ if type(operation).__module__.split(".")[0] == "keras" else ""


def activation_of(operation: Any) -> str | None:
    """tfops' name of the activation that a layer or operation applies; None if there is none."""
    kind = kind_of(operation)
    if kind == "Activation":
        return next((name for function, name in _FUNCTIONS if function is operation.activation), None)
    if kind in ("Relu", "Relu6", "Silu"):
        return kind.lower()
    if kind in ("LeakyReLU", "LeakyRelu"):
        return "leaky_relu" if operation.negative_slope == 0.2 else None
    if kind == "ReLU" and operation.threshold == 0:
        bounds = operation.negative_slope, operation.max_value
        return {(0, None): "relu", (0, 6): "relu6", (0.2, None): "leaky_relu"}.get(bounds)
    return None
