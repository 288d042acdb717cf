"""Run by models/test_replicas.py, once a process: a few steps on two replicas, with shares of every size.

python -m tfops_testing.replica_check mirrored|workers NORM OUT.npz
"""

from __future__ import annotations

import sys

import keras
import numpy as np
import tensorflow as tf

from trainer import mnist_keras, replicas

SHARES = ((6, 6), (7, 3), (5, 0), (0, 4))  # images of each replica, by step
TEST = (3, 1)


def batch_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """A step's whole batch."""
    rng = np.random.default_rng(step)
    size = sum(SHARES[step] if step < len(SHARES) else TEST)
    return rng.random((size, 28, 28, 1), np.float32), rng.integers(0, 10, size).astype(np.int32)


def build(norm: str, synchronized: bool) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = mnist_keras.build_model(norm, synchronized, dropout=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9), loss)
    return model


def main(kind: str, norm: str, out: str) -> None:
    if kind == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    else:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == 2
    with strategy.scope():
        model = build(norm, synchronized=True)
        model.optimizer.build(model.trainable_variables)
    steps = replicas.Steps(strategy, model)

    def shared(step: int) -> tuple:
        sizes = SHARES[step] if step < len(SHARES) else TEST

        def share(whole: np.ndarray):
            parts = np.split(whole, [sizes[0]])
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(parts[context.replica_id_in_sync_group])
            )

        images, labels = batch_of(step)
        return share(images), share(labels)

    results = {}
    for step in range(len(SHARES)):
        results[f"totals_{step}"] = steps.train(shared(step)).numpy()
        for index, weight in enumerate(model.get_weights()):
            results[f"weight_{step}_{index}"] = weight
    results["totals_test"] = steps.test(shared(len(SHARES))).numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
