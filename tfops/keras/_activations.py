"""Which of Keras' layers and operations are activations that the fused op has."""

from __future__ import annotations

from typing import Any, get_args

import keras
import tensorflow as tf

from tfops._arguments import Activation


def gelu_tanh(x: Any) -> Any:
    """The approximation of GELU by tanh, which keras.activations has no name for."""
    return keras.activations.gelu(x, approximate=True)


keras.saving.register_keras_serializable("tfops")(gelu_tanh)

# Those of keras.activations have tfops' names. Older Keras does not have all of them; and which of two functions `gelu`
# is, is a parameter.
_NAMES = [name for name in get_args(Activation) if hasattr(keras.activations, name)]
_FUNCTIONS = [
    *((getattr(keras.activations, name), name) for name in _NAMES),
    (gelu_tanh, "gelu_tanh"),
    (tf.nn.relu, "relu"),
    (tf.nn.relu6, "relu6"),
    (tf.nn.leaky_relu, "leaky_relu"),
    (tf.nn.silu, "silu"),
    (tf.nn.gelu, "gelu"),
    (tf.nn.elu, "elu"),
    (tf.nn.selu, "selu"),
    (tf.nn.softplus, "softplus"),
    (tf.nn.tanh, "tanh"),
    (tf.nn.sigmoid, "sigmoid"),
]
# Operations of keras.ops that have no parameters, by the names of their classes.
_OPERATIONS = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Silu": "silu",
    "HardSilu": "hard_silu",
    "Selu": "selu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Softplus": "softplus",
    "Mish": "mish",
}


def function_of(name: str) -> Any:
    """What Keras' layers take for an activation of that name."""
    return gelu_tanh if name == "gelu_tanh" else name


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
    if kind in ("LeakyReLU", "LeakyRelu"):
        return "leaky_relu" if operation.negative_slope == 0.2 else None
    if kind in ("ELU", "Elu"):
        return "elu" if operation.alpha == 1 else None
    if kind == "Gelu":
        return "gelu_tanh" if operation.approximate else "gelu"
    if kind == "ReLU" and operation.threshold == 0:
        bounds = operation.negative_slope, operation.max_value
        return {(0, None): "relu", (0, 6): "relu6", (0.2, None): "leaky_relu"}.get(bounds)
    return _OPERATIONS.get(kind)
