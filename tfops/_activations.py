"""The activations in TensorFlow's own operations: what the kernels' are compared with, and their derivatives.

`ACTIVATIONS` has every one by its name, in the order of `TFOPS_ACTIVATIONS` in `csrc/batch_norm/batch_norm.h`. Some
have parameters, which may follow the name as in a call, "leaky_relu(negative_slope=0.1)"; `find` knows these too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import tensorflow as tf

Function = Callable[[tf.Tensor], tf.Tensor]

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
_GELU_FACTOR, _GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


class PiecewiseLinear(NamedTuple):
    """An activation with slope 1 where `is_on` says so, and `off_slope` elsewhere. The gradient needs that bit of z."""

    of: Function
    is_on: Function
    off_slope: float = 0.0
    kinks: tuple[float, ...] = (0.0,)


class Smooth(NamedTuple):
    """An activation with its first and second derivative, of which the gradient needs z itself."""

    of: Function
    slope: Function
    curvature: Function
    kinks: tuple[float, ...] = ()  # of the slope


def _silu() -> Smooth:
    def slope(z: tf.Tensor) -> tf.Tensor:
        s = tf.sigmoid(z)
        return s * (1 + z * (1 - s))

    def curvature(z: tf.Tensor) -> tf.Tensor:
        s = tf.sigmoid(z)
        return s * (1 - s) * (2 + z * (1 - 2 * s))

    return Smooth(lambda z: z * tf.sigmoid(z), slope, curvature)


def _hard_silu() -> Smooth:
    def slope(z: tf.Tensor) -> tf.Tensor:
        return tf.where(z >= 3, tf.ones_like(z), tf.where(z <= -3, tf.zeros_like(z), z / 3 + 0.5))

    def curvature(z: tf.Tensor) -> tf.Tensor:
        return tf.where(tf.abs(z) < 3, tf.ones_like(z) / 3, tf.zeros_like(z))

    return Smooth(lambda z: z * (tf.clip_by_value(z + 3, 0, 6) / 6), slope, curvature, kinks=(-3.0, 3.0))


def _gelu() -> Smooth:
    def below(z: tf.Tensor) -> tf.Tensor:
        return 0.5 * tf.math.erfc(-z * math.sqrt(0.5))

    def density(z: tf.Tensor) -> tf.Tensor:
        return tf.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    return Smooth(
        lambda z: z * below(z),
        lambda z: below(z) + z * density(z),
        lambda z: density(z) * (2 - z * z),
    )


def _gelu_tanh() -> Smooth:
    """z times the sigmoid of v = 2 sqrt(2 / pi) (z + 0.044715 z^3)."""

    def sigmoid(z: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(_GELU_FACTOR * z * (1 + _GELU_CUBE * z * z))

    def v_slope(z: tf.Tensor) -> tf.Tensor:
        return _GELU_FACTOR * (1 + 3 * _GELU_CUBE * z * z)

    def slope(z: tf.Tensor) -> tf.Tensor:
        s = sigmoid(z)
        return s + z * v_slope(z) * s * (1 - s)

    def curvature(z: tf.Tensor) -> tf.Tensor:
        s, d = sigmoid(z), v_slope(z)
        return s * (1 - s) * (2 * d + z * (6 * _GELU_FACTOR * _GELU_CUBE * z + d * d * (1 - 2 * s)))

    return Smooth(lambda z: z * sigmoid(z), slope, curvature)


def _leaky_relu(negative_slope: float = 0.2) -> PiecewiseLinear:
    slope = float(np.float32(negative_slope))  # as the kernels have it, and tf.nn.leaky_relu's attribute
    return PiecewiseLinear(lambda z: tf.nn.leaky_relu(z, alpha=slope), lambda z: z > 0, slope)


def _bounded_relu(max_value: float = math.inf, negative_slope: float = 0.0, threshold: float = 0.0) -> Smooth:
    """Keras' ReLU: three slopes, and so not what a bit could tell."""

    def of(z: tf.Tensor) -> tf.Tensor:
        below = negative_slope * (z - threshold) if negative_slope else tf.zeros_like(z)
        return tf.where(z <= threshold, below, tf.minimum(z, max_value))

    def slope(z: tf.Tensor) -> tf.Tensor:
        above = tf.where(z >= max_value, tf.zeros_like(z), tf.ones_like(z))
        return tf.where(z <= threshold, negative_slope * tf.ones_like(z), above)

    return Smooth(of, slope, tf.zeros_like, kinks=tuple(kink for kink in (threshold, max_value) if kink < math.inf))


def _elu(alpha: float = 1.0, scale: float = 1.0) -> Smooth:
    """scale * z, and scale * alpha * (exp(z) - 1) below 0. What is not taken must not overflow, for its gradient."""

    def exponential(z: tf.Tensor) -> tf.Tensor:
        return scale * alpha * tf.exp(tf.minimum(z, 0))

    return Smooth(
        lambda z: tf.where(z > 0, scale * z, scale * alpha * tf.math.expm1(tf.minimum(z, 0))),
        lambda z: tf.where(z > 0, scale * tf.ones_like(z), exponential(z)),
        lambda z: tf.where(z > 0, tf.zeros_like(z), exponential(z)),
        kinks=(0.0,),
    )


def _tanh() -> Smooth:
    def slope(z: tf.Tensor) -> tf.Tensor:
        return 1 - tf.square(tf.tanh(z))

    return Smooth(tf.tanh, slope, lambda z: -2 * tf.tanh(z) * slope(z))


def _sigmoid() -> Smooth:
    def slope(z: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(z) * tf.sigmoid(-z)

    return Smooth(tf.sigmoid, slope, lambda z: slope(z) * (1 - 2 * tf.sigmoid(z)))


def _mish() -> Smooth:
    def slope(z: tf.Tensor) -> tf.Tensor:
        t = tf.tanh(tf.nn.softplus(z))
        return t + z * tf.sigmoid(z) * (1 - t * t)

    def curvature(z: tf.Tensor) -> tf.Tensor:
        t, s = tf.tanh(tf.nn.softplus(z)), tf.sigmoid(z)
        return s * (1 - t * t) * (2 + z * (1 - s - 2 * t * s))

    return Smooth(lambda z: z * tf.tanh(tf.nn.softplus(z)), slope, curvature)


ACTIVATIONS: dict[str, PiecewiseLinear | Smooth] = {
    "relu": PiecewiseLinear(tf.nn.relu, lambda z: z > 0),
    "relu6": PiecewiseLinear(tf.nn.relu6, lambda z: (z > 0) & (z < 6), kinks=(0.0, 6.0)),
    "leaky_relu": _leaky_relu(),
    "silu": _silu(),
    "hard_silu": _hard_silu(),
    "gelu": _gelu(),
    "gelu_tanh": _gelu_tanh(),
    "elu": _elu(),
    "selu": _elu(_SELU_ALPHA, _SELU_SCALE),
    "tanh": _tanh(),
    "sigmoid": _sigmoid(),
    "softplus": Smooth(tf.nn.softplus, tf.sigmoid, lambda z: tf.sigmoid(z) * tf.sigmoid(-z)),
    "mish": _mish(),
}


# The parameters of activations that have any, with their defaults.
_PARAMETERS = {
    "relu": {"max_value": math.inf, "negative_slope": 0.0, "threshold": 0.0},
    "leaky_relu": {"negative_slope": 0.2},
    "elu": {"alpha": 1.0},
}


@functools.cache
def parse(activation: str) -> tuple[str, dict[str, float]]:
    """The name and the parameters of an activation, as plain as can be: relu(max_value=6) is relu6.

    Raises ValueError if it is none, or has a parameter that it does not take, or of a wrong value.
    """
    call = re.fullmatch(r"(\w+)\((.*)\)", activation)
    name = call[1] if call else activation
    if name not in ACTIVATIONS:
        names = ", ".join(map(repr, (None, *ACTIVATIONS)))
        raise ValueError(f"activation must be one of {names}, but it is {activation!r}")
    given = {}
    defaults = _PARAMETERS.get(name, {})
    for parameter in filter(str.strip, call[2].split(",")) if call else ():
        key, _, value = (part.strip() for part in parameter.partition("="))
        try:
            given[key] = float(value)
        except ValueError:
            key = ""
        if key not in defaults:
            takes = ", ".join(f"{each}=number" for each in defaults) or "nothing"
            raise ValueError(f"activation {name!r} takes {takes}, but it is {activation!r}")
        if not math.isfinite(given[key]):
            raise ValueError(f"{key} of activation must be finite, but it is {given[key]}")
    if name == "relu" and given:
        bound, slope, threshold = (given.get(key, default) for key, default in defaults.items())
        if threshold < 0:
            raise ValueError(f"threshold of activation must be >= 0, but it is {threshold}")
        if bound <= threshold:
            raise ValueError(f"max_value of activation must be > threshold, which is {threshold}, but it is {bound}")
        if threshold == 0 and bound == math.inf:
            name, given, defaults = "leaky_relu", {"negative_slope": slope}, _PARAMETERS["leaky_relu"]
        elif (bound, slope, threshold) == (6, 0, 0):
            return "relu6", {}
    if name == "leaky_relu" and given.get("negative_slope") == 0:
        return "relu", {}
    return name, {key: given[key] for key in defaults if key in given and given[key] != defaults[key]}


def canonical(activation: str) -> str:
    """The same activation as all that mean the same write it. Raises what `parse` does."""
    name, parameters = parse(activation)
    return f"{name}({', '.join(f'{key}={value}' for key, value in parameters.items())})" if parameters else name


@functools.cache
def find(activation: str) -> PiecewiseLinear | Smooth:
    """The functions of an activation. Raises what `parse` does."""
    name, parameters = parse(activation)
    if not parameters:
        return ACTIVATIONS[name]
    factories: dict[str, Callable[..., PiecewiseLinear | Smooth]] = {
        "relu": _bounded_relu,
        "leaky_relu": _leaky_relu,
        "elu": _elu,
    }
    return factories[name](**parameters)


INVERTIBLE: tuple[str | None, ...] = (None, "leaky_relu", "elu")


def is_invertible(activation: str | None) -> bool:
    """Whether z can be computed from the result: the parameters have to be positive for that."""
    name, parameters = parse(activation) if activation else (None, {})
    return name in INVERTIBLE and all(value > 0 for value in parameters.values())


class Inverse:
    """What an invertible activation was given, from what it returned, as csrc/batch_norm/in_place.h has it.

    Args:
      activation: "", or one that `is_invertible`.
      dtype: what y has been rounded to: an elu of -alpha counts as the next number.
    """

    def __init__(self, activation: str, dtype: tf.DType):
        name, parameters = parse(activation) if activation else ("", {})
        self._is_elu = name == "elu"
        self._alpha = parameters.get("alpha", 1.0)
        self._off_slope = cast(PiecewiseLinear, find(activation)).off_slope if name == "leaky_relu" else 1.0
        self._least = 2.0 ** -{tf.float16: 11, tf.bfloat16: 8, tf.float32: 24, tf.float64: 53}[dtype.base_dtype] - 1

    def _below(self, y: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(y / self._alpha, self._least, 0)

    def of(self, y: tf.Tensor) -> tf.Tensor:
        if self._is_elu:
            return tf.where(y > 0, y, tf.math.log1p(self._below(y)))
        return tf.where(y < 0, y / self._off_slope, y)

    def slope(self, y: tf.Tensor) -> tf.Tensor:
        """The activation's slope at that."""
        if self._is_elu:
            return tf.where(y > 0, tf.ones_like(y), self._alpha + y)
        return tf.where(y > 0, tf.ones_like(y), tf.fill(tf.shape(y), tf.constant(self._off_slope, y.dtype)))

    def slope_of_slope(self, y: tf.Tensor) -> tf.Tensor:
        """The derivative of `slope`, by y."""
        return tf.cast((y <= 0) & self._is_elu, y.dtype)

    def inverse_slope(self, y: tf.Tensor) -> tf.Tensor:
        """1 / slope, which is finite."""
        if self._is_elu:
            return tf.where(y > 0, tf.ones_like(y), 1 / (self._alpha * (1 + self._below(y))))
        return 1 / self.slope(y)


def is_piecewise_linear(name: str | None) -> bool:
    """Whether the gradient in training reads bits of the residual in place of it."""
    return bool(name) and isinstance(find(name), PiecewiseLinear)


def apply(name: str | None, z: tf.Tensor) -> tf.Tensor:
    return find(name).of(z) if name else z
