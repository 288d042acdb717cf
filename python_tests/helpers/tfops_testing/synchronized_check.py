"""A script: batch norm on two replicas and on one device, for the cases in its argument, a JSON list; prints JSON.

A process of its own, since logical devices have to be asked for before TensorFlow looks at the machine.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys

import numpy as np
import tensorflow as tf

import tfops

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

# The collectives of the layer: which, and of how many numbers.
collectives = []
sum_over_replicas = tf.distribute.ReplicaContext.all_reduce


def _recorded(name):
    original = getattr(tf.distribute.ReplicaContext, name)

    def call(self, *arguments, **options):
        tensors = [argument for argument in tf.nest.flatten([arguments, options]) if tf.is_tensor(argument)]
        collectives.append((name, *(tensor.shape.num_elements() for tensor in tensors)))
        return original(self, *arguments, **options)

    return call


for method in ("all_gather", "all_reduce"):
    setattr(tf.distribute.ReplicaContext, method, _recorded(method))


def run(case, parts):
    rng = np.random.default_rng(0)
    shape = [sum(case["parts"]), *case["shape"]]
    x, residual = (rng.standard_normal(shape) * 2 + case["mean"] for _ in range(2))
    residual -= case["mean"]
    weights = rng.standard_normal(shape)
    if case["bad"]:
        x[-1, ..., 0] = np.nan
    mask = rng.random(shape[:-1]) < 0.7
    bounds = np.cumsum([0, *parts])
    dtype = case["dtype"]

    def parted(array, dtype):
        pieces = [tf.constant(array[a:b], dtype) for a, b in itertools.pairwise(bounds)]
        if len(parts) == 1:
            return pieces[0]
        return strategy.experimental_distribute_values_from_function(lambda c: pieces[c.replica_id_in_sync_group])

    def make():
        options = {"synchronized": True, "momentum": 0.75, "dtype": dtype, **case["layer"]}
        layer = tfops.keras.BatchNormalization(**options)
        layer.build((None, *case["shape"]))
        channels = layer.moving_mean.shape[0]
        if layer.gamma is not None:
            layer.gamma.assign(np.linspace(0.5, 2, channels))
            layer.beta.assign(np.linspace(-1, 1, channels))
        return layer

    def step(layer, x, residual, weights, mask):
        inputs = [x, residual] if case["residual"] else [x]

        def call(x, residual=None):
            return layer(x, training=True, residual=residual, mask=mask if case["mask"] else None)

        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = (tf.recompute_grad(call) if case["recomputed"] else call)(*inputs)
                loss = tf.reduce_sum(weights * y * y)
            data = tape.gradient(loss, inputs + [v.value for v in layer.trainable_variables])
            product = tf.reduce_sum(data[0] ** 2) if case["second"] else tf.constant(0.0, dtype)
        # Gradients of variables are summed by the optimizer; here, by hand.
        context = tf.distribute.get_replica_context()
        variables = [sum_over_replicas(context, "sum", g) for g in data[len(inputs) :]]
        second = outer.gradient(product, inputs[0]) if case["second"] else tf.zeros_like(inputs[0])
        return [y, *data[: len(inputs)], second], variables

    data = [parted(array, dtype) for array in (x, residual, weights)] + [parted(mask, tf.bool)]
    if len(parts) == 1:
        layer = make()
        split, whole = step(layer, *data)
        moving = [[w.numpy() for w in layer.non_trainable_weights]]
    else:
        with strategy.scope():
            layer = make()
        on_replica = functools.partial(step, layer)
        split, whole = strategy.run(tf.function(on_replica) if case["graph"] else on_replica, data)
        split = [np.concatenate([p.numpy() for p in strategy.experimental_local_results(value)]) for value in split]
        whole = [strategy.experimental_local_results(value)[0] for value in whole]
        averages = [strategy.experimental_local_results(w.value) for w in layer.non_trainable_weights]
        moving = [[average[r].numpy() for average in averages] for r in range(len(parts))]
    results = [*split, *whole]
    return [[np.asarray(r, np.float64).tolist() for r in results + m] for m in moving]


cases = json.loads(sys.argv[1])
results = []
for case in cases:
    collectives.clear()
    results.append([run(case, case["parts"]), run(case, [sum(case["parts"])]), sorted(collectives, key=str)])
print(json.dumps(results))
