"""Problems as the channels of one: what differs from one to another comes stacked along a dimension."""

from __future__ import annotations

import tensorflow as tf

from tfops import _mask


class Folding:
    """Stacked tensors, [iterations, ...], as those of one call, and back.

    Data become [outer, iterations * C, inner / last, last], where `last` is x's last dimension, or 1 if that has the
    channels: so flags for rows of x's last dimension, `keep`, have a place. Where a call has virtual batches of that
    size, the batch remains a dimension of its own, before the others. `axis` is that of the channels.
    """

    def __init__(self, x: tf.Tensor, axis: int, has_mask: bool, virtual_batch_size: int = 0):
        self._has_mask = has_mask
        self.axis = 2 if virtual_batch_size else 1
        rank = x.shape.rank - 1
        axis %= rank
        self._axis_is_last = axis == rank - 1
        shape = tf.shape(x)
        self._shape = shape
        self._iterations, self._channels = shape[0], shape[1 + axis]
        self._outer = tf.reduce_prod(shape[1 : 1 + axis])
        self._inner = tf.reduce_prod(shape[2 + axis :])
        self._last = tf.constant(1) if self._axis_is_last else shape[-1]
        self._virtual_batches = tf.maximum(shape[1] // virtual_batch_size, 1) if virtual_batch_size else tf.constant(1)

    def _exchange(self, x: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        """[first, second, C, inner], of whatever shape, as [second, first, C, inner]."""
        return tf.transpose(tf.reshape(x, tf.stack([first, second, self._channels, self._inner])), [1, 0, 2, 3])

    def fold_data(self, x: tf.Tensor) -> tf.Tensor:
        folded = self._exchange(x, self._iterations, self._outer)
        rows = self._inner // tf.maximum(self._last, 1)
        sizes = [self._outer, self._iterations * self._channels, rows, self._last]
        if self.axis == 2:
            sizes[:1] = [self._shape[1], self._outer // tf.maximum(self._shape[1], 1)]
        return tf.reshape(folded, tf.stack(sizes))

    def unfold_data(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(self._exchange(x, self._outer, self._iterations), self._shape)

    def fold_vector(self, v: tf.Tensor) -> tf.Tensor:
        return tf.reshape(v, [-1])

    def unfold_vector(self, v: tf.Tensor) -> tf.Tensor:
        return tf.reshape(v, tf.stack([self._iterations, self._channels]))

    def fold_statistics(self, v: tf.Tensor) -> tf.Tensor:
        if self.axis == 1:
            return self.fold_vector(v)
        by_iteration = tf.reshape(v, tf.stack([self._iterations, -1, self._channels]))
        return tf.reshape(tf.transpose(by_iteration, [1, 0, 2]), tf.stack([-1, self._iterations * self._channels]))

    def unfold_statistics(self, v: tf.Tensor) -> tf.Tensor:
        if self.axis == 1:
            return self.unfold_vector(v)
        sizes = tf.stack([tf.shape(v)[0], self._iterations, self._channels])
        return tf.transpose(tf.reshape(v, sizes), [1, 0, 2])

    def fold_rows(self, keep: tf.Tensor) -> tf.Tensor:
        rows = self._inner // tf.maximum(self._last, 1)
        channels = 1 if self._axis_is_last else self._channels
        folded = tf.transpose(tf.reshape(keep, tf.stack([self._iterations, self._outer, channels, rows])), [1, 0, 2, 3])
        folded = tf.broadcast_to(folded, tf.stack([self._outer, self._iterations, self._channels, rows]))
        return tf.reshape(folded, tf.stack([self._outer, self._iterations * self._channels, rows]))

    def _rows_of_bits(self) -> tuple[tf.Tensor, tf.Tensor]:
        """How many bits a row of an iteration's mask has, and one of the call's."""
        return (
            _mask.row_length(self._outer // self._virtual_batches, self._channels, self._inner),
            _mask.row_length(self._outer // self._virtual_batches, self._iterations * self._channels, self._inner),
        )

    def fold_mask(self, mask: tf.Tensor) -> tf.Tensor:
        mask = tf.reshape(mask, [-1])
        if not self._has_mask:  # it is empty
            return mask
        row, folded_row = self._rows_of_bits()
        return _mask.pack(self._exchange(_mask.unpack(mask, row), self._iterations, self._outer), folded_row)

    def unfold_mask(self, mask: tf.Tensor) -> tf.Tensor:
        if not self._has_mask:
            return tf.zeros(tf.stack([self._iterations, 0]), tf.uint8)
        row, folded_row = self._rows_of_bits()
        bits = self._exchange(_mask.unpack(mask, folded_row), self._outer, self._iterations)
        # Bytes are counted by hand: there may be no iteration to divide them by.
        rows = self._outer * self._channels * self._inner // row
        return tf.reshape(_mask.pack(bits, row), tf.stack([self._iterations, rows * ((row + 7) // 8)]))
