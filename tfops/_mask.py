"""The mask of a training op: one bit an element, in rows of whole bytes, the lowest bit first.

How bits lie is told in csrc/batch_norm/batch_norm.h.
"""

from __future__ import annotations

import tensorflow as tf

_BITS = [1, 2, 4, 8, 16, 32, 64, 128]

# Sizes are compared by tf.equal: in TensorFlow 1's behaviour, == compares tensors by identity.


def row_length(outer: tf.Tensor, channels: tf.Tensor, inner: tf.Tensor) -> tf.Tensor:
    """The elements in each row, at least 1, of a tensor that folds to [outer, channels, inner]."""
    row = tf.where(tf.equal(inner, 1), channels, inner)
    return tf.maximum(tf.where(tf.equal(channels, 1), outer * inner, row), 1)


def unpack(mask: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """Bools, [rows, row], from the bytes of rows of so many bits."""
    bits = tf.bitwise.bitwise_and(mask[:, None], tf.constant(_BITS, tf.uint8))
    return tf.reshape(tf.not_equal(bits, 0), tf.stack([-1, (row + 7) // 8 * 8]))[:, :row]


def pack(bits: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """The bytes of these bools, taken in rows of so many."""
    rows = tf.reshape(bits, tf.stack([-1, row]))
    rows = tf.pad(rows, [[0, 0], [0, (row + 7) // 8 * 8 - row]])
    bytes_ = tf.reshape(rows, [-1, 8])
    return tf.reduce_sum(tf.where(bytes_, tf.constant(_BITS, tf.uint8), tf.zeros([], tf.uint8)), 1)
