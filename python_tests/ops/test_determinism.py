"""Ops are bitwise the same from run to run, for any number of threads, and with TensorFlow's own determinism on.

(The kernels on plain arrays: python_tests/kernels/test_cpu.py.)
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import tfops
import tfops_kernels
from tfops_testing import digest
from tfops_testing.fresh_process import start_python


def test_bits_are_the_same_in_every_run():
    want = digest.digest()
    for _ in range(19):
        assert digest.digest() == want


def test_bits_do_not_depend_on_threads_or_op_determinism():
    """In processes of their own, for neither can be changed in one that runs."""

    def start(threads, *arguments):
        count = {name: str(threads) for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")}
        return start_python("-m", "tfops_testing.digest", *arguments, **count)

    processes = [start(1), start(8, "determinism")]
    outputs = [process.communicate() for process in processes]
    assert [output.strip() for output, _ in outputs] == [digest.digest()] * 2, outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_denormals_are_numbers(dtype):
    """On every thread: TensorFlow's take them for zero, others do not."""
    kind = tf.as_dtype(dtype).as_numpy_dtype
    smallest = 2.0**-1074 if dtype == "float64" else 2.0**-133 if dtype == "bfloat16" else 2.0**-149
    x = (np.arange(1 << 20) % 7 * smallest).astype(kind).reshape(-1, 16)
    param = np.float64 if dtype == "float64" else np.float32
    ones, zeros = np.ones(16, param), np.zeros(16, param)
    epsilon = 2.0**-10
    # A deviation of 1: y is x.
    arguments = (ones, zeros, zeros, ones - epsilon)
    with tf.GradientTape() as tape:
        source = tf.constant(x)
        tape.watch(source)
        y, *_ = tfops.fused_batch_norm(source, *arguments, epsilon, is_training=False)
    np.testing.assert_array_equal(y.numpy(), x)
    np.testing.assert_array_equal(tape.gradient(y, source, source).numpy(), x)
    kernels = tfops_kernels.forward(x, *arguments, epsilon=epsilon, training=False, threads=2)
    np.testing.assert_array_equal(kernels.y, x)


def test_layouts_agree():
    """NHWC and NCHW of the same data sum in different orders; beyond that they compute the same.

    So mean and variance agree within 2 and 8 ulps, and gradients within 8 of the largest number. (dy is about 0, for
    dscale is off by the last bit of the saved mean times the sum of dy, and the two means may differ in that bit.)
    """
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 24, 21, 20, 24)).astype(np.float32)
    x += 3
    scale, offset = rng.uniform(0.5, 2, (2, 24)).astype(np.float32)

    def run(data_format, order):
        source, upstream = tf.transpose(x, order), tf.transpose(dy, order)
        variables = [source, tf.constant(scale), tf.constant(offset)]
        with tf.GradientTape() as tape:
            tape.watch(variables)
            y, mean, variance = tfops.fused_batch_norm(*variables, data_format=data_format)
        dx, dscale, doffset = tape.gradient(y, variables, upstream)
        back = np.argsort(order)
        return tf.transpose(y, back), mean, variance, tf.transpose(dx, back), dscale, doffset

    nhwc, nchw = run("NHWC", [0, 1, 2, 3]), run("NCHW", [0, 3, 1, 2])
    for got, want, ulps in zip(nchw, nhwc, (8, 2, 8, 8, 8, 8), strict=True):
        got, want = got.numpy(), want.numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=ulps * np.spacing(np.abs(want).max()))
