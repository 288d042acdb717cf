"""Every Python path of the op as TensorFlow 1 behaves, in a process of its own.

python -m tfops_testing.tf1_check BEHAVIOR

BEHAVIOR is what is switched off: "v2_behavior", "tensor_equality", or "" for nothing.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import tensorflow as tf

import tfops
from tfops import _phases

v1 = tf.compat.v1
NAMES = ("x", "scale", "offset", "mean", "variance", "residual")


def _values(shape, axis):
    rng = np.random.default_rng(0)
    sizes = {"x": shape, "residual": shape}
    return {name: rng.uniform(0.5, 2, sizes.get(name, [shape[axis]])) for name in NAMES}


def _penalty(y, variables):
    """The gradients of y, and those of their squares."""
    first = tf.gradients(tf.reduce_sum(tf.sin(y)), variables, unconnected_gradients="zero")
    second = tf.gradients(tf.add_n([tf.reduce_sum(f**2) for f in first]), variables, unconnected_gradients="zero")
    return [y, *first, *second]


def _close(session, got, want, feed=None):
    for g, w in zip(session.run(got, feed), session.run(want, feed), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9 * (np.abs(w).max(initial=0) + 1))


def derivatives():
    layouts = [((3, 4, 2), -1), ((4, 2, 3), 1), ((3, 1), -1), ((2, 5, 3), 0)]
    for (shape, axis), activation in itertools.product(layouts, (None, "relu", "silu")):
        with tf.Graph().as_default(), v1.Session() as session:
            values = _values(shape, axis)
            variables = [v1.placeholder_with_default(values[name], None) for name in NAMES]
            is_training = v1.placeholder(tf.bool, [])
            for mode in (True, False, is_training) if activation == "relu" else (True, False):
                settings = {"axis": axis, "activation": activation, "is_training": mode, "epsilon": 0.003}
                settings["exponential_avg_factor"] = 0.25
                known = [tf.ensure_shape(v, values[name].shape) for v, name in zip(variables, NAMES, strict=True)]
                inputs = dict(zip(NAMES, known, strict=True))
                got = _penalty(tfops.fused_batch_norm(**inputs, **settings)[0], variables)
                want = _penalty(tfops.reference.fused_batch_norm(**inputs, **settings)[0], variables)
                for feed in ({}, {is_training: True}, {is_training: False}) if mode is is_training else ({},):
                    if mode is not is_training or feed:
                        _close(session, got, want, feed)


def phases():
    for shape, axis in (((3, 4, 2), -1), ((4, 2, 3), 1)):
        with tf.Graph().as_default(), v1.Session() as session:
            values = _values(shape, axis)
            x, scale, offset, residual = (tf.constant(values[name]) for name in ("x", "scale", "offset", "residual"))
            keep = tf.constant(np.random.default_rng(1).random(shape[:-1]) < 0.7)
            statistics = _phases.batch_statistics(x, axis, keep=keep)
            settings = {"axis": axis, "epsilon": 0.003, "activation": "silu", "residual": residual}
            got = _phases.normalize(x, scale, offset, statistics, **settings)
            weights = tf.broadcast_to(tf.cast(keep, x.dtype)[..., None], shape)
            others = [i for i in range(len(shape)) if i != axis % len(shape)]
            mean, variance = tf.nn.weighted_moments(x, others, weights)
            want = tfops.reference.fused_batch_norm(x, scale, offset, mean, variance, is_training=False, **settings)[0]
            variables = [x, scale, offset, residual]
            _close(session, _penalty(got, variables), _penalty(want, variables))


def reference_variables():
    with tf.Graph().as_default(), v1.Session() as session:
        values = _values((3, 4, 2), -1)
        make = lambda name: v1.get_variable(name, initializer=values[name], use_resource=False)  # noqa: E731
        variables = {name: make(name) for name in NAMES}
        constants = {name: tf.constant(value) for name, value in values.items()}
        # An assignment's result is a reference too.
        assigned = {**variables, "scale": v1.assign(variables["scale"], values["scale"])}
        assigned["x"] = v1.assign(variables["x"], values["x"])
        assert assigned["scale"].dtype != tf.float64
        session.run(v1.global_variables_initializer())
        for training, inputs in itertools.product((True, False), (variables, assigned)):
            settings = {"axis": -1, "activation": "relu", "is_training": training, "exponential_avg_factor": 0.5}
            got = tfops.fused_batch_norm(**inputs, **settings)
            want = tfops.reference.fused_batch_norm(**constants, **settings)
            _close(session, list(got), list(want))
            gradients = tf.gradients(got[0], [variables["offset"]])
            _close(session, gradients, tf.gradients(want[0], [constants["offset"]]))


def loops():
    with tf.Graph().as_default(), v1.Session() as session:
        x = tf.constant(np.random.default_rng(0).standard_normal((3, 5, 2)))
        one = tf.ones(2, x.dtype)

        def run(x):
            y = tfops.fused_batch_norm(x, one, one, axis=-1, activation="relu", residual=x)[0]
            return tf.gradients(tf.sin(y), x)[0]

        got = tf.vectorized_map(run, x, fallback_to_while_loop=False)
        _close(session, [got], [tf.stack([run(each) for each in tf.unstack(x)])])


if __name__ == "__main__":
    behavior = sys.argv[1]
    if behavior:
        getattr(v1, f"disable_{behavior}")()
    for check in (derivatives, phases, reference_variables, loops):
        check()
        print(check.__name__, "ok", flush=True)
