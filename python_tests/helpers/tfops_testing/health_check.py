"""A script: `BatchNormHealth` where two replicas train; prints JSON.

A process of its own, since logical devices have to be asked for before TensorFlow looks at the machine.
"""

from __future__ import annotations

import json
import warnings

import keras
import numpy as np
import tensorflow as tf

import tfops

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
rng = np.random.default_rng(0)


def run(norm, bad, **options):
    keras.utils.set_random_seed(0)
    x = rng.standard_normal([24, 5]) * 3 + 1
    if bad is not None:
        x[bad] = np.nan
    with strategy.scope():
        inputs = keras.Input([5])
        outputs = keras.layers.Dense(1)(norm(name="norm", momentum=0.5, **options)(inputs))
        model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    health = tfops.keras.BatchNormHealth("log", data=x[:7], drift_threshold=9.0, each_batch=True)
    history = model.fit(
        x, np.zeros([24, 1]), batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[health]
    ).history
    layer = model.get_layer("norm")
    mean, variance = (np.float64(v.numpy()) for v in (layer.moving_mean, layer.moving_variance))
    drift = (x[:7].mean(axis=0) - mean) / np.sqrt(variance + layer.epsilon)
    return {
        "findings": health.findings,
        "history": {name: values for name, values in history.items() if name.startswith("batch_norm")},
        "drift": np.abs(drift).max(),
    }


warnings.simplefilter("error", UserWarning)
cases = {
    "stock": (keras.layers.BatchNormalization, None, {}),
    "healthy": (tfops.keras.BatchNormalization, None, {}),
    "synchronized": (tfops.keras.BatchNormalization, None, {"synchronized": True}),
    "bad": (tfops.keras.BatchNormalization, (14, 3), {}),  # in the second replica's share of the second batch
}
print(json.dumps({name: run(norm, bad, **options) for name, (norm, bad, options) in cases.items()}))
