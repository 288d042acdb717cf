"""Gradients of the ops: the first by the gradient ops, those of the gradient ops by formulas in plain TensorFlow.

Whoever differentiates twice gets TensorFlow's own derivatives of the formulas below, which compute what the gradient
ops compute, and is free to differentiate again. The phases' first gradient is that of `_phases.normalize`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfops._arguments import param_type
from tfops._library import ops

_SHARED = ("axis", "epsilon", "activation")
_LEAKY_RELU_SLOPE = float(np.float32(0.2))  # as the kernels have it, and tf.nn.leaky_relu's attribute
_TRAINING = ("exponential_avg_factor", "unbiased")


def _register(op_type: str) -> Callable[[Callable], Callable]:
    """tf.RegisterGradient, but for a module that is imported again: TensorFlow keeps its first registration."""

    def register(function: Callable) -> Callable:
        with contextlib.suppress(KeyError):
            tf.RegisterGradient(op_type)(function)
        return function

    return register


def _attributes(op: tf.Operation, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: op.get_attr(name) for name in names}
    # An eager op's attributes are as they were given: not rounded to the kernel's float32, and strings are bytes.
    for name in {"epsilon", "exponential_avg_factor"} & values.keys():
        values[name] = float(np.float32(values[name]))
    values["activation"] = tf.compat.as_str(values["activation"])
    return values


def _split(lists: list[Any]) -> tuple[list[Any], list[Any]]:
    """An op's last inputs: none or two vectors, and no residual or one. Its attributes say so too, but take longer."""
    vectors = len(lists) // 2 * 2
    return lists[:vectors], lists[vectors:]


@_register("Tfops>BatchNormTraining")
def _training_grad(op: tf.Operation, dy: Any, dmean: Any, dvariance: Any, *_: Any) -> list[Any]:
    x, scale, offset, *rest = op.inputs
    running, residual = _split(rest)
    _, _, _, saved_mean, saved_inv_std, mask = op.outputs
    attributes = _attributes(op, _SHARED + _TRAINING)
    needs_residual = residual and attributes["activation"] == "silu"
    dx, dscale, doffset, dresidual = ops.tfops_batch_norm_training_grad(
        dy,
        x,
        scale,
        offset,
        saved_mean,
        saved_inv_std,
        mask,
        drunning=[dmean, dvariance],
        residual=residual if needs_residual else [],
        has_residual=bool(residual),
        **attributes,
    )
    gradients = [dx, dscale, doffset]
    if running:
        # A tape tells which inputs it has no use for: most often these.
        unused = getattr(op, "skip_input_indices", None) or ()
        kept = 1.0 - attributes["exponential_avg_factor"]
        gradients += [None if i in unused else kept * d for i, d in ((3, dmean), (4, dvariance))]
    if residual:
        gradients.append(dresidual if attributes["activation"] else dy)
    return gradients


@_register("Tfops>BatchNormInference")
def _inference_grad(op: tf.Operation, dy: Any) -> list[Any]:
    x, scale, offset, mean, variance, *residual = op.inputs
    attributes = _attributes(op, _SHARED)
    *gradients, dresidual = ops.tfops_batch_norm_inference_grad(
        dy,
        x,
        scale,
        offset,
        mean,
        variance,
        residual=residual if attributes["activation"] else [],
        has_residual=bool(residual),
        **attributes,
    )
    if residual:
        gradients.append(dresidual if attributes["activation"] else dy)
    return gradients


# ----------------------------------------------------------------------------------------------------------------------
# The gradient ops' formulas, in terms of tensors of the param type.


class _Layout:
    """Sums over all dimensions but `axis`, and vectors of [C] shaped to be combined with x."""

    def __init__(self, x: tf.Tensor, axis: int):
        rank = tf.rank(x) if x.shape.rank is None else x.shape.rank
        self._channel = tf.cast(tf.math.floormod(axis, rank), tf.int32)
        dimensions = tf.range(rank)
        others = tf.range(rank - 1)
        self._others = others + tf.cast(others >= self._channel, tf.int32)
        shape = tf.shape(x, out_type=tf.int64)
        self.channels = shape[self._channel]
        self.inner = tf.reduce_prod(shape[self._channel + 1 :])
        self.shape = shape
        self._vector_shape = tf.where(dimensions == self._channel, self.channels, tf.ones_like(shape))
        self.count = tf.cast(tf.size(x, out_type=tf.int64) // tf.maximum(self.channels, 1), x.dtype)

    def sum(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(x, self._others)

    def vector(self, v: tf.Tensor) -> tf.Tensor:
        return tf.reshape(v, self._vector_shape)


def _bits(mask: tf.Tensor, layout: _Layout) -> tf.Tensor:
    """The mask as bools of x's shape; how bits lie is told in csrc/batch_norm/batch_norm.h."""
    size = tf.reduce_prod(layout.shape)
    row = tf.where(layout.inner == 1, layout.channels, layout.inner)
    row = tf.maximum(tf.where(layout.channels == 1, size, row), 1)
    bits = tf.bitwise.bitwise_and(mask[:, None], tf.constant([1, 2, 4, 8, 16, 32, 64, 128], tf.uint8)) != 0
    bits = tf.reshape(bits, [-1, (row + 7) // 8 * 8])[:, :row]
    return tf.reshape(bits, layout.shape)


def _activation_gradient(activation: str, dy: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    if activation == "silu":
        sigmoid = tf.sigmoid(z)
        return dy * sigmoid * (1 + z * (1 - sigmoid))
    if activation:
        return _piecewise_gradient(activation, dy, (z > 0) & (z < 6) if activation == "relu6" else z > 0)
    return dy


def _piecewise_gradient(activation: str, dy: tf.Tensor, on: tf.Tensor) -> tf.Tensor:
    return tf.where(on, dy, dy * _LEAKY_RELU_SLOPE if activation == "leaky_relu" else tf.zeros_like(dy))


def _training_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    dmean: tf.Tensor,
    dvariance: tf.Tensor,
    residual: tf.Tensor | None,
    mask: tf.Tensor | None,
    axis: int,
    epsilon: float,
    activation: str,
    exponential_avg_factor: float,
    unbiased: bool,
) -> list[tf.Tensor]:
    """dx, dscale, doffset, dz; mean and variance are functions of x. act' is read from the mask, if there is one."""
    layout = _Layout(x, axis)
    n = tf.maximum(layout.count, 1)
    xc = x - layout.vector(layout.sum(x) / n)
    inv_std = tf.math.rsqrt(layout.sum(xc * xc) / n + epsilon)
    slope = scale * inv_std
    if mask is not None:
        dz = _piecewise_gradient(activation, dy, _bits(mask, layout))
    else:
        z = xc * layout.vector(slope) + layout.vector(offset)
        dz = _activation_gradient(activation, dy, z if residual is None else z + residual)
    sum_dz, sum_dz_xc = layout.sum(dz), layout.sum(dz * xc)
    divisor = tf.maximum(n - 1, 1) if unbiased else n
    shift = -slope * sum_dz / n + exponential_avg_factor * dmean / n
    tilt = -slope * inv_std**2 * sum_dz_xc / n + 2 * exponential_avg_factor * dvariance / divisor
    dx = layout.vector(slope) * dz + layout.vector(tilt) * xc + layout.vector(shift)
    return [dx, sum_dz_xc * inv_std, sum_dz, dz]


def _inference_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    residual: tf.Tensor | None,
    axis: int,
    epsilon: float,
    activation: str,
) -> list[tf.Tensor]:
    """dx, dscale, doffset, dmean, dvariance, dz."""
    layout = _Layout(x, axis)
    xc = x - layout.vector(mean)
    inv_std = tf.math.rsqrt(variance + epsilon)
    slope = scale * inv_std
    z = xc * layout.vector(slope) + layout.vector(offset)
    dz = _activation_gradient(activation, dy, z if residual is None else z + residual)
    sum_dz, sum_dz_xc = layout.sum(dz), layout.sum(dz * xc)
    dvariance = -0.5 * slope * inv_std**2 * sum_dz_xc
    return [layout.vector(slope) * dz, sum_dz_xc * inv_std, sum_dz, -slope * sum_dz, dvariance, dz]


def _derivatives(function: Any, inputs: list[tf.Tensor], upstream: list[tf.Tensor], like: list[tf.Tensor]) -> list[Any]:
    """The gradient of function(*inputs) with respect to inputs, cast to the types of `like`; zeros, not None."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(*inputs)
    outputs = outputs[: len(upstream)]
    upstream = [tf.cast(gradient, output.dtype) for gradient, output in zip(upstream, outputs, strict=True)]
    gradients = tape.gradient(outputs, inputs, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.cast(gradient, tensor.dtype) for gradient, tensor in zip(gradients, like, strict=True)]


@_register("Tfops>BatchNormTrainingGrad")
def _training_grad_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    dy, x, scale, offset, _, _, mask, *rest = op.inputs
    drunning, residual = _split(rest)
    attributes = _attributes(op, _SHARED + _TRAINING)
    has_dresidual = op.get_attr("has_residual") and attributes["activation"]
    has_mask = has_dresidual and not residual
    arguments = [dy, x, scale, offset, *drunning, *residual]

    def function(dy: Any, x: Any, scale: Any, offset: Any, *rest: Any) -> list[tf.Tensor]:
        dmean, dvariance = rest[:2] if drunning else (tf.zeros_like(scale), tf.zeros_like(scale))
        return _training_gradient(
            dy,
            x,
            scale,
            offset,
            dmean,
            dvariance,
            rest[-1] if residual else None,
            mask if has_mask else None,
            **attributes,
        )

    gradients = _derivatives(
        function,
        [tf.cast(tensor, param_type(x.dtype)) for tensor in arguments],
        list(upstream if has_dresidual else upstream[:-1]),
        arguments,
    )
    # saved_mean and saved_inv_std are functions of x here: their share is in x's gradient.
    return [*gradients[:4], None, None, None, *gradients[4:]]


@_register("Tfops>BatchNormInferenceGrad")
def _inference_grad_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    residual = op.inputs[6:]
    attributes = _attributes(op, _SHARED)
    has_dresidual = op.get_attr("has_residual") and attributes["activation"]
    arguments = list(op.inputs)

    def function(*arguments: Any) -> list[tf.Tensor]:
        return _inference_gradient(*arguments[:6], arguments[6] if residual else None, **attributes)

    return _derivatives(
        function,
        [tf.cast(tensor, param_type(op.inputs[1].dtype)) for tensor in arguments],
        list(upstream if has_dresidual else upstream[:-1]),
        arguments,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The phases by themselves.


def _kept(op: tf.Operation, dtype: tf.DType) -> tf.Tensor | float:
    """The input `keep` as factors."""
    keeps = op.get_attr("num_keeps")
    if not keeps:
        return 1.0
    keep = op.inputs[1 if op.type == "Tfops>BatchNormMoments" else 8]
    return tf.cast(keep, dtype)[..., None]


@_register("Tfops>BatchNormMoments")
def _moments_grad(op: tf.Operation, _: Any, dmean: Any, dvariance: Any) -> list[Any]:
    x = op.inputs[0]
    count, mean, _ = op.outputs
    wide = tf.cast(x, count.dtype)
    layout = _Layout(wide, op.get_attr("axis"))
    shift = layout.vector(tf.math.divide_no_nan(dmean, count))
    tilt = layout.vector(tf.math.divide_no_nan(2 * dvariance, count))
    dx = _kept(op, wide.dtype) * ((wide - layout.vector(mean)) * tilt + shift)
    return [tf.cast(dx, x.dtype)] + [None] * op.get_attr("num_keeps")


@_register("Tfops>BatchNormGradientMoments")
def _gradient_moments_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    attributes = _attributes(op, _SHARED)
    arguments = list(op.inputs)

    def function(*arguments: Any) -> list[tf.Tensor]:
        residual = arguments[6] if op.get_attr("num_residuals") else None
        return _inference_gradient(*arguments[:6], residual, **attributes)[1:5]

    wide = [tf.cast(tensor, param_type(op.inputs[1].dtype)) for tensor in arguments]
    return _derivatives(function, wide, list(upstream), arguments)


@_register("Tfops>BatchNormGradientNormalize")
def _gradient_normalize_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    attributes = _attributes(op, _SHARED)
    keeps, residuals = op.get_attr("num_keeps"), op.get_attr("num_residuals")
    arguments = [*op.inputs[:8], *op.inputs[8 + keeps :]]
    param = param_type(op.inputs[1].dtype)
    kept = _kept(op, param)

    def function(*arguments: Any) -> list[tf.Tensor]:
        x, mean, tilt, shift = (arguments[i] for i in (1, 4, 6, 7))
        layout = _Layout(x, attributes["axis"])
        dx, *_, dz = _inference_gradient(*arguments[:6], arguments[8] if residuals else None, **attributes)
        return [dx + kept * ((x - layout.vector(mean)) * layout.vector(tilt) + layout.vector(shift)), dz]

    wide = [tf.cast(tensor, param) for tensor in arguments]
    has_dresidual = residuals and attributes["activation"]
    gradients = _derivatives(function, wide, list(upstream if has_dresidual else upstream[:1]), arguments)
    return [*gradients[:8], *[None] * keeps, *gradients[8:]]
