"""The op as a function."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfops import _gradients  # noqa: F401  (registers them)
from tfops._arguments import convert
from tfops._library import ops


def fused_batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any = None,
    variance: Any = None,
    epsilon: float = 0.001,
    data_format: str = "NHWC",
    is_training: bool | tf.Tensor = True,
    name: str | None = None,
    exponential_avg_factor: float = 1.0,
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
      mean, variance: likewise. In inference, the statistics to use; in training with exponential_avg_factor != 1, the
        running ones; else not needed.
      epsilon: > 0; added to the variance. It is kept as a float32, as TensorFlow's op does.
      data_format: "NHWC", "NDHWC" or "NWC": channels are the last dimension; "NCHW", "NCDHW" or "NCW": the second.
      is_training: a Python bool, or a scalar bool tensor (which may be a placeholder).
      name: of the op.
      exponential_avg_factor: f in [0, 1].
      axis: of the channels, in [-rank, rank), in place of data_format.
      activation: None, "relu", "relu6", "leaky_relu" (slope 0.2) or "silu".
      residual: added before the activation; of x's shape and dtype.
      unbiased: the returned variance is the unbiased estimate, with n - 1 where v has n. (Where n is 1, both have 1.)

    Returns:
      y: of x's shape and dtype.
      mean: [C]. In training (1 - f) * mean + f * m; in inference, mean.
      variance: [C], likewise. An empty batch leaves both as they were given (zeros if they were not).

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
        data_format,
        is_training,
        exponential_avg_factor,
        axis,
        activation,
        residual,
    )
    x, scale, offset, mean, variance, residual, axis, training = arguments
    common = {
        "residual": [] if residual is None else [residual],
        "axis": axis,
        "epsilon": epsilon,
        "activation": activation or "",
        "name": name,
    }

    def train() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return ops.tfops_batch_norm_training(
            x,
            scale,
            offset,
            running=[] if mean is None else [mean, variance],
            exponential_avg_factor=exponential_avg_factor,
            unbiased=unbiased,
            **common,
        )[:3]

    def infer() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        y = ops.tfops_batch_norm_inference(x, scale, offset, mean, variance, **common)
        return y, mean, variance

    if isinstance(training, bool):
        return tuple(train() if training else infer())
    return tuple(tf.cond(training, lambda: tuple(train()), infer))
