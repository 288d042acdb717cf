"""The op as a function."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from tfops import _gradients, _vectorization  # noqa: F401  (register gradients and converters)
from tfops._arguments import convert, float_attribute
from tfops._library import ops


def fused_batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any = None,
    variance: Any = None,
    epsilon: float | None = 0.001,
    data_format: str | None = "NHWC",
    is_training: bool | tf.Tensor | None = True,
    name: str | None = None,
    exponential_avg_factor: float | None = 1.0,
    *,
    axis: int | None = None,
    activation: str | None = None,
    residual: Any = None,
    unbiased: bool = True,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Batch normalization, activation and residual addition in one op.

        y = activation((x - m) / sqrt(v + epsilon) * scale + offset + residual)

    with m and v the mean and the (population) variance of x over all dimensions but `axis` in training, and `mean` and
    `variance` in inference (Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167). Signature and meaning are those
    of `tf.compat.v1.nn.fused_batch_norm`; what comes after the star is new, as are float64, any rank, and derivatives
    of the returned mean and variance. All arithmetic is in the dtype of `scale`.

    Args:
      x: float16, bfloat16, float32 or float64, of rank >= 2.
      scale, offset: [C], float32 (float64 if x is), where C is the size of x's dimension `axis`.
      mean, variance: likewise, but NumPy's arrays may have any number type. In inference, the statistics to use; in
        training with exponential_avg_factor != 1, the running ones; else not needed, and one of them, or both, may be
        missing or empty.
      epsilon: >= 0; added to the variance. It is rounded to float32, as TensorFlow's op does, unless x is float64. With
        0, a channel without variance comes out NaN. None: 0.0001, as in TensorFlow's op.
      data_format: "NHWC" (or None), "NDHWC" or "NWC": channels are the last dimension; "NCHW", "NCDHW" or "NCW": the
        second.
      is_training: a Python bool, or a scalar bool tensor (which may be a placeholder). None: True.
      name: of the op.
      exponential_avg_factor: f in [0, 1] (None: 1); rounded as epsilon is.
      axis: of the channels, in [-rank, rank), in place of data_format.
      activation: None, "relu", "relu6", "leaky_relu" (slope 0.2) or "silu".
      residual: added before the activation; of x's shape and dtype.
      unbiased: the returned variance is the unbiased estimate, with n - 1 where v has n. (Where n is 1, both have 1.)

    Returns:
      y: of x's shape and dtype.
      mean: [C]. In training (1 - f) * mean + f * m; in inference, mean.
      variance: [C], likewise. An empty batch leaves both as they were given (zeros if they were not). In training, a
        channel with infinities of one sign and no NaN has that infinity for its m, and NaN for v and y.

    Raises:
      TypeError, ValueError: naming the argument and its value.
      tf.errors.InvalidArgumentError: for shapes and values that are known only when the op runs.
    """
    arguments = convert(
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        data_format,
        is_training,
        exponential_avg_factor,
        axis,
        activation,
        residual,
        unbiased,
    )
    x, scale, offset, mean, variance, residual = arguments[:6]
    dtype, epsilon, exponential_avg_factor, axis, activation, training, unbiased = arguments[6:]
    common = {
        "residual": [] if residual is None else [residual],
        "axis": axis,
        **float_attribute("epsilon", epsilon, dtype),
        "activation": activation or "",
        "name": name,
    }

    def train() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return ops.tfops_batch_norm_training(
            x,
            scale,
            offset,
            running=[] if mean is None else [mean, variance],
            **float_attribute("exponential_avg_factor", exponential_avg_factor, dtype),
            unbiased=unbiased,
            **common,
        )[:3]

    def infer() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        y = ops.tfops_batch_norm_inference(x, scale, offset, mean, variance, **common)
        if tf.executing_eagerly():
            return y, mean, variance
        # What a graph returns should be of the graph, and of a shape that is known as far as it can be.
        statistics = tf.identity(mean), tf.identity(variance)
        for statistic in statistics:
            statistic.set_shape([None if y.shape.rank is None else y.shape[axis]])
        return y, *statistics

    try:
        if isinstance(training, bool):
            return tuple(train() if training else infer())
        return tuple(tf.cond(training, lambda: tuple(train()), infer))
    except tf.errors.InvalidArgumentError as error:
        raise tf.errors.InvalidArgumentError(error.node_def, error.op, _own_words(error.message)) from error
    except ValueError as error:
        raise ValueError(_own_words(str(error))) from error


def _own_words(message: str) -> str:
    """What the op says of its arguments, without what TensorFlow adds of the op's inputs and attributes."""
    message = re.sub(r"^\{\{function_node .*?\}\} ", "", message)
    return re.sub(r" for '\{\{node .*| \[Op:.*", "", message, flags=re.DOTALL)
