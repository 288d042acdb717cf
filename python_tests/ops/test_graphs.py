"""The op works in tf.function and in TF1 graphs, with shapes known late; shape functions infer what can be known."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import tfops

v1 = tf.compat.v1


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    channels = rng.uniform(0.5, 2, (4, 5)).astype(np.float32)
    return rng.standard_normal((6, 3, 2, 5)).astype(np.float32), *channels


def _want(data, is_training, **kwargs):
    x, scale, offset, mean, variance = data
    return [
        t.numpy()
        for t in tfops.reference.fused_batch_norm(
            x, scale, offset, mean, variance, is_training=is_training, exponential_avg_factor=0.5, **kwargs
        )
    ]


def _assert_close(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3, 2, 5), (None, 3, 2, 5), (None, None, None, 5), (None,) * 4, None], ids=str)
def test_tf_function(data, shape, is_training):
    vector = tf.TensorSpec([5] if shape else None, tf.float32)

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32), *[vector] * 4])
    def function(x, scale, offset, mean, variance):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, m, v = tfops.fused_batch_norm(
                x,
                scale,
                offset,
                mean,
                variance,
                is_training=is_training,
                exponential_avg_factor=0.5,
                activation="relu",
                residual=x,
            )
        return y, m, v, tape.gradient(y, x)

    *got, gradient = function(*data)
    _assert_close(got, _want(data, is_training, activation="relu", residual=data[0]))
    x = tf.constant(data[0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y, _, _ = tfops.fused_batch_norm(
            x,
            *data[1:],
            is_training=is_training,
            exponential_avg_factor=0.5,
            activation="relu",
            residual=x,
        )
    np.testing.assert_array_equal(gradient, tape.gradient(y, x))


def test_second_derivative_with_unknown_rank(data):
    def penalty(x, scale, offset, residual, **kwargs):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _, _ = tfops.fused_batch_norm(x, scale, offset, activation="relu", residual=residual, **kwargs)
            loss = tf.reduce_sum(y * y * y)
        return tf.reduce_sum(tape.gradient(loss, x) ** 2)

    def second(x, scale, offset, residual):
        total = []
        for kwargs in ({}, {"axis": 1, "data_format": "NHWC"}):
            with tf.GradientTape() as tape:
                tape.watch(x)
                channels = x.shape[1] if kwargs and x.shape.rank else (3 if kwargs else 5)
                value = penalty(x, scale[:channels], offset[:channels], residual, **kwargs)
            total.append(tape.gradient(value, x))
        return total

    x, scale, offset = (tf.constant(t) for t in data[:3])
    unknown = tf.TensorSpec(None, tf.float32)
    traced = tf.function(second, input_signature=[unknown, tf.TensorSpec([5]), tf.TensorSpec([5]), unknown])
    residual = tf.reverse(x, [0])
    for got, want in zip(traced(x, scale, offset, residual), second(x, scale, offset, residual), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("control_flow_v2", [True, False])
def test_placeholder_is_training(data, control_flow_v2):
    """As in the TF1 style: one graph for both modes, and gradients through it."""
    wants = {}
    for mode in (True, False):
        x = tf.constant(data[0])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, mean, variance = tfops.reference.fused_batch_norm(
                x, *data[1:], is_training=mode, exponential_avg_factor=0.5, activation="relu"
            )
            loss = tf.reduce_sum(y**2)
        wants[mode] = [y.numpy(), mean.numpy(), variance.numpy(), tape.gradient(loss, x).numpy()]

    enabled = v1.control_flow_v2_enabled()
    (v1.enable_control_flow_v2 if control_flow_v2 else v1.disable_control_flow_v2)()
    try:
        with tf.Graph().as_default():
            x = v1.placeholder(tf.float32, [None, 3, 2, 5])
            is_training = v1.placeholder(tf.bool, [])
            outputs = tfops.fused_batch_norm(
                x, *data[1:], is_training=is_training, exponential_avg_factor=0.5, activation="relu"
            )
            assert outputs[0].shape.as_list() == [None, 3, 2, 5]
            assert outputs[1].shape.as_list() == [5]
            gradient = tf.gradients(tf.reduce_sum(outputs[0] ** 2), x)[0]
            with v1.Session() as session:
                for mode, want in wants.items():
                    got = session.run([*outputs, gradient], {x: data[0], is_training: mode})
                    for g, w in zip(got, want, strict=True):
                        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
    finally:
        (v1.enable_control_flow_v2 if enabled else v1.disable_control_flow_v2)()


def test_is_training_as_tensor_in_eager_and_function(data):
    for mode in (True, False):
        got = tfops.fused_batch_norm(data[0], *data[1:], is_training=tf.constant(mode), exponential_avg_factor=0.5)
        _assert_close(got, _want(data, mode))
        function = tf.function(
            lambda flag: tfops.fused_batch_norm(data[0], *data[1:], is_training=flag, exponential_avg_factor=0.5)
        )
        _assert_close(function(tf.constant(mode)), _want(data, mode))


def test_session_on_a_named_device_with_variables(data):
    with tf.Graph().as_default(), tf.device("/CPU:0"):
        scale = v1.get_variable("scale", initializer=data[1])
        offset = v1.get_variable("offset", initializer=data[2])
        x = v1.placeholder(tf.float32, [6, 3, 2, 5])
        y, _, _ = tfops.fused_batch_norm(x, scale, offset, name="bn")
        assert y.op.type == "Tfops>BatchNormTraining"
        assert y.op.name == "bn"
        assert y.device.endswith("CPU:0")
        train = v1.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(y**2))
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            before = session.run(scale)
            session.run(train, {x: data[0]})
            assert not np.array_equal(before, session.run(scale))


def test_graph_is_saved_and_loaded(tmp_path, data):
    module = tf.Module()
    module.call = tf.function(
        lambda x: tfops.fused_batch_norm(x, *data[1:], is_training=False, activation="silu")[0],
        input_signature=[tf.TensorSpec([None, 3, 2, 5])],
    )
    want = module.call(data[0])
    tf.saved_model.save(module, str(tmp_path))
    np.testing.assert_array_equal(tf.saved_model.load(str(tmp_path)).call(data[0]), want)


def test_static_shapes():
    with tf.Graph().as_default():

        def shapes(x, vector, **kwargs):
            tensors = [v1.placeholder(tf.float32, x), *(v1.placeholder(tf.float32, vector) for _ in range(2))]
            return [t.shape for t in tfops.fused_batch_norm(*tensors, **kwargs)]

        assert shapes([2, None, 7], [7]) == [[2, None, 7], [7], [7]]
        # What one input knows, all outputs know.
        assert [s.as_list() for s in shapes([2, None, None], [7])] == [[2, None, 7], [7], [7]]
        assert [s.as_list() for s in shapes([2, 5, None], None)] == [[2, 5, None], [None], [None]]
        assert [s.as_list() for s in shapes([2, 5, None], None, data_format="NCHW")] == [[2, 5, None], [5], [5]]
        assert shapes(None, [7])[1].as_list() == [7]
        assert shapes(None, None)[0].rank is None


def test_mask_shape_is_inferred():
    with tf.Graph().as_default() as graph:
        for shape, bytes_ in (([2, 3, 20], 6 * 3), ([None, 3, 20], None)):
            x = v1.placeholder(tf.float32, shape)
            v = tf.ones([20])
            tfops.fused_batch_norm(x, v, v, residual=x, activation="relu")
            op = [op for op in graph.get_operations() if op.type == "Tfops>BatchNormTraining"][-1]
            assert op.outputs[5].shape.as_list() == [bytes_]


def test_bad_shapes_are_found_while_building_the_graph():
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, [None, 4, 7])
        ok = v1.placeholder(tf.float32, [7])
        for arguments, message in (
            ((x, v1.placeholder(tf.float32, [6]), ok), "scale"),
            ((x, ok, v1.placeholder(tf.float32, [7, 1])), "offset"),
            ((v1.placeholder(tf.float32, [7]), ok, ok), "rank"),
        ):
            with pytest.raises(ValueError, match=message):
                tfops.fused_batch_norm(*arguments)
        with pytest.raises(ValueError, match="residual"):
            tfops.fused_batch_norm(x, ok, ok, residual=v1.placeholder(tf.float32, [None, 5, 7]))
        with pytest.raises(ValueError, match="axis"):
            tfops.fused_batch_norm(x, ok, ok, axis=3)
        with pytest.raises(ValueError, match="epsilon"):
            tfops.fused_batch_norm(x, ok, ok, epsilon=-8.0)
        with pytest.raises(ValueError, match="exponential_avg_factor"):
            tfops.fused_batch_norm(x, ok, ok, ok, ok, exponential_avg_factor=1.5)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_y_overwrites_an_input_only_where_nobody_else_reads_it(is_training, with_residual):
    rng = np.random.default_rng(0)
    shape = (64, 33, 64)  # enough for several threads
    tensors = [tf.constant(rng.standard_normal(shape).astype(np.float32)) for _ in range(2)]
    vectors = [tf.constant(rng.uniform(0.5, 2, 64).astype(np.float32)) for _ in range(4)]

    def step(x, residual):
        return tfops.fused_batch_norm(
            x,
            *vectors,
            is_training=is_training,
            exponential_avg_factor=0.5,
            activation="relu",
            residual=residual if with_residual else None,
        )

    @tf.function
    def nobody(x, residual):
        return step(2.0 * x, 3.0 * residual)

    @tf.function
    def somebody(x, residual):
        x, residual = 2.0 * x, 3.0 * residual
        return *step(x, residual), x, residual

    want = step(2.0 * tensors[0], 3.0 * tensors[1])
    *kept, x, residual = somebody(*tensors)
    np.testing.assert_array_equal(x, 2.0 * tensors[0])
    np.testing.assert_array_equal(residual, 3.0 * tensors[1])
    for got in (nobody(*tensors), kept):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g, w)
