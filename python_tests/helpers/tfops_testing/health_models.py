"""Models and data for the tests of `BatchNormHealth`."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

import tfops


def make_net(norm=tfops.keras.BatchNormalization, channels=5, rate=0.0, **options):
    """Two batch norms, `first` on the inputs and `second` behind a dense layer of 4 outputs."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([channels])
    y = layers.Dense(4, name="dense")(norm(name="first", **options)(inputs))
    model = keras.Model(inputs, layers.Dense(1, name="out")(norm(name="second", **options)(y)), name="net")
    model.compile(keras.optimizers.SGD(rate), "mse", jit_compile=False)
    return model


def make_data(size=24, channels=5):
    return np.random.default_rng(0).standard_normal([size, channels]).astype(np.float32)


def fit(model, health, x, epochs=1, batch_size=8, callbacks=()):
    y = np.zeros([len(x), *model.output_shape[1:]])
    callbacks = [health, *callbacks]
    return model.fit(x, y, batch_size, epochs, shuffle=False, verbose=0, callbacks=callbacks).history


def expected_drift(x, layer, axes):
    x = np.asarray(x, np.float64)
    mean, variance = (np.asarray(v.numpy(), np.float64) for v in (layer.moving_mean, layer.moving_variance))
    drift = (x.mean(axis=axes) - mean) / np.sqrt(variance + layer.epsilon)
    return drift, np.log((x.var(axis=axes) + layer.epsilon) / (variance + layer.epsilon))
