"""Checks and conversions of arguments that the op and its reference share."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu")
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
    axis: int
    is_training: bool | tf.Tensor


# What is a tensor already, or a bool, is looked at first and is done with: eager calls on small tensors take little
# longer than their Python.


def _tensor(name: str, value: Any, dtype: tf.DType) -> tf.Tensor:
    if isinstance(value, tf.Tensor) and value.dtype is dtype:
        return value
    if getattr(value, "dtype", None) is not None and tf.as_dtype(value.dtype) != dtype:
        raise TypeError(f"{name} must be of dtype {dtype.name}, but it is {tf.as_dtype(value.dtype).name}")
    return tf.convert_to_tensor(value, dtype, name=name)


def _is_training(value: Any) -> bool | tf.Tensor:
    """A bool if it is known by now, else a scalar bool tensor."""
    if isinstance(value, bool):
        return value
    if not tf.is_tensor(value):
        return bool(value)
    if value.dtype != tf.bool or value.shape.rank not in (0, None):
        raise ValueError(f"is_training must be a bool or a scalar bool tensor, but it is {value}")
    static = tf.get_static_value(value)
    return value if static is None else bool(static)


def convert(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    data_format: str,
    is_training: Any,
    exponential_avg_factor: float,
    axis: int | None,
    activation: str | None,
    residual: Any,
) -> Arguments:
    """All tensors as tensors. Raises TypeError or ValueError, naming the argument and its value."""
    if not isinstance(x, tf.Tensor):
        x = tf.convert_to_tensor(x, name="x")
    if x.dtype not in _DATA_TYPES:
        names = ", ".join(dtype.name for dtype in _DATA_TYPES)
        raise TypeError(f"x must be of dtype {names}, but it is {x.dtype.name}")
    if axis is None:
        if data_format not in _AXIS_OF_FORMAT:
            raise ValueError(f"data_format must be one of {', '.join(_AXIS_OF_FORMAT)}, but it is {data_format!r}")
        axis = _AXIS_OF_FORMAT[data_format]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, but it is {activation!r}")
    training = _is_training(is_training)
    if (training is not True or exponential_avg_factor != 1.0) and (mean is None or variance is None):
        raise ValueError(
            "mean and variance must be given unless is_training is True and exponential_avg_factor is 1, but they are "
            f"{mean!r} and {variance!r}, is_training is {training!r} and exponential_avg_factor is "
            f"{exponential_avg_factor!r}"
        )
    if (mean is None) != (variance is None):
        raise ValueError(f"mean and variance must be given both or neither, but they are {mean!r} and {variance!r}")
    param = param_type(x.dtype)
    return Arguments(
        x=x,
        scale=_tensor("scale", scale, param),
        offset=_tensor("offset", offset, param),
        mean=None if mean is None else _tensor("mean", mean, param),
        variance=None if variance is None else _tensor("variance", variance, param),
        residual=None if residual is None else _tensor("residual", residual, x.dtype),
        axis=int(axis),
        is_training=training,
    )
