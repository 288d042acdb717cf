"""Many at once: threads, graphs, sessions, processes, and an interrupt in the middle of a step."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
import time

import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import _library
from tfops_testing import digest
from tfops_testing.fresh_process import run_python, start_python

THREADS = 8


def _at_once(body, count=THREADS):
    """body(0), body(1), ... in as many threads, started together."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(body, range(count)))


def _inputs(seed: int):
    # Of different sizes, each large enough to be shared among threads.
    x = tf.random.stateless_normal([32, 30 + seed, 32, 24], [seed, 0])
    return x, tf.random.stateless_uniform([24], [seed, 1]) + 0.5, tf.random.stateless_normal([24], [seed, 2])


def _step(x, scale, offset):
    with tf.GradientTape() as tape:
        tape.watch([x, scale, offset])
        outputs = tfops.fused_batch_norm(x, scale, offset, activation="relu", residual=x)
    return *outputs, *tape.gradient(outputs[0], [x, scale, offset], x)


def _bytes(tensors):
    return [tensor.numpy().tobytes() for tensor in tensors]


def test_python_threads_have_the_bits_of_one():
    """Eight threads, each with data of its own, eagerly and through one function."""
    want = [_bytes(_step(*_inputs(i))) for i in range(THREADS)]
    function = tf.function(_step, reduce_retracing=True)

    def work(i):
        inputs = _inputs(i)
        return [_bytes(step(*inputs)) for _ in range(4) for step in (_step, function)]

    for got, one in zip(_at_once(work), want, strict=True):
        assert all(result == one for result in got)


def test_threads_share_variables():
    """A layer's moving statistics, updated by eight threads: no update reads half of another."""
    layer = tfops.keras.BatchNormalization(momentum=0.5)
    layer.build([None, 512])
    # Each thread's batches have the same mean in all channels, and so must the moving mean: torn updates show.
    batches = [tf.ones([64, 512]) * float(i) for i in range(THREADS)]

    def work(i):
        for _ in range(20):
            layer(batches[i], training=True)
            tfops.fused_batch_norm(batches[i], layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)

    _at_once(work)
    mean = layer.moving_mean.numpy()
    assert np.isfinite(mean).all()
    assert 0 <= mean.min() <= mean.max() <= THREADS - 1


def test_ops_side_by_side_in_a_graph_have_the_same_bits():
    """Eight that do not wait for one another, in one graph; each asks the same pool for help."""
    inputs = [_inputs(i) for i in range(8)]
    want = [_bytes(_step(*arguments)) for arguments in inputs]
    with tf.Graph().as_default() as graph:
        steps = [_step(*(tf.constant(t) for t in map(lambda t: t.numpy(), arguments))) for arguments in inputs]
        config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=8, intra_op_parallelism_threads=2)
        with tf.compat.v1.Session(graph=graph, config=config) as session:
            for _ in range(3):
                got = session.run(steps)
                assert [[result.tobytes() for result in step] for step in got] == want


def test_sessions_side_by_side_keep_their_variables():
    """Eight sessions on one graph, each with a variable of its own, from eight threads."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 24])
        mean = tf.compat.v1.get_variable("mean", [24], use_resource=True, initializer=tf.zeros_initializer())
        ones = tf.ones([24])
        y, new, _ = tfops.fused_batch_norm(x, ones, ones, mean, ones, exponential_avg_factor=0.5)
        update = mean.assign(new)
        initialize = tf.compat.v1.global_variables_initializer()

    def work(i):
        data = np.full([5000, 24], float(i), np.float32)
        with tf.compat.v1.Session(graph=graph) as session:
            session.run(initialize)
            for _ in range(10):
                got, _ = session.run([y, update], {x: data})
                np.testing.assert_array_equal(got, np.ones_like(data))
            return session.run(mean)

    for i, got in enumerate(_at_once(work)):
        np.testing.assert_array_equal(got, np.full(24, i * (1 - 2.0**-10), np.float32))


def test_library_loaded_twice_works():
    """The same file again is the same library."""
    again = _library.load(tf.__version__)
    x, scale, offset = _inputs(0)
    arguments = {"running": [], "residual": [], "axis": -1}
    for ops in (_library.ops, again):
        y, *_ = ops.tfops_batch_norm_training(x, scale, offset, **arguments)
        np.testing.assert_array_equal(y, tfops.fused_batch_norm(x, scale, offset)[0])


_IMPORTED_AGAIN = """
import sys
import tensorflow as tf
import tfops as first

for name in [name for name in sys.modules if name.partition(".")[0] in ("tfops", "tfops_kernels")]:
    del sys.modules[name]
import tfops as second

assert first is not second
x = tf.random.stateless_normal([4, 3], [1, 2])
results = []
for package in (first, second):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y, *_ = package.fused_batch_norm(x, tf.ones(3), tf.zeros(3), activation="silu")
    compiled = tf.function(package.keras.BatchNormalization(activation="silu"), jit_compile=package.build_info()["xla"])
    results.append([y.numpy(), tape.gradient(y, x).numpy(), compiled(x, training=True).numpy()])
assert all((a == b).all() for a, b in zip(*results))
print("as it should be")
"""


def test_package_imported_twice_works():
    """As a notebook does that forgets its modules to load a new version: TensorFlow forgets nothing."""
    run = run_python("-c", _IMPORTED_AGAIN)
    assert run.stdout == "as it should be\n", run.stdout + run.stderr


def test_spawned_processes_have_the_same_bits():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = [pool.apply_async(digest.digest) for _ in range(2)]
        assert {result.get(timeout=120) for result in results} == {digest.digest()}


@pytest.mark.exclusive
def test_interrupt_ends_training_and_leaves_it_usable():
    """Ctrl-C ends training with KeyboardInterrupt at once, and leaves everything fit for use."""
    process = start_python("-m", "tfops_testing.digest", "interrupt")
    try:
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert output == "interrupted\nTrue\n", errors
    assert time.monotonic() - begin < 10
