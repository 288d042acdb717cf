"""Arguments of the ops as tensors."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from . import kernel_cases


def make_problem(shape, axis, dtype, seed=0):
    """x, scale, offset, mean, variance, residual as tensors."""
    case = kernel_cases.Case(tuple(shape), axis, dtype.name)
    arrays = kernel_cases.inputs(case, seed)
    return tuple(
        tf.constant(arrays[name].astype(np.float64), dtype if name in ("x", "residual") else parameter_type(dtype))
        for name in ("x", "scale", "offset", "mean", "variance", "residual")
    )


def parameter_type(dtype):
    """Of scale, offset and statistics beside x of that type."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def to_float64(tensor):
    return tf.cast(tensor, tf.float64).numpy()
