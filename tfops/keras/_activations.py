"""Which of Keras' layers and operations are activations that the fused op has."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import tensorflow as tf

from tfops._activations import ACTIVATIONS, canonical, parse


def gelu_tanh(x: Any) -> Any:
    """The approximation of GELU by tanh, which keras.activations has no name for."""
    return keras.activations.gelu(x, approximate=True)


keras.saving.register_keras_serializable("tfops")(gelu_tanh)


@keras.saving.register_keras_serializable("tfops")
class Parametrized:
    """A function of keras.activations with parameters, which it has no names for either."""

    def __init__(self, activation: str):
        self.activation = activation
        name, self._parameters = parse(activation)
        self._function = getattr(keras.activations, name)

    def __call__(self, x: Any) -> Any:
        return self._function(x, **self._parameters)

    def get_config(self) -> dict[str, Any]:
        return {"activation": self.activation}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Parametrized:
        return cls(**config)


# Those of keras.activations have tfops' names. Older Keras does not have all of them; and which of two functions `gelu`
# is, is a parameter.
_NAMES = [name for name in ACTIVATIONS if hasattr(keras.activations, name)]
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


def function_of(activation: str) -> Any:
    """What Keras' layers take for that activation."""
    if activation == "gelu_tanh":
        return gelu_tanh
    return Parametrized(activation) if parse(activation)[1] else activation


def layer_of(activation: str, **options: Any) -> keras.Layer:
    """A layer of Keras that applies that activation."""
    name, parameters = parse(activation)
    layers = {"relu": keras.layers.ReLU, "leaky_relu": keras.layers.LeakyReLU}  # ELU with a policy cannot be saved
    if not parameters or name not in layers:
        return keras.layers.Activation(function_of(activation), **options)
    return layers[name](**parameters, **options)


def kind_of(operation: Any) -> str:
    """The class name of one of Keras' own layers or operations that has no loss of its own, else ""."""
    if getattr(operation, "activity_regularizer", None) is not None:
        return ""
    return type(operation).__name__ if type(operation).__module__.split(".")[0] == "keras" else ""


def activation_of(operation: Any) -> str | None:
    """tfops' name of the activation that a layer or operation applies; None if there is none."""
    kind = kind_of(operation)
    if kind == "Activation":
        if isinstance(operation.activation, Parametrized):
            return operation.activation.activation
        return next((name for function, name in _FUNCTIONS if function is operation.activation), None)
    if kind in ("LeakyReLU", "LeakyRelu"):
        return _with_parameters("leaky_relu", negative_slope=operation.negative_slope)
    if kind in ("ELU", "Elu"):
        return _with_parameters("elu", alpha=operation.alpha)
    if kind == "Gelu":
        return "gelu_tanh" if operation.approximate else "gelu"
    if kind == "ReLU":
        bound = {} if operation.max_value is None else {"max_value": operation.max_value}
        return _with_parameters("relu", **bound, negative_slope=operation.negative_slope, threshold=operation.threshold)
    return _OPERATIONS.get(kind)


def _with_parameters(name: str, **parameters: Any) -> str | None:
    """The activation with its parameters; None if they have values that the kernels do not take."""
    with contextlib.suppress(TypeError, ValueError):
        return canonical(f"{name}({', '.join(f'{key}={float(value)}' for key, value in parameters.items())})")
    return None
