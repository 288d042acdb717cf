"""The phases of batch normalization by themselves: statistics of some of the elements, or of all replicas' batches.

moments, then normalize; backward the gradient's moments, then the gradient. In between there is room for one collective
each way, or for a correction of scale and offset.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import tensorflow as tf

from tfops import _fallback, _gpus, _gradients, _vectorization  # noqa: F401  (register gradients and converters)
from tfops._arguments import float_attribute, param_type
from tfops._library import ops


class Statistics(NamedTuple):
    """What a batch is normalized with; the vectors are [C], of the param type.

    mean = sum(x) / (count + ballast) and variance = sum((x - mean)^2) / (count + ballast), over the elements that are
    kept, of all replicas if `synchronized`.
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor
    ballast: float
    keep: tf.Tensor | None
    synchronized: bool


def replicas() -> int:
    """The replicas that this code runs on together: 1 outside of a `tf.distribute` strategy's `run`."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def _phase_ops() -> Any:
    """The ops, or what takes their place."""
    return _fallback if _gpus.need_fallback() else ops


def moments(x: tf.Tensor, axis: int, keep: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """count, mean and variance of x over all dimensions but `axis`: [C]. The arguments are those of the next."""
    keeps = [] if keep is None else [keep]
    return tuple(_phase_ops().tfops_batch_norm_moments(x, keep=keeps, axis=axis, U=param_type(x.dtype)))


def batch_statistics(
    x: tf.Tensor, axis: int, *, keep: tf.Tensor | None = None, ballast: float = 0.0, synchronized: bool = False
) -> Statistics:
    """The statistics of x over all dimensions but `axis`. Without elements, mean and variance are 0.

    Args:
      x: float16, bfloat16, float32 or float64, of rank >= 2.
      axis: of the channels, in [-rank, rank).
      keep: bool, of x's shape without the last dimension: which elements count. None: all.
      ballast: what divisors have in excess of the number of elements; >= 0.
      synchronized: over all replicas. They may hold different numbers of elements, or none; one collective.
    """
    count, mean, variance = moments(x, axis, keep)
    synchronized = synchronized and replicas() > 1
    if synchronized:
        packed = tf.concat([count, mean, variance], 0)[None]
        gathered = tf.distribute.get_replica_context().all_gather(packed, 0)
        count, mean, variance = _merge(ballast, *tf.split(gathered, 3, axis=1))
    elif ballast:
        count, mean, variance = _merge(ballast, count[None], mean[None], variance[None])
    return Statistics(count, mean, variance, ballast, keep, synchronized)


def _merge(ballast: float, count: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """From [parts, C] to [C]: Chan's rule for any number of parts, in float64; `Merge` of csrc/batch_norm/moments.h."""
    n, means, variances = (tf.cast(tensor, tf.float64) for tensor in (count, mean, variance))
    total = tf.reduce_sum(n, 0)
    center = tf.math.divide_no_nan(tf.reduce_sum(n * means, 0), total + ballast)
    m2 = tf.reduce_sum(n * (variances + tf.square(means - center)), 0)
    return tuple(tf.cast(t, mean.dtype) for t in (total, center, tf.math.divide_no_nan(m2, total + ballast)))


def normalize(
    x: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    statistics: Statistics,
    *,
    axis: int,
    epsilon: float,
    activation: str | None = None,
    residual: tf.Tensor | None = None,
) -> tf.Tensor:
    """activation((x - mean) / sqrt(variance + epsilon) * scale + offset + residual), where the statistics are x's own.

    That is, x's gradient takes in that they follow from it, on all replicas if they were synchronized (one collective).
    The statistics have no gradient here.
    """
    attributes = {"axis": axis, "activation": activation or "", **float_attribute("epsilon", epsilon, x.dtype)}
    keep = [] if statistics.keep is None else [statistics.keep]
    phases = _phase_ops()
    scope = _gpus.beside_forward if phases is ops else contextlib.nullcontext

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def apply(x: Any, scale: Any, offset: Any, count: Any, mean: Any, variance: Any, *residual: Any) -> Any:
        vectors = (scale, offset, mean, variance)
        needed = list(residual) if activation else []

        def gradient(dy: Any) -> list[Any]:
            with scope():
                dscale, doffset, dmean, dvariance = phases.tfops_batch_norm_gradient_moments(
                    dy, x, *vectors, residual=needed, **attributes
                )
            if statistics.synchronized:
                packed = tf.concat([dmean, dvariance], 0)
                total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, packed)
                dmean, dvariance = tf.split(total, 2)
            divisor = count + statistics.ballast
            tilt = tf.math.divide_no_nan(2 * dvariance, divisor)
            # The sum of x - mean is not quite zero if there is ballast.
            shift = tf.math.divide_no_nan(dmean - tilt * statistics.ballast * mean, divisor)
            with scope():
                dx, dresidual = phases.tfops_batch_norm_gradient_normalize(
                    dy, x, *vectors, tilt, shift, keep=keep, residual=needed, **attributes
                )
            dresiduals = [dresidual if activation else dy] * len(residual)
            return [dx, dscale, doffset, None, None, None, *dresiduals]

        return phases.tfops_batch_norm_inference(x, *vectors, residual=list(residual), **attributes), gradient

    inputs = [x, scale, offset, statistics.count, statistics.mean, statistics.variance]
    return apply(*inputs, *([] if residual is None else [residual]))
