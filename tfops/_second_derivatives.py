"""The gradients of the gradient ops, written out in TensorFlow's own operations.

All tensors are of the param type. With xc = x - mean, inv_std = 1 / sqrt(variance + epsilon), slope = scale * inv_std,
z = xc * slope + offset + residual and dz = dy * act'(z), a gradient op returns

    dx = slope * dz + tilt * xc + shift,  dscale = inv_std * sum(dz * xc),  doffset = sum(dz),  dresidual = dz

and in inference the gradients of mean and variance. (csrc/batch_norm/batch_norm.h has all formulas. tilt and shift are
what x gets as the source of its statistics.) Here each of these is followed back to the op's inputs, by the chain rule:
the adjoint of dz is

    slope * adjoint(dx) + adjoint(dresidual) + adjoint(sum(dz)) + xc * adjoint(sum(dz * xc))

and all else comes from that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfops import _mask
from tfops._activations import Inverse, PiecewiseLinear, Smooth, find


class Layout:
    """Sums over all dimensions but `axis`, and vectors of [C] shaped to be combined with x."""

    def __init__(self, x: tf.Tensor, axis: int, dtype: tf.DType | None = None):
        rank = tf.rank(x) if x.shape.rank is None else x.shape.rank
        channel = tf.cast(tf.math.floormod(axis, rank), tf.int32)
        others = tf.range(rank - 1)
        self._others = others + tf.cast(tf.greater_equal(others, channel), tf.int32)
        self._shape = tf.shape(x, out_type=tf.int64)
        self._channels = self._shape[channel]
        self._outer = tf.reduce_prod(self._shape[:channel])
        self._inner = tf.reduce_prod(self._shape[channel + 1 :])
        is_channel = tf.equal(tf.range(rank), channel)
        self._vector_shape = tf.where(is_channel, self._channels, tf.ones_like(self._shape))
        self.count = tf.cast(tf.size(x, out_type=tf.int64) // tf.maximum(self._channels, 1), dtype or x.dtype)

    def sum(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(x, self._others)

    def vector(self, v: tf.Tensor) -> tf.Tensor:
        return tf.reshape(v, self._vector_shape)

    def bits(self, mask: tf.Tensor) -> tf.Tensor:
        """The mask as bools of x's shape."""
        return tf.reshape(_mask.unpack(mask, _mask.row_length(self._outer, self._channels, self._inner)), self._shape)


class Normalization(NamedTuple):
    """The attributes that all gradient ops share, and their inputs. In training mean and variance are x's own."""

    axis: int
    epsilon: float
    activation: str
    dy: tf.Tensor
    x: tf.Tensor
    scale: tf.Tensor
    offset: tf.Tensor
    mean: tf.Tensor | None
    variance: tf.Tensor  # None where mean is
    residual: tf.Tensor | None


class Forward:
    """What a gradient op computes of these."""

    def __init__(self, inputs: Normalization, mask: tf.Tensor | None = None):
        axis, epsilon, activation, self.dy, x, self.scale, offset, mean, variance, residual = inputs
        self.layout = layout = Layout(x, axis)
        self.n = tf.maximum(layout.count, 1)
        if mean is None:
            self.xc = x - layout.vector(layout.sum(x) / self.n)
            variance = layout.sum(self.xc * self.xc) / self.n
        else:
            self.xc = x - layout.vector(mean)
        self.inv_std = tf.math.rsqrt(variance + epsilon)
        self.slope = self.scale * self.inv_std
        self.activation = find(activation) if activation else None
        self._z: Any = None
        if mask is None and activation:
            z = self.xc * layout.vector(self.slope) + layout.vector(offset)
            self._z = z if residual is None else z + residual
        if isinstance(self.activation, PiecewiseLinear):
            self._on = self.activation.is_on(self._z) if mask is None else layout.bits(mask)
        elif self.activation:
            self._slope = self.activation.slope(self._z)
        self.dz = self.times_slope(self.dy)

    def times_slope(self, gradient: tf.Tensor) -> tf.Tensor:
        """gradient * act'(z)."""
        if isinstance(self.activation, PiecewiseLinear):
            off = self.activation.off_slope
            return tf.where(self._on, gradient, gradient * off if off else tf.zeros_like(gradient))
        return gradient * self._slope if self.activation else gradient

    def times_curvature(self, gradient: tf.Tensor) -> tf.Tensor | None:
        """gradient * act''(z), or None where act'' is 0 everywhere."""
        return gradient * self.activation.curvature(self._z) if isinstance(self.activation, Smooth) else None


class _Adjoints:
    """The adjoints of what the op was given, from those of dx, of dz, and of the sums of dz and of dz * xc.

    That of inv_std is what reaches it through `slope` alone, and that of xc lacks what tilt and the statistics add.
    """

    def __init__(
        self,
        forward: Forward,
        of_dx: tf.Tensor | None,
        of_dz: tf.Tensor | None,
        of_sum: tf.Tensor,
        of_sum_xc: tf.Tensor,
        of_slope: tf.Tensor,
    ):
        layout = forward.layout
        total = layout.vector(of_sum) + forward.xc * layout.vector(of_sum_xc)
        self.xc = forward.dz * layout.vector(of_sum_xc)
        if of_dx is not None:
            total += of_dx * layout.vector(forward.slope)
            of_slope += layout.sum(of_dx * forward.dz)
        if of_dz is not None:
            total += of_dz
        self.dy = forward.times_slope(total)
        curved = forward.times_curvature(total)
        if curved is None:
            self.z = tf.zeros_like(total)
            self.offset = tf.zeros_like(forward.scale)
        else:
            self.z = curved * forward.dy
            self.offset = layout.sum(self.z)
            of_slope += layout.sum(self.z * forward.xc)
            self.xc += self.z * layout.vector(forward.slope)
        self.scale = of_slope * forward.inv_std
        self.inv_std = of_slope * forward.scale


def training(
    inputs: Normalization,
    mask: tf.Tensor | None,
    drunning: list[tf.Tensor],
    upstream: list[tf.Tensor],
    exponential_avg_factor: float,
    unbiased: bool,
) -> list[tf.Tensor]:
    """The gradients of dy, x, scale, offset, drunning and residual, from those of dx, dscale, doffset and dresidual.

    Args:
      mask: act' is read from it, if there is one.
      drunning: nothing, or the gradients of the mean and variance that the forward op returned.
      upstream: without the last if the op returned no dresidual.
    """
    forward = Forward(inputs, mask)
    layout, n, inv_std, slope = forward.layout, forward.n, forward.inv_std, forward.slope
    of_dx, of_dscale, of_doffset, *rest = upstream
    of_dz = rest[0] if rest else None
    sum_dz_xc = layout.sum(forward.dz * forward.xc)
    divisor = tf.maximum(n - 1, 1) if unbiased else n

    # shift = -slope * sum(dz) / n + ..., tilt = -slope * inv_std^2 * sum(dz * xc) / n + ...
    of_shift, of_tilt = layout.sum(of_dx), layout.sum(of_dx * forward.xc)
    through_tilt = inv_std**2 * of_tilt / n
    tilt = -slope * inv_std**2 * sum_dz_xc / n
    if drunning:
        tilt += 2 * exponential_avg_factor * drunning[1] / divisor
    adjoints = _Adjoints(
        forward,
        of_dx,
        of_dz,
        of_sum=of_doffset - slope * of_shift / n,
        of_sum_xc=of_dscale * inv_std - slope * through_tilt,
        of_slope=-of_shift * layout.sum(forward.dz) / n - through_tilt * sum_dz_xc,
    )
    of_inv_std = adjoints.inv_std + of_dscale * sum_dz_xc - 2 * slope * inv_std * sum_dz_xc * of_tilt / n
    of_variance = -0.5 * inv_std**3 * of_inv_std
    of_xc = adjoints.xc + of_dx * layout.vector(tilt) + forward.xc * layout.vector(2 * of_variance / n)
    of_x = of_xc - layout.vector(layout.sum(of_xc) / n)
    gradients = [adjoints.dy, of_x, adjoints.scale, adjoints.offset]
    if drunning:
        factor = exponential_avg_factor
        gradients += [factor * of_shift / n, 2 * factor * of_tilt / divisor]
    return gradients if inputs.residual is None else [*gradients, adjoints.z]


def training_in_place(
    inverse: Inverse,
    axis: int,
    inputs: list[tf.Tensor],
    drunning: list[tf.Tensor],
    upstream: list[tf.Tensor],
    exponential_avg_factor: float,
    unbiased: bool,
) -> list[tf.Tensor]:
    """The gradients of dy, y, scale, offset, saved_inv_std and drunning, where xc = (z - offset) / slope, z = z(y).

    Here these are inputs like any other: what y and saved_inv_std have of x and the rest is the forward op's to tell.

    Args:
      inputs: dy, y, scale, offset and saved_inv_std.
      upstream: the gradients of dx, dscale and doffset.
    """
    dy, y, scale, offset, inv_std = inputs
    of_dx, of_dscale, of_doffset = upstream
    layout = Layout(y, axis)
    vector, n = layout.vector, tf.maximum(layout.count, 1)
    divisor = tf.maximum(n - 1, 1) if unbiased else n
    slope, act_slope = scale * inv_std, inverse.slope(y)
    xc = (inverse.of(y) - vector(offset)) / vector(slope)
    dz = dy * act_slope
    sum_dz, sum_dz_xc = layout.sum(dz), layout.sum(dz * xc)
    # shift = -slope * sum(dz) / n + ..., tilt = -slope * inv_std^2 * sum(dz * xc) / n + ...
    of_shift, of_tilt = layout.sum(of_dx), layout.sum(of_dx * xc)
    through_tilt = inv_std**2 * of_tilt / n
    tilt = -slope * inv_std**2 * sum_dz_xc / n
    if drunning:
        tilt += 2 * exponential_avg_factor * drunning[1] / divisor

    of_sum_xc = of_dscale * inv_std - slope * through_tilt
    of_dz = of_dx * vector(slope) + vector(of_doffset - slope * of_shift / n) + xc * vector(of_sum_xc)
    of_z = (of_dx * vector(tilt) + dz * vector(of_sum_xc)) / vector(slope)
    of_y = of_z * inverse.inverse_slope(y) + of_dz * dy * inverse.slope_of_slope(y)
    of_slope = layout.sum(of_dx * dz) - of_shift * sum_dz / n - through_tilt * sum_dz_xc - layout.sum(of_z * xc)
    of_inv_std = of_slope * scale + (of_dscale - 2 * slope * inv_std * of_tilt / n) * sum_dz_xc
    gradients = [of_dz * act_slope, of_y, of_slope * inv_std, -layout.sum(of_z), of_inv_std]
    if drunning:
        factor = exponential_avg_factor
        gradients += [factor * of_shift / n, 2 * factor * of_tilt / divisor]
    return gradients


def inference(inputs: Normalization, upstream: list[Any], of_xc: tf.Tensor | None = None) -> list[tf.Tensor]:
    """The gradients of the inputs, from those of dx, dscale, doffset, dmean, dvariance and dresidual.

    Args:
      upstream: None for what the op does not return.
      of_xc: what else has a part in the adjoint of xc.
    """
    forward = Forward(inputs)
    layout, inv_std, slope = forward.layout, forward.inv_std, forward.slope
    of_dx, of_dscale, of_doffset, of_dmean, of_dvariance, of_dz = upstream
    nothing = tf.zeros_like(slope)
    of_sum = of_sum_xc = of_slope = of_inv_std = nothing
    if of_dscale is not None:
        # dmean = -slope * sum(dz), dvariance = -slope * inv_std^2 * sum(dz * xc) / 2
        sum_dz_xc = layout.sum(forward.dz * forward.xc)
        of_sum = of_doffset - of_dmean * slope
        of_sum_xc = of_dscale * inv_std - 0.5 * of_dvariance * slope * inv_std**2
        of_slope = -of_dmean * layout.sum(forward.dz) - 0.5 * of_dvariance * inv_std**2 * sum_dz_xc
        of_inv_std = (of_dscale - of_dvariance * slope * inv_std) * sum_dz_xc
    adjoints = _Adjoints(forward, of_dx, of_dz, of_sum, of_sum_xc, of_slope)
    of_x = adjoints.xc if of_xc is None else adjoints.xc + of_xc
    of_variance = -0.5 * inv_std**3 * (adjoints.inv_std + of_inv_std)
    gradients = [adjoints.dy, of_x, adjoints.scale, adjoints.offset, -layout.sum(of_x), of_variance]
    return gradients if inputs.residual is None else [*gradients, adjoints.z]


def gradient_normalize(
    inputs: Normalization,
    tilt: tf.Tensor,
    kept: tf.Tensor | float,
    of_dx: tf.Tensor,
    of_dz: tf.Tensor | None,
) -> list[tf.Tensor]:
    """The gradients of the inputs, tilt and shift among them, where dx = slope * dz + kept * (xc * tilt + shift)."""
    layout = Layout(inputs.x, inputs.axis)
    of_rest = of_dx * kept
    of_tilt = layout.sum(of_rest * (inputs.x - layout.vector(inputs.mean)))
    upstream = [of_dx, None, None, None, None, of_dz]
    gradients = inference(inputs, upstream, of_xc=of_rest * layout.vector(tilt))
    return [*gradients[:6], of_tilt, layout.sum(of_rest), *gradients[6:]]
