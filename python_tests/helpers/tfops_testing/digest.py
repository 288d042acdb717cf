"""A hash of what tfops computes: forward, backward, frozen, in the Keras layer, in both layouts. As a program:

python -m tfops_testing.digest            # tests run it under other settings and compare
python -m tfops_testing.digest interrupt  # takes steps until it is interrupted, and then one more
"""

from __future__ import annotations

import hashlib
import signal
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfops


def _bytes(tensors: Any) -> bytes:
    return b"".join(t.numpy().tobytes() for t in tensors)


def digest() -> str:
    bits = hashlib.sha256()
    rng = np.random.default_rng(0)
    for shape, data_format in (((64, 28, 28, 24), "NHWC"), ((64, 24, 28, 28), "NCHW")):
        # dy holds denormals: whether they are zero must not depend on the thread.
        x, residual = (tf.constant(rng.standard_normal(shape), tf.float32) for _ in range(2))
        dy = tf.constant(rng.standard_normal(shape) * 1e-38, tf.float32)
        scale, offset, mean, variance = (tf.constant(rng.uniform(0.5, 2, 24), tf.float32) for _ in range(4))
        for is_training in (True, False):
            for activation, added in (("relu", residual), (None, None)):
                sources = [x, scale, offset]
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    outputs = tfops.fused_batch_norm(
                        *(*sources, mean, variance),
                        is_training=is_training,
                        exponential_avg_factor=0.25,
                        data_format=data_format,
                        activation=activation,
                        residual=added,
                    )
                bits.update(_bytes([*outputs, *tape.gradient(outputs[0], sources, dy)]))
    layer = tfops.keras.BatchNormalization(activation="silu")
    layer.build([None, 24])
    x = tf.reshape(tf.constant(rng.standard_normal(24 * 30000), tf.float32), [-1, 24])
    for training, trainable in ((True, True), (False, True), (True, False)):  # the last is frozen
        layer.trainable = trainable
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        bits.update(_bytes([y, tape.gradient(y, x), layer.moving_mean.value, layer.moving_variance.value]))
    return bits.hexdigest()


def _interrupted() -> None:
    """Steps of a model's training; the first line printed says that they have begun.

    A hundred steps are one call, so that the signal comes while the kernels run, and not between two lines of Python in
    TensorFlow, whose contexts make other errors of an interrupt.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    layer = tfops.keras.BatchNormalization(activation="relu")
    model = keras.Sequential([keras.Input([32, 32, 24]), layer, layer, keras.layers.GlobalAveragePooling2D()])
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.trainable_variables)
    x, y = tf.ones([64, 32, 32, 24]), tf.zeros([64, 24])

    @tf.function
    def train(steps: tf.Tensor) -> tf.Tensor:
        loss = tf.constant(0.0)
        for _ in tf.range(steps):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
        return loss

    train(tf.constant(1))
    print("begun", flush=True)
    try:
        while True:
            train(tf.constant(100))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(np.isfinite(train(tf.constant(1))), flush=True)


if __name__ == "__main__":
    if "determinism" in sys.argv:
        tf.config.experimental.enable_op_determinism()
    if "interrupt" in sys.argv:
        _interrupted()
    else:
        print(digest())
