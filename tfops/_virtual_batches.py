"""Virtual batches in TensorFlow's own operations: they become part of the channels, which know nothing of one another.

Virtual batch k's channel c is channel k * C + c. So serve all formulas and phases that know nothing of virtual batches:
the second derivatives, the fallback, the reference, and statistics with a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfops import _second_derivatives as second
from tfops._arguments import Arguments
from tfops._folding import Folding

_Outputs = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def check(x: tf.Tensor, axis: int, size: int) -> None:
    """ValueError if x, as far as its shape is known, is no batch of virtual batches."""
    rank = x.shape.rank
    if axis == 0 or (rank is not None and axis == -rank):
        raise ValueError(f"virtual_batch_size must be None where the channels are dimension 0, but it is {size}")
    if rank is not None and x.shape[0] is not None and x.shape[0] % size:
        raise ValueError(
            f"virtual_batch_size must divide the batch, dimension 0 of x, but it is {size}, and the batch has "
            f"{x.shape[0]} entries (a data set's last batch is left out by drop_remainder=True)"
        )


class VirtualBatches:
    """Brings tensors of virtual batches of `size` entries into the channels, and back. Folded data have axis 1."""

    axis = 1

    def __init__(self, x: tf.Tensor, axis: int, size: int, has_mask: bool = False):
        check(x, axis, size)
        self._static = x.shape
        shape = tf.shape(x)
        message = f"virtual_batch_size must divide the batch, dimension 0 of x, but it is {size}"
        checks = []
        if x.shape.rank is None or x.shape[0] is None:
            checks = [tf.debugging.assert_equal(shape[0] % size, 0, message)]
        with tf.control_dependencies(checks):
            self.count = tf.identity(shape[0] // size)
        self._shape = shape
        if x.shape.rank is None:
            place = tf.math.floormod(axis, tf.rank(x))
            outer = tf.reduce_prod(shape[1:place])
            inner = tf.reduce_prod(shape[place + 1 :])
            self._stacked = tf.stack([self.count, size * outer, shape[place], inner])
            axis = 1
        else:
            axis %= x.shape.rank
            self._stacked = tf.concat([[self.count, size], shape[1:]], 0)
        stacked = self._stack(x)
        self._folding = Folding(stacked, axis, has_mask)
        self._channels = tf.shape(stacked)[1 + axis]

    def _stack(self, x: tf.Tensor) -> tf.Tensor:
        stacked = tf.reshape(x, self._stacked)
        rank = self._static.rank
        stacked.set_shape([None] * (4 if rank is None else rank + 1))
        return stacked

    def fold(self, x: tf.Tensor) -> tf.Tensor:
        """Data of x's shape as those of so many more channels."""
        return self._folding.fold_data(self._stack(x))

    def unfold(self, y: tf.Tensor) -> tf.Tensor:
        y = tf.reshape(self._folding.unfold_data(y), self._shape)
        y.set_shape(self._static)
        return y

    def fold_keep(self, keep: tf.Tensor) -> tf.Tensor:
        """Flags of x's shape without its last dimension, where the rank of x is known."""
        return self._folding.fold_rows(tf.reshape(keep, self._stacked[:-1]))

    def fold_mask(self, mask: tf.Tensor) -> tf.Tensor:
        """The activation bits."""
        return self._folding.fold_mask(mask)

    def tile(self, vector: tf.Tensor) -> tf.Tensor:
        """[C] for each virtual batch."""
        return tf.tile(vector, [self.count])

    def split(self, vector: tf.Tensor) -> tf.Tensor:
        """[V * C] as [V, C]."""
        return tf.reshape(vector, tf.stack([self.count, self._channels]))

    def sum(self, vector: tf.Tensor) -> tf.Tensor:
        """[V * C] added up to [C]."""
        return tf.reduce_sum(self.split(vector), 0)


def fused_batch_norm(arguments: Arguments, compute: Callable[[Arguments], _Outputs]) -> _Outputs:
    """What `tfops.fused_batch_norm` returns with virtual batches, by a function that knows none of them."""
    training = arguments.is_training

    def infer() -> _Outputs:
        return compute(arguments._replace(is_training=False, virtual_batch_size=None))

    if isinstance(training, bool):
        return _train(arguments, compute) if training else infer()
    return tuple(tf.cond(training, lambda: _train(arguments, compute), infer))


def _train(arguments: Arguments, compute: Callable[[Arguments], _Outputs]) -> _Outputs:
    x, scale, offset, mean, variance, residual = arguments[:6]
    size = arguments.virtual_batch_size
    assert size is not None
    batches = VirtualBatches(x, arguments.axis, size)
    y, *statistics = compute(
        arguments._replace(
            x=batches.fold(x),
            scale=batches.tile(scale),
            offset=batches.tile(offset),
            mean=None,
            variance=None,
            residual=None if residual is None else batches.fold(residual),
            exponential_avg_factor=1.0,
            axis=batches.axis,
            is_training=True,
            virtual_batch_size=None,
        )
    )
    # An empty batch has no statistics: the running ones stay as they are.
    factor = tf.where(tf.equal(tf.size(x), 0), 0.0, arguments.exponential_avg_factor)
    factor = tf.cast(factor, scale.dtype)
    count = tf.cast(tf.maximum(batches.count, 1), scale.dtype)

    def average(old: tf.Tensor | None, new: tf.Tensor) -> tf.Tensor:
        taken = factor * (batches.sum(new) / count)
        return taken if old is None else (1 - factor) * old + taken

    new_mean, new_variance = (average(*each) for each in zip((mean, variance), statistics, strict=True))
    for statistic in (new_mean, new_variance):
        statistic.set_shape(scale.shape)
    return batches.unfold(y), new_mean, new_variance


def second_derivatives(
    size: int,
    inputs: second.Normalization,
    mask: tf.Tensor | None,
    drunning: list[tf.Tensor],
    upstream: list[tf.Tensor],
    exponential_avg_factor: float,
    unbiased: bool,
) -> list[tf.Tensor]:
    """`second.training`, where the op had virtual batches of that size; 0 means none."""
    rest: Any = (mask, drunning, upstream, exponential_avg_factor, unbiased)
    if not size:
        return second.training(inputs, *rest)
    batches = VirtualBatches(inputs.x, inputs.axis, size, has_mask=mask is not None)
    of_dx, of_dscale, of_doffset, *of_dz = upstream
    # Each has its share in the averages that were returned, and the sums dscale and doffset are over all of them.
    share = exponential_avg_factor / tf.cast(tf.maximum(batches.count, 1), inputs.x.dtype)
    folded = inputs._replace(
        axis=batches.axis,
        dy=batches.fold(inputs.dy),
        x=batches.fold(inputs.x),
        scale=batches.tile(inputs.scale),
        offset=batches.tile(inputs.offset),
        residual=None if inputs.residual is None else batches.fold(inputs.residual),
    )
    dy, x, *others = second.training(
        folded,
        None if mask is None else batches.fold_mask(mask),
        [batches.tile(each) for each in drunning],
        [batches.fold(of_dx), batches.tile(of_dscale), batches.tile(of_doffset), *map(batches.fold, of_dz)],
        share,
        unbiased,
    )
    vectors = 2 + len(drunning)
    return [
        *map(batches.unfold, (dy, x)),
        *map(batches.sum, others[:vectors]),
        *map(batches.unfold, others[vectors:]),
    ]
