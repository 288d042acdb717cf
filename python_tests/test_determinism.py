"""Ops are bitwise the same from run to run. (The kernels, for any number of threads: test_kernels_cpu.py.)"""

from __future__ import annotations

import tensorflow as tf

import tfops


def test_ops_repeat():
    x = tf.random.stateless_normal([64, 28, 28, 24], [1, 2])
    scale, offset = tf.linspace(0.5, 2.0, 24), tf.linspace(-1.0, 1.0, 24)

    def run():
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            outputs = tfops.fused_batch_norm(x, scale, offset, activation="silu")
            loss = tf.reduce_sum(outputs[0] * x)
        return [t.numpy().tobytes() for t in (*outputs, *tape.gradient(loss, [x, scale, offset]))]

    want = run()
    for _ in range(5):
        assert run() == want
