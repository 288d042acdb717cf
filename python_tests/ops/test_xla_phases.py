"""Compiled by XLA, the phases by themselves are custom calls too: the same results as without."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import _phases

pytestmark = pytest.mark.xla


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis", "masked", "activation", "residual"),
    [
        ((4, 5, 24), -1, True, "relu", True),
        ((3, 7, 5, 9), 1, True, None, False),
        ((33, 131), -1, False, "silu", True),
        ((30, 5, 1), 1, True, "relu6", False),
    ],
    ids=str,
)
def test_phases_agree_with_those_without_xla(shape, axis, masked, activation, residual, dtype):
    rng = np.random.default_rng(0)
    param = _phases.param_type(tf.as_dtype(dtype))
    x, other, dy = (tf.constant(rng.standard_normal(shape) + 1, dtype) for _ in range(3))
    scale, offset = (tf.constant(rng.uniform(0.5, 2, shape[axis]), param) for _ in range(2))
    keep = tf.constant(rng.random(shape[:-1]) < 0.6) if masked else None

    def run(x, scale, offset, other):
        inputs = [x, scale, offset] + [other] * residual
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            statistics = _phases.batch_statistics(x, axis, keep=keep, ballast=1e-7 if masked else 0.0)
            settings = {"axis": axis, "epsilon": 1e-3, "activation": activation}
            y = _phases.normalize(x, scale, offset, statistics, residual=other if residual else None, **settings)
        return [*statistics[:3], y, *tape.gradient(y, inputs, dy)]

    compiled = tf.function(run, jit_compile=True)
    # XLA's own arithmetic between the phases may round otherwise.
    tolerance = {"float16": 2**-9, "bfloat16": 2**-6, "float32": 1e-5, "float64": 1e-12}[dtype]
    for got, want in zip(compiled(x, scale, offset, other), run(x, scale, offset, other), strict=True):
        want = tf.cast(want, tf.float64).numpy()
        bound = tolerance * (1 + np.abs(want).max())
        np.testing.assert_allclose(tf.cast(got, tf.float64), want, rtol=0, atol=bound)


def test_masked_model_trains_compiled():
    """A Keras model with a mask and its jit_compile=True."""
    losses = []
    x = np.random.default_rng(0).standard_normal((16, 5, 2)).astype(np.float32)
    x[:, 3:] = 7.0
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Masking(7.0), tfops.keras.BatchNormalization(activation="relu")])
        model.compile("sgd", "mse", jit_compile=jit)
        losses.append(model.fit(x, x, epochs=3, batch_size=8, verbose=0, shuffle=False).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
