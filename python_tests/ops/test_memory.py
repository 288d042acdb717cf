"""Memory: none is lost, none is taken that somebody still reads, and where there is none left, that is said."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfops._library import ops
from tfops_testing.fresh_process import run_python

STEPS = 10_000

_GROWTH = """
import os, sys
import tensorflow as tf
import tfops


def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def step(x, scale, offset):
    with tf.GradientTape() as tape:
        tape.watch([x, scale, offset])
        y, mean, variance = tfops.fused_batch_norm(x, scale, offset, activation="relu", residual=x)
        loss = tf.reduce_sum(y) + tf.reduce_sum(mean) + tf.reduce_sum(variance)
    return tape.gradient(loss, [x, scale, offset])


if sys.argv[1] == "graph":
    step = tf.function(step)
steps = int(sys.argv[2])
x, scale, offset = tf.random.stateless_normal([40, 24], [1, 2]), tf.ones(24), tf.zeros(24)
for _ in range(steps // 10):
    step(x, scale, offset)
before = resident_bytes()
for _ in range(steps):
    step(x, scale, offset)
print(resident_bytes() - before)
"""


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_steps_leave_no_memory_behind(mode):
    """Forward and backward, 10,000 times, in a process where nothing else takes memory."""
    run = run_python("-c", _GROWTH, mode, STEPS)
    assert run.returncode == 0, run.stderr
    # Any array of these, kept from each step, would be 10,000 x 96 bytes and more.
    assert int(run.stdout) < STEPS * 96 / 2


X = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
V = np.linspace(0.5, 2, 8).astype(np.float32)
MASK = np.zeros((50,), np.uint8)
CALLS = {
    "training": lambda x, dy, r, v: ops.tfops_batch_norm_training(x, v, v, [v, v], [r], activation="relu"),
    "training_grad": lambda x, dy, r, v: ops.tfops_batch_norm_training_grad(
        dy, x, v, v, v, v, tf.constant(MASK), [v, v], [], activation="relu", has_residual=True
    ),
    "inference": lambda x, dy, r, v: ops.tfops_batch_norm_inference(x, v, v, v, v, [r], activation="relu"),
    "inference_grad": lambda x, dy, r, v: ops.tfops_batch_norm_inference_grad(
        dy, x, v, v, v, v, [r], activation="relu", has_residual=True
    ),
    "moments": lambda x, dy, r, v: ops.tfops_batch_norm_moments(x, [], U=tf.float32),
    "gradient_moments": lambda x, dy, r, v: ops.tfops_batch_norm_gradient_moments(dy, x, v, v, v, v, [r]),
    "gradient_normalize": lambda x, dy, r, v: ops.tfops_batch_norm_gradient_normalize(
        dy, x, v, v, v, v, v, v, [], [r], activation="relu"
    ),
}


@pytest.mark.parametrize("holder", ["tensors", "graph", "variables"])
@pytest.mark.parametrize("op", CALLS)
def test_inputs_that_are_still_read_are_not_overwritten(op, holder):
    """Outputs lie in inputs' memory only where nobody will read that again."""
    given = (X, X[::-1].copy(), X * 2, V)
    if holder == "variables":  # what a function reads of them is their own memory
        held = [tf.Variable(array) for array in given]
        tf.function(lambda: CALLS[op](*held))()
    elif holder == "graph":  # each input is read once more, after the op

        @tf.function
        def run(*arrays):
            inputs = [array + 0 for array in arrays]
            outputs = CALLS[op](*inputs)
            outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            with tf.control_dependencies(list(outputs)):
                return [tf.identity(tensor) for tensor in inputs]

        held = run(*map(tf.constant, given))
    else:
        held = [tf.constant(array) for array in given]
        CALLS[op](*held)
    for tensor, array in zip(held, given, strict=True):
        np.testing.assert_array_equal(tensor, array)


def test_one_tensor_may_be_every_input():
    """x is its own residual and its own gradient: no output may be written before the last of them is read."""

    def run(x):
        y = ops.tfops_batch_norm_inference(x, V, V, V, V, [x], activation="silu")
        gradients = ops.tfops_batch_norm_inference_grad(x, x, V, V, V, V, [x], activation="silu", has_residual=True)
        return [y, *gradients]

    def apart(x):
        a, b, c, d, e = (tf.constant(x.numpy()) for _ in range(5))
        y = ops.tfops_batch_norm_inference(a, V, V, V, V, [b], activation="silu")
        gradients = ops.tfops_batch_norm_inference_grad(c, d, V, V, V, V, [e], activation="silu", has_residual=True)
        return [y, *gradients]

    want = apart(tf.constant(X))
    for got in (run(tf.constant(X)), tf.function(lambda x: run(x + 0))(tf.constant(X))):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g, w)


# With room for so many MiB more, a tensor of 64 MiB: for x, but not for what an op makes of it.
_NO_ROOM = """
import resource, sys
import tensorflow as tf
from tfops._library import ops

x, v = tf.ones([1 << 18, 64]), tf.ones([64])
assert ops.tfops_batch_norm_inference(x[:8], v, v, v, v, []).shape == (8, 64)  # all threads have their stacks
calls = [
    lambda: ops.tfops_batch_norm_training(x, v, v, [], []),
    lambda: ops.tfops_batch_norm_training_grad(x, x, v, v, v, v, tf.zeros([0], tf.uint8), [], []),
    lambda: ops.tfops_batch_norm_inference(x, v, v, v, v, []),
    lambda: ops.tfops_batch_norm_inference_grad(x, x, v, v, v, v, []),
    lambda: ops.tfops_batch_norm_gradient_normalize(x, x, v, v, v, v, v, v, [], []),
]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), limits[1]))
for call in calls:
    try:
        call()
    except tf.errors.ResourceExhaustedError as error:
        continue
    sys.exit("no error")
try:  # of a size that no machine has
    ops.tfops_batch_norm_moments(tf.zeros([0, 1 << 40]), [], U=tf.float32)
except tf.errors.ResourceExhaustedError:
    pass
else:
    sys.exit("no error for 4 TiB")
resource.setrlimit(resource.RLIMIT_AS, limits)
assert float(calls[2]()[0, 0]) == 1.0  # and afterwards it goes on
print("as it should be")
"""


def test_no_room_is_resource_exhausted():
    # Without oneDNN, whose allocator waits ten seconds for each that it cannot serve.
    run = run_python("-c", _NO_ROOM, TF_ENABLE_ONEDNN_OPTS="0")
    assert run.stdout == "as it should be\n", run.stdout + run.stderr
