"""Checks and conversions of arguments that the op and its reference share."""

from __future__ import annotations

import operator
import struct
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfops import _activations

ACTIVATIONS: tuple[str | None, ...] = (None, *_activations.ACTIVATIONS)
_AXIS_OF_FORMAT = {"NHWC": -1, "NDHWC": -1, "NWC": -1, "NCHW": 1, "NCDHW": 1, "NCW": 1}
_DATA_TYPES = (tf.float32, tf.bfloat16, tf.float16, tf.float64)


def param_type(data_type: tf.DType) -> tf.DType:
    """The type of parameters and statistics, and of all arithmetic: float64 for float64, else float32."""
    return tf.float64 if data_type is tf.float64 else tf.float32


class Arguments(NamedTuple):
    x: tf.Tensor
    scale: tf.Tensor
    offset: tf.Tensor
    mean: tf.Tensor | None
    variance: tf.Tensor | None
    residual: tf.Tensor | None
    dtype: tf.DType  # of x, which takes a while to tell
    epsilon: float
    exponential_avg_factor: float
    axis: int
    activation: str | None
    is_training: bool | tf.Tensor
    unbiased: bool
    virtual_batch_size: int | None
    in_place: bool = False


def float_attribute(name: str, value: float, dtype: tf.DType) -> dict[str, Any]:
    """A number as the ops' attributes: a float32, and beside float64 data its bits (csrc/tensorflow/ops.cc).

    None is left to its default: TensorFlow's fast way to call an op eagerly does not know these.
    """
    if dtype is not tf.float64:
        return {name: value, f"{name}_bits": 0}
    return {name: value, f"{name}_bits": struct.unpack("q", struct.pack("d", value))[0]}


def value_of(attributes: dict[str, Any], name: str) -> float:
    """The number as the kernels take it: an eager op's attributes are as they were given, not rounded yet."""
    bits = attributes[f"{name}_bits"]
    return struct.unpack("d", struct.pack("q", bits))[0] if bits else float(np.float32(attributes[name]))


# What is a tensor already, or a bool, is looked at first and is done with: eager calls on small tensors take little
# longer than their Python.


def _tensor(name: str, value: Any, dtype: tf.DType) -> tf.Tensor:
    if isinstance(value, tf.Tensor):
        if value.dtype is dtype:
            return value
        if value.dtype.base_dtype is dtype:  # a reference, such as an assignment returns in TensorFlow 1
            return tf.identity(value)
    if getattr(value, "dtype", None) is not None and tf.as_dtype(value.dtype).base_dtype != dtype:
        raise TypeError(f"{name} must be of dtype {dtype.name}, but it is {tf.as_dtype(value.dtype).name}")
    try:
        return tf.convert_to_tensor(value, dtype, name=name)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} cannot be made a tensor of dtype {dtype.name}: {error}") from error


def _statistic(name: str, value: Any, dtype: tf.DType) -> tf.Tensor | None:
    """As TensorFlow's function, which takes NumPy's statistics in any number type."""
    if value is None:
        return None
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiubO":
        try:
            value = value.astype(dtype.as_numpy_dtype)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must hold numbers: {error}") from error
    return _tensor(name, value, dtype)


def _number(name: str, value: Any, default: float) -> float:
    """None is the default of TensorFlow's op."""
    if isinstance(value, float):
        return value
    if value is None:
        return default
    static = tf.get_static_value(value) if tf.is_tensor(value) else value
    try:
        if isinstance(static, (str, bytes)):
            raise TypeError
        return float(static)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be a number that is known when the op is made, but it is {value!r}") from error


def _bool(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_, int, np.integer)) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return bool(value)
    raise TypeError(f"{name} must be a bool, but it is {value!r}")


def _axis(axis: Any, data_format: Any) -> int:
    if axis is not None:
        try:
            return operator.index(axis)
        except TypeError as error:
            raise TypeError(f"axis must be an integer, but it is {axis!r}") from error
    name = "NHWC" if data_format is None else data_format
    name = name.decode(errors="replace") if isinstance(name, bytes) else name
    if not isinstance(name, str) or name not in _AXIS_OF_FORMAT:
        raise ValueError(f"data_format must be one of {', '.join(_AXIS_OF_FORMAT)} or None, but it is {data_format!r}")
    return _AXIS_OF_FORMAT[name]


def activation_argument(activation: Any) -> str | None:
    """The activation in its plainest form."""
    if activation is None or (isinstance(activation, str) and activation in _activations.ACTIVATIONS):
        return activation
    if isinstance(activation, str):
        return _activations.canonical(activation)
    raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, but it is {activation!r}")


def check_virtual_batch_size(value: Any) -> int:
    try:
        size = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError as error:
        raise TypeError(f"virtual_batch_size must be an integer or None, but it is {value!r}") from error
    if size < 1:
        raise ValueError(f"virtual_batch_size must be > 0 or None, but it is {value!r}")
    return size


def check_in_place(activation: str | None, **others: Any) -> None:
    """Raises ValueError where the activation, or one of the others that says something, does not go with in_place."""
    name, parameters = _activations.parse(activation) if activation else (None, {})
    if name not in _activations.INVERTIBLE:
        names = ", ".join(map(repr, _activations.INVERTIBLE))
        raise ValueError(f"activation must be one of {names} where in_place is True, but it is {activation!r}")
    for key, value in parameters.items():
        if value <= 0:
            raise ValueError(f"{key} of activation must be > 0 where in_place is True, but it is {value}")
    for name, value in others.items():
        if value is not None and value is not False:
            wanted = False if isinstance(value, bool) else None
            shown = value if isinstance(value, (bool, int)) else f"of shape {np.shape(value)}"
            raise ValueError(f"{name} must be {wanted} where in_place is True, but it is {shown}")


def _in_place(value: Any, activation: str | None, **others: Any) -> bool:
    in_place = _bool("in_place", value)
    if in_place:
        check_in_place(activation, **others)
    return in_place


def _unless_empty(statistic: tf.Tensor | None) -> tf.Tensor | None:
    """A statistic that is not needed: an empty one is none at all, as for TensorFlow's function.

    (Where its shape is not known yet, the op does the same later.)
    """
    return None if statistic is None or statistic.shape.num_elements() == 0 else statistic


def _is_training(value: Any) -> bool | tf.Tensor:
    """A bool if it is known by now, else a scalar bool tensor. None is True, the default of TensorFlow's op."""
    if isinstance(value, bool):
        return value
    if value is None:
        return True
    if not tf.is_tensor(value):
        return _bool("is_training", value)
    if tf.as_dtype(value.dtype).base_dtype != tf.bool or tf.TensorShape(value.shape).rank not in (0, None):
        raise ValueError(f"is_training must be a bool or a scalar bool tensor, but it is {value}")
    static = tf.get_static_value(value)
    return tf.convert_to_tensor(value) if static is None else bool(static)


def convert(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    epsilon: Any,
    data_format: Any,
    is_training: Any,
    exponential_avg_factor: Any,
    axis: Any,
    activation: Any,
    residual: Any,
    unbiased: Any,
    virtual_batch_size: Any,
    in_place: Any = False,
) -> Arguments:
    """All tensors as tensors. Raises TypeError or ValueError, naming the argument and its value."""
    if not isinstance(x, tf.Tensor):
        try:
            x = tf.convert_to_tensor(x, name="x")
        except (TypeError, ValueError) as error:
            raise type(error)(f"x cannot be made a tensor: it is a {type(x).__name__}") from error
    dtype = x.dtype
    if dtype not in _DATA_TYPES:
        if dtype.base_dtype not in _DATA_TYPES:
            names = ", ".join(each.name for each in _DATA_TYPES)
            raise TypeError(f"x must be of dtype {names}, but it is {dtype.name}")
        x, dtype = tf.identity(x), dtype.base_dtype  # a reference
    training = _is_training(is_training)
    epsilon = _number("epsilon", epsilon, 0.0001)
    exponential_avg_factor = _number("exponential_avg_factor", exponential_avg_factor, 1.0)
    needs_statistics = training is not True or exponential_avg_factor != 1.0
    if needs_statistics and (mean is None or variance is None):
        raise ValueError(
            "mean and variance must be given unless is_training is True and exponential_avg_factor is 1, but they are "
            f"{mean!r} and {variance!r}, is_training is {training!r} and exponential_avg_factor is "
            f"{exponential_avg_factor!r}"
        )
    param = param_type(dtype)
    scale, offset = _tensor("scale", scale, param), _tensor("offset", offset, param)
    mean, variance = _statistic("mean", mean, param), _statistic("variance", variance, param)
    if not needs_statistics:
        mean, variance = _unless_empty(mean), _unless_empty(variance)
        if (mean is None) != (variance is None):
            mean, variance = (tf.zeros_like(scale) if each is None else each for each in (mean, variance))
    return Arguments(
        x,
        scale,
        offset,
        mean,
        variance,
        residual if residual is None else _tensor("residual", residual, dtype),
        dtype,
        epsilon,
        exponential_avg_factor,
        axis if type(axis) is int else _axis(axis, data_format),
        activation if activation is None else activation_argument(activation),
        training,
        unbiased if isinstance(unbiased, bool) else _bool("unbiased", unbiased),
        virtual_batch_size if virtual_batch_size is None else check_virtual_batch_size(virtual_batch_size),
        in_place
        if in_place is False
        else _in_place(in_place, activation, residual=residual, virtual_batch_size=virtual_batch_size),
    )
