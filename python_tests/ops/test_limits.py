"""The largest tensors through TensorFlow, in its memory: more elements than 32 bits count. `make limits`."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfops import _phases
from tfops._library import ops
from tfops_testing import oracle

pytestmark = [pytest.mark.limits, pytest.mark.exclusive]


def test_moments_and_inference_of_more_elements_than_32_bits_count():
    rows, channels = 34_375_000, 64
    assert rows * channels > 2**31
    # A tensor of one pattern, many times over: its statistics are those of the pattern.
    pattern = (np.random.default_rng(0).standard_normal((1000, channels)) + 1).astype(np.float16)
    x = tf.tile(tf.constant(pattern), [rows // 1000, 1])
    count, mean, variance = _phases.moments(x, -1)
    np.testing.assert_array_equal(count, np.full(channels, rows, np.float32))
    np.testing.assert_allclose(mean.numpy(), pattern.astype(np.float64).mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(variance.numpy(), pattern.astype(np.float64).var(0), rtol=0, atol=1e-4)
    v = tf.ones(channels)
    y = ops.tfops_batch_norm_inference(x, v, v, mean, variance, [], activation="relu")
    want = oracle.forward(pattern, v, v, mean.numpy(), variance.numpy(), training=False, activation="relu").y
    for begin in (0, rows // 2 // 1000 * 1000, rows - 1000):
        np.testing.assert_allclose(y[begin : begin + 1000].numpy().astype(np.float64), want, rtol=0, atol=0.01)
