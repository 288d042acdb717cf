"""Batch normalization on TensorFlow's own operations, for GPUs that the kernels cannot serve (`_gpus.py`).

It is as fast as TensorFlow without tfops: its fused op (cuDNN's) normalizes, where it can, and the addition and the
activation are left to TensorFlow, whose graph optimizer may fuse them. So data of half precision are rounded after each
of these steps, not once in the end. Derivatives are TensorFlow's own, to any order.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import tensorflow as tf

from tfops import _activations, _virtual_batches
from tfops import _second_derivatives as second
from tfops._arguments import Arguments, param_type, value_of
from tfops.reference import _check, _compute

_LEAST_EPSILON = 1.001e-5  # TensorFlow's function raises one that is smaller to this, without a word
_VECTORS = ("scale", "offset", "mean", "variance")
_Outputs = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def fused_batch_norm(arguments: Arguments, name: str | None = None) -> _Outputs:
    """What `tfops.fused_batch_norm` returns for these arguments. Shapes that do not match raise what the op raises."""
    with tf.name_scope(name or "BatchNorm"):
        x, dtype, epsilon, axis, training = (
            getattr(arguments, field) for field in ("x", "dtype", "epsilon", "axis", "is_training")
        )
        try:
            _check(arguments)
        except ValueError as error:
            if not tf.executing_eagerly():
                raise
            raise tf.errors.InvalidArgumentError(None, None, str(error)) from error
        arguments = _checked_when_run(arguments)
        if arguments.virtual_batch_size is not None:
            return _virtual_batches.fused_batch_norm(arguments, fused_batch_norm)
        # TensorFlow's fused op takes tensors of rank 4. Neither TensorFlow nor Keras uses it for matrices.
        is_fused = dtype is not tf.float64 and epsilon >= _LEAST_EPSILON and x.shape.rank != 2
        folded = _folded(arguments) if is_fused or x.shape.rank is None else arguments

        def unfold(y: tf.Tensor) -> tf.Tensor:
            return y if folded.x is x else tf.reshape(y, tf.shape(x, out_type=tf.int64))

        def run(training: bool) -> _Outputs:
            if not is_fused:
                y, mean, variance = _compute(folded._replace(is_training=training))
                return unfold(y), mean, variance
            z, mean, variance = (_train if training else _infer)(folded)
            z = unfold(z) if arguments.residual is None else unfold(z) + arguments.residual
            return _activations.apply(arguments.activation, z), mean, variance

        if isinstance(training, bool):
            y, mean, variance = run(training)
        else:
            y, mean, variance = tf.cond(training, lambda: run(True), lambda: run(False))
        if is_fused and training is not False:
            mean, variance = _statistics(folded, mean, variance)
        if not tf.executing_eagerly():
            channels = arguments.scale.shape
            if x.shape.rank is not None:
                sizes = list(x.shape)
                channels = channels.merge_with([sizes[axis]])
                sizes[axis] = channels.as_list()[0]
                y.set_shape(sizes)
            mean.set_shape(channels)
            variance.set_shape(channels)
        return y, mean, variance


def _checked_when_run(arguments: Arguments) -> Arguments:
    """The arguments with the same checks where shapes are known only when a graph runs: nothing is to broadcast."""
    x, axis = arguments.x, arguments.axis

    def check(name: str, shape: tf.Tensor) -> tf.Tensor | None:
        tensor = getattr(arguments, name)
        if tensor is None or (tensor.shape.is_fully_defined() and x.shape.is_fully_defined()):
            return tensor
        message = f"{name} must have the shape of x" if name == "residual" else f"{name} must have x's channels"
        with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(tensor), shape, message)]):
            return tf.reshape(tensor, shape)  # which XLA checks, for it knows no assertions

    changed: dict[str, Any] = {"residual": check("residual", tf.shape(x))}
    if not x.shape.is_fully_defined():
        channels = tf.shape(x)[axis, None]
        may_lack_running = arguments.is_training is True and arguments.exponential_avg_factor == 1
        if may_lack_running and arguments.mean is not None:  # they may turn out to be empty, which means none
            for name in ("mean", "variance"):
                given = getattr(arguments, name)
                padding = tf.concat([[0], channels - tf.shape(given)], 0)
                arguments = arguments._replace(**{name: tf.pad(given, [padding])})
        changed |= {name: check(name, channels) for name in _VECTORS}
    return arguments._replace(**changed)


def _folded(arguments: Arguments) -> Arguments:
    """The same with x and the residual as tensors of rank 4, and the axis 3 (NHWC) or 1 (NCHW)."""
    x = arguments.x
    rank, axis = x.shape.rank, arguments.axis
    if rank is None:
        sizes = tf.shape(x, out_type=tf.int64)
        axis = tf.math.floormod(axis, tf.size(sizes))
        after = sizes[axis + 1 :]
        shape = [tf.reduce_prod(sizes[:axis]), sizes[axis], tf.constant(1, tf.int64), tf.reduce_prod(after)]
        axis = 1
    else:
        axis %= rank
        if rank == 4 and axis in (1, 3):
            return arguments._replace(axis=axis)
        sizes = list(x.shape)
        if None in sizes:
            known, sizes = sizes, tf.unstack(tf.shape(x, out_type=tf.int64), rank)
            sizes = [size if n is None else n for n, size in zip(known, sizes, strict=True)]
        if axis == rank - 1:
            shape, axis = [sizes[0], _product(sizes[1:-2]), _product(sizes[1:-1][-1:]), sizes[-1]], 3
        else:
            after = sizes[axis + 1 :]
            shape, axis = [_product(sizes[:axis]), sizes[axis], _product(after[:-1]), after[-1]], 1
    residual = arguments.residual
    return arguments._replace(
        x=tf.reshape(x, shape), axis=axis, residual=None if residual is None else tf.reshape(residual, shape)
    )


def _product(sizes: list[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


def _normalize(arguments: Arguments, scale: tf.Tensor, offset: tf.Tensor, **settings: Any) -> _Outputs:
    """TensorFlow's fused op, which has derivatives of y alone, and with respect to x, scale and offset."""
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
        arguments.x,
        scale,
        offset,
        epsilon=arguments.epsilon,
        data_format="NHWC" if arguments.axis == 3 else "NCHW",
        **settings,
    )
    return y, mean, variance


def _train(arguments: Arguments) -> _Outputs:
    """y, and the batch's mean and unbiased variance, which have no derivatives yet."""
    return _normalize(arguments, arguments.scale, arguments.offset)


def _statistics(arguments: Arguments, mean: tf.Tensor, variance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What is returned beside y, of a batch's mean and unbiased variance; without is_training, these are the result."""
    x, scale, _, old_mean, old_variance = arguments[:5]
    factor, training = arguments.exponential_avg_factor, arguments.is_training
    others = [0, 1, 2] if arguments.axis == 3 else [0, 2, 3]
    vector = [1, 1, 1, -1] if arguments.axis == 3 else [1, -1, 1, 1]
    count = tf.cast(tf.size(x, out_type=tf.int64), scale.dtype) / tf.cast(tf.maximum(tf.size(scale), 1), scale.dtype)
    n, less = tf.maximum(count, 1), tf.maximum(count - 1, 1)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def of_batch(x: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> Any:
        def gradient(dmean: tf.Tensor, dvariance: tf.Tensor) -> list[Any]:
            wide = tf.cast(x, scale.dtype)
            deviation = wide - tf.reshape(tf.reduce_sum(wide, others) / n, vector)
            dx = tf.reshape(dmean / n, vector) + deviation * tf.reshape(2 * dvariance / less, vector)
            return [tf.cast(dx, x.dtype), None, None]

        return (tf.identity(mean), tf.identity(variance)), gradient

    def average(old: tf.Tensor | None, new: tf.Tensor) -> tf.Tensor:
        old = tf.zeros_like(scale) if old is None else old
        taken = count > 0 if training is True else (count > 0) & training
        return tf.where(taken, new if factor == 1 else (1 - factor) * old + factor * new, old)

    # One element has no variance, whatever a division by count - 1 has made of it.
    mean, variance = of_batch(x, mean, tf.where(count > 1, variance, tf.zeros_like(variance)))
    if not arguments.unbiased:
        variance *= less / n
    return average(old_mean, mean), average(old_variance, variance)


def _infer(arguments: Arguments) -> _Outputs:
    """mean and variance go into offset and scale, through which they have derivatives."""
    scale, offset, mean, variance = (getattr(arguments, name) for name in _VECTORS)
    slope = scale * tf.math.rsqrt(variance + arguments.epsilon)
    y, _, _ = _normalize(
        arguments,
        slope * (1 + arguments.epsilon) ** 0.5,
        offset - mean * slope,
        mean=tf.zeros_like(mean),
        variance=tf.ones_like(variance),
        is_training=False,
    )
    return y, tf.identity(mean), tf.identity(variance)


# ----------------------------------------------------------------------------------------------------------------------
# The phases: in the place of the ops of the same names, for `_phases.py`.


def _kept(keep: list[tf.Tensor], data: tf.Tensor) -> tf.Tensor:
    return tf.where(keep[0][..., None], data, tf.zeros_like(data)) if keep else data


def tfops_batch_norm_moments(x: tf.Tensor, keep: list[tf.Tensor], axis: int, U: tf.DType) -> _Outputs:
    """Count, mean and variance of what is kept."""
    wide = tf.cast(x, U)
    layout = second.Layout(wide, axis)
    count = layout.sum(_kept(keep, tf.ones_like(wide)))
    mean = tf.math.divide_no_nan(layout.sum(_kept(keep, wide)), count)
    squares = tf.square(_kept(keep, wide - layout.vector(mean)))
    return count, mean, tf.math.divide_no_nan(layout.sum(squares), count)


def tfops_batch_norm_inference(x: tf.Tensor, *vectors: tf.Tensor, residual: list[tf.Tensor], **attributes: Any) -> Any:
    """The result alone."""
    scale, offset, mean, variance = vectors
    arguments = Arguments(
        x=x,
        scale=scale,
        offset=offset,
        mean=mean,
        variance=variance,
        residual=residual[0] if residual else None,
        dtype=x.dtype,
        epsilon=value_of(attributes, "epsilon"),
        exponential_avg_factor=1.0,
        axis=attributes["axis"],
        activation=attributes["activation"] or None,
        is_training=False,
        unbiased=True,
        virtual_batch_size=None,
    )
    return fused_batch_norm(arguments)[0]


def _forward(attributes: dict[str, Any], data: list[tf.Tensor], vectors: Any, residual: list[tf.Tensor]) -> Any:
    param = param_type(data[0].dtype)
    wide = [tf.cast(each, param) for each in (*data, *residual)]
    inputs = [*wide[:2], *vectors, wide[2] if residual else None]
    epsilon = value_of(attributes, "epsilon")
    return second.Forward(second.Normalization(attributes["axis"], epsilon, attributes["activation"], *inputs))


def tfops_batch_norm_gradient_moments(
    dy: tf.Tensor, x: tf.Tensor, *vectors: tf.Tensor, residual: list[tf.Tensor], **attributes: Any
) -> tuple[tf.Tensor, ...]:
    """The gradients of scale, offset, mean and variance."""
    forward = _forward(attributes, [dy, x], vectors, residual)
    sum_dz, sum_dz_xc = (forward.layout.sum(each) for each in (forward.dz, forward.dz * forward.xc))
    inv_std, slope = forward.inv_std, forward.slope
    return sum_dz_xc * inv_std, sum_dz, -slope * sum_dz, -0.5 * slope * inv_std**2 * sum_dz_xc


def tfops_batch_norm_gradient_normalize(
    dy: tf.Tensor,
    x: tf.Tensor,
    *vectors: tf.Tensor,
    keep: list[tf.Tensor],
    residual: list[tf.Tensor],
    **attributes: Any,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The gradients of x and the residual, from what the statistics add to that of x, the last two of the vectors."""
    *given, tilt, shift = vectors
    forward = _forward(attributes, [dy, x], given, residual)
    vector = forward.layout.vector
    dx = vector(forward.slope) * forward.dz + _kept(keep, forward.xc * vector(tilt) + vector(shift))
    return tf.cast(dx, x.dtype), tf.cast(forward.dz, x.dtype)
