"""A script: batch norm on two replicas and on one device, for the cases in its argument, a JSON list; prints JSON.

A process of its own, since logical devices have to be asked for before TensorFlow looks at the machine.
"""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import tensorflow as tf

import tfops

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def run(case, parts):
    rng = np.random.default_rng(0)
    shape = [sum(case["parts"]), *case["shape"]]
    x, residual = (rng.standard_normal(shape) * 2 + case["mean"] for _ in range(2))
    residual -= case["mean"]
    weights = rng.standard_normal(shape)
    mask = rng.random(shape[:-1]) < 0.7
    bounds = np.cumsum([0, *parts])
    dtype = case["dtype"]

    def part(context, array, dtype):
        pieces = [tf.constant(array[a:b], dtype) for a, b in itertools.pairwise(bounds)]
        return pieces[context.replica_id_in_sync_group]

    def make():
        layer = tfops.keras.BatchNormalization(synchronized=True, momentum=0.75, dtype=dtype, **case["layer"])
        layer.build((None, *case["shape"]))
        channels = layer.moving_mean.shape[0]
        if layer.gamma is not None:
            layer.gamma.assign(np.linspace(0.5, 2, channels))
            layer.beta.assign(np.linspace(-1, 1, channels))
        return layer

    def step(layer):
        context = tf.distribute.get_replica_context()
        inputs = [part(context, x, dtype)] + ([part(context, residual, dtype)] if case["residual"] else [])
        kwargs = {"residual": inputs[1]} if case["residual"] else {}
        if case["mask"]:
            kwargs["mask"] = part(context, mask, tf.bool)
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = layer(inputs[0], training=True, **kwargs)
                loss = tf.reduce_sum(part(context, weights, dtype) * y * y)
            data = tape.gradient(loss, inputs + [v.value for v in layer.trainable_variables])
            product = tf.reduce_sum(data[0] ** 2) if case["second"] else tf.constant(0.0, dtype)
        # Gradients of variables are summed by the optimizer; here, by hand.
        variables = [context.all_reduce("sum", g) for g in data[len(inputs) :]]
        second = outer.gradient(product, inputs[0]) if case["second"] else tf.zeros_like(inputs[0])
        return [y, *data[: len(inputs)], second], variables

    if len(parts) == 1:
        layer = make()
        split, whole = step(layer)
        moving = [[w.numpy() for w in layer.non_trainable_weights]]
    else:
        with strategy.scope():
            layer = make()
        split, whole = strategy.run(tf.function(lambda: step(layer)) if case["graph"] else lambda: step(layer))
        split = [np.concatenate([p.numpy() for p in strategy.experimental_local_results(value)]) for value in split]
        whole = [strategy.experimental_local_results(value)[0] for value in whole]
        averages = [strategy.experimental_local_results(w.value) for w in layer.non_trainable_weights]
        moving = [[average[r].numpy() for average in averages] for r in range(len(parts))]
    results = [*split, *whole]
    return [[np.asarray(r, np.float64).tolist() for r in results + m] for m in moving]


cases = json.loads(sys.argv[1])
print(json.dumps([[run(case, case["parts"]), run(case, [sum(case["parts"])])] for case in cases]))
