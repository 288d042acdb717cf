"""Bitwise the same from run to run and for any number of threads."""

from __future__ import annotations

import kernel_cases
import numpy as np
import pytest
import tensorflow as tf

import tfops
import tfops_kernels

# More than one work item each; folded, ragged and whole columns; planes.
SHAPES = [
    ((70000, 3), -1),
    ((5000, 65), -1),
    ((900, 600), -1),
    ((16, 24, 30, 31), 1),
    ((1, 2, 500, 501), 1),
    ((300001, 1), -1),
]


def _run(arrays, case, threads):
    forward = tfops_kernels.forward(
        arrays["x"],
        arrays["scale"],
        arrays["offset"],
        residual=arrays["residual"],
        axis=case.axis,
        activation="relu",
        threads=threads,
    )
    backward = tfops_kernels.backward(
        arrays["dy"],
        arrays["x"],
        arrays["scale"],
        arrays["offset"],
        forward.saved_mean,
        forward.saved_inv_std,
        residual=True,
        mask=forward.mask,
        axis=case.axis,
        activation="relu",
        threads=threads,
    )
    return [result.tobytes() for result in (*forward, *backward) if result is not None]


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_threads_and_repetition(shape, axis, dtype):
    case = kernel_cases.Case(shape, axis, dtype)
    arrays = kernel_cases.inputs(case)
    want = _run(arrays, case, 1)
    for threads in (1, 2, 3, 8):
        assert _run(arrays, case, threads) == want, f"{threads} threads"


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


def test_layouts_agree():
    """NHWC and NCHW sum in different orders, so they may differ in the last bits, and in no more."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 20, 21, 24)).astype(np.float32) + 3
    scale, offset = rng.uniform(0.5, 2, (2, 24)).astype(np.float32)
    nhwc = tfops_kernels.forward(x, scale, offset)
    nchw = tfops_kernels.forward(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), scale, offset, axis=1)
    np.testing.assert_allclose(nchw.mean, nhwc.mean, rtol=2**-22)
    np.testing.assert_allclose(nchw.variance, nhwc.variance, rtol=2**-20)
    np.testing.assert_allclose(nchw.y.transpose(0, 2, 3, 1), nhwc.y, rtol=2**-20, atol=2**-19)
