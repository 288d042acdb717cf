"""Batch normalization in plain TensorFlow: the readable oracle of the op, on any device and with any derivative."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfops import _activations, _virtual_batches
from tfops._arguments import Arguments, convert


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
    virtual_batch_size: int | None = None,
    in_place: bool = False,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What `tfops.fused_batch_norm` computes, with the same arguments and results, op by op.

        y = activation((x - mean) / sqrt(variance + epsilon) * scale + offset + residual)

    Args:
        x: As for `tfops.fused_batch_norm`, but of a known rank. So are all others.
        scale: Of shape [C].
        offset: Of shape [C].
        mean: Of shape [C], or None.
        variance: Of shape [C], or None.
        epsilon: Added to the variance.
        data_format: "NHWC", "NDHWC", "NWC", "NCHW", "NCDHW" or "NCW".
        is_training: A bool, or a scalar bool tensor.
        name: The name of the scope that the operations are made in.
        exponential_avg_factor: The share of the batch in the returned statistics.
        axis: The dimension of the channels. It replaces `data_format`.
        activation: As for `tfops.fused_batch_norm`.
        residual: Of x's shape and dtype, or None.
        unbiased: Whether the returned variance is the unbiased estimate.
        virtual_batch_size: As for `tfops.fused_batch_norm`.
        in_place: Without effect: what is kept here is what TensorFlow's operations keep.

    Returns:
        y: Of the shape and dtype of x.
        mean: Of shape [C].
        variance: Of shape [C].

    Raises:
        TypeError: As `tfops.fused_batch_norm`.
        ValueError: Likewise. Also where that raises `tf.errors.InvalidArgumentError`, if the shapes are known.

    Examples:
        >>> import tensorflow as tf
        >>> import tfops
        >>> x = tf.random.stateless_normal([8, 4, 4, 3], seed=[0, 0])
        >>> arguments = {"scale": [1.0, 2.0, 3.0], "offset": [0.0, 1.0, 2.0], "activation": "silu"}
        >>> fused = tfops.fused_batch_norm(x, **arguments)
        >>> plain = tfops.reference.fused_batch_norm(x, **arguments)
        >>> [bool(tf.reduce_all(tf.abs(a - b) < 1e-4)) for a, b in zip(fused, plain)]
        [True, True, True]
    """
    with tf.name_scope(name or "ReferenceBatchNorm"):
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
            virtual_batch_size,
            in_place,
        )
        if (rank := arguments.x.shape.rank) is None:
            raise ValueError(f"x must have a known rank >= 2, but its rank is {rank}")
        _check(arguments)
        return _compute(arguments)


def _compute(arguments: Arguments) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    if arguments.virtual_batch_size is not None:
        return _virtual_batches.fused_batch_norm(arguments, _compute)
    x, scale, offset, mean, variance, residual = arguments[:6]
    dtype, epsilon, exponential_avg_factor, axis, activation, training, unbiased = arguments[6:13]
    param = scale.dtype
    channel_axis = axis % x.shape.rank
    others = [i for i in range(x.shape.rank) if i != channel_axis]
    vector_shape = [-1 if i == channel_axis else 1 for i in range(x.shape.rank)]
    wide = tf.cast(x, param)

    def normalize(center: tf.Tensor, spread: tf.Tensor) -> tf.Tensor:
        slope = tf.reshape(scale * tf.math.rsqrt(spread + epsilon), vector_shape)
        z = (wide - tf.reshape(center, vector_shape)) * slope + tf.reshape(offset, vector_shape)
        if residual is not None:
            z += tf.cast(residual, param)
        return tf.cast(_activations.apply(activation, z), dtype)

    def train() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        count = tf.cast(tf.size(x, out_type=tf.int64), param) / tf.cast(tf.maximum(tf.size(scale), 1), param)
        center = tf.math.divide_no_nan(tf.reduce_sum(wide, others), count)
        squares = tf.reduce_sum(tf.square(wide - tf.reshape(center, vector_shape)), others)
        spread = tf.math.divide_no_nan(squares, count)
        estimate = squares / tf.maximum(count - 1, 1) if unbiased else spread
        y = normalize(center, spread)
        factor = tf.where(count > 0, tf.constant(exponential_avg_factor, param), 0)
        old_mean, old_variance = (tf.zeros_like(scale),) * 2 if mean is None else (mean, variance)
        return y, (1 - factor) * old_mean + factor * center, (1 - factor) * old_variance + factor * estimate

    def infer() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return normalize(mean, variance), tf.identity(mean), tf.identity(variance)

    if isinstance(training, bool):
        return train() if training else infer()
    return tuple(tf.cond(training, train, infer))


def _check(arguments: Arguments) -> None:
    """What broadcasting and plain arithmetic would let pass, as far as it is known. The rank of x may not be."""
    x, axis = arguments.x, arguments.axis
    rank = x.shape.rank
    if rank is not None:
        if rank < 2:
            raise ValueError(f"x must have rank >= 2, but its rank is {rank}")
        if not -rank <= axis < rank:
            raise ValueError(f"axis must be in [-rank, rank) = [{-rank}, {rank}), but it is {axis}")
    channels = None if rank is None else x.shape[axis]
    for name in ("scale", "offset", "mean", "variance"):
        vector = getattr(arguments, name)
        if vector is not None and not vector.shape.is_compatible_with([channels]):
            raise ValueError(f"{name} must have shape [{channels}], but it has {vector.shape}")
    if arguments.residual is not None and not arguments.residual.shape.is_compatible_with(x.shape):
        raise ValueError(f"residual must have the shape of x, {x.shape}, but it has {arguments.residual.shape}")
    if arguments.virtual_batch_size is not None and arguments.is_training is not False:
        _virtual_batches.check(x, axis, arguments.virtual_batch_size)
    if not 0 <= arguments.epsilon < float("inf"):
        raise ValueError(f"epsilon must be finite and >= 0, but it is {arguments.epsilon}")
    if not 0 <= arguments.exponential_avg_factor <= 1:
        raise ValueError(f"exponential_avg_factor must be in [0, 1], but it is {arguments.exponential_avg_factor}")
