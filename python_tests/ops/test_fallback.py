"""Where the kernels cannot serve a GPU, TensorFlow's own operations compute what the ops would, and a warning says why.

There need be no GPU: `gpus_cannot_be_served` has tfops believe in one.
"""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import _fallback, _gpus, _phases, gradcheck, info
from tfops.gradcheck import _op
from tfops_testing import kernel_cases, oracle
from tfops_testing.op_cases import make_problem, to_float64

WHY = "this build of tfops has no CUDA kernels; install one that has, or run on the CPU"
DTYPES = (tf.float32, tf.float16, tf.bfloat16, tf.float64)
SHAPES = [((37, 3), -1), ((5, 7, 9), -1), ((4, 3, 5, 7), -1), ((4, 7, 3, 5), 1), ((2, 3, 2, 5, 4), -1)]
SHAPES += [((2, 5, 2, 3, 2), 1), ((4, 5, 6), 0), ((3, 4, 5, 6), 2)]
# In half precision each step rounds, not only the last: some roundings of the largest result.
BOUNDS = {"float64": 1e-12, "float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}


@pytest.fixture
def gpus_cannot_be_served(monkeypatch):
    monkeypatch.setattr(_gpus, "problem", lambda: WHY)
    monkeypatch.setattr(_gpus, "_served", False)
    monkeypatch.setattr(_gpus, "_warned", True)
    monkeypatch.delenv("TFOPS_STRICT", raising=False)


def _assert_close(got, want, dtype, name=""):
    want = np.asarray(want).astype(np.float64)
    scale = 1 + (np.abs(want).max() if want.size else 0)
    np.testing.assert_allclose(to_float64(got), want, rtol=0, atol=BOUNDS[dtype.name] * scale, err_msg=name)


def _ops_of(function, *arguments):
    graph = tf.function(function).get_concrete_function(*arguments).graph.as_graph_def()
    nodes = itertools.chain(graph.node, *(each.node_def for each in graph.library.function))
    return {node.op for node in nodes}


@pytest.mark.usefixtures("gpus_cannot_be_served")
@pytest.mark.parametrize("activation", [None, "leaky_relu", "elu"])
def test_in_place_is_without_effect(activation):
    """But for what it does not go with. A scale of 0 is none of that, for x is kept."""
    x, scale, offset, *_ = make_problem((5, 7, 9), -1, tf.float32)
    scale *= tf.cast(tf.range(9) > 0, tf.float32)

    def run(in_place):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            y = tfops.fused_batch_norm(x, scale, offset, activation=activation, in_place=in_place)[0]
        return [y, *tape.gradient(y, [x, scale, offset])]

    for got, want in zip(run(True), run(False), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="activation must be one of None, 'leaky_relu', 'elu' where in_place is True"):
        tfops.fused_batch_norm(x, scale, offset, activation="relu", in_place=True)


@pytest.mark.usefixtures("gpus_cannot_be_served")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_results_and_gradients_agree_with_float64(shape, axis, dtype, training):
    x, scale, offset, mean, variance, residual = make_problem(shape, axis, dtype)
    for activation, r, unbiased in ((None, None, True), ("relu", residual, False), ("silu", residual, True)):
        inputs = [x, scale, offset, mean, variance, *([] if r is None else [r])]
        settings = {"axis": axis, "exponential_avg_factor": 0.25, "activation": activation}
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tfops.fused_batch_norm(
                *inputs[:5], residual=r, is_training=training, unbiased=unbiased, **settings
            )
        dy = tf.cast(tf.reshape(tf.linspace(-1.0, 1.0, tf.size(x)), shape), dtype)
        dmean = tf.ones_like(mean) if training else tf.zeros_like(mean)
        gradients = tape.gradient(outputs, inputs, [dy, dmean, dmean])
        wide = [to_float64(each) for each in inputs]
        residual_wide = wide[5] if r is not None else None
        common = {"residual": residual_wide, "training": training, "unbiased": unbiased, **settings}
        common["epsilon"] = 0.001 if dtype == tf.float64 else float(np.float32(0.001))
        for name, got, want in zip(
            ["y", "mean", "variance"], outputs, oracle.forward(*wide[:5], **common), strict=False
        ):
            _assert_close(got, want, dtype, name)
        ones = np.ones(scale.shape) if training else None
        want = oracle.backward(to_float64(dy), *wide[:5], dmean=ones, dvariance=ones, **common)
        for name, got in zip(("x", "scale", "offset"), gradients, strict=False):
            _assert_close(got, getattr(want, name), dtype, f"gradient of {name}, {activation}")
        if training:
            np.testing.assert_allclose(to_float64(gradients[3]), np.full(scale.shape, 0.75))
        else:
            _assert_close(gradients[3], want.mean, dtype, "gradient of mean")
            _assert_close(gradients[4], want.variance, dtype, "gradient of variance")
        if r is not None:
            _assert_close(gradients[5], want.residual, dtype, "gradient of residual")


@pytest.mark.usefixtures("gpus_cannot_be_served")
@pytest.mark.parametrize("mode", _op.MODES)
def test_gradients_agree_with_difference_quotients(mode):
    for activation, residual in itertools.product((*kernel_cases.COMMON, "gelu_tanh"), (False, True)):
        for layout in ("NHWC", "NCHW"):
            case = gradcheck.Case(layout, mode, activation, residual)
            for result in gradcheck.check_op(case, ["float64", "float32"]):
                assert result.passed, result


@pytest.mark.usefixtures("gpus_cannot_be_served")
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_and_forward_mode_agree_with_the_reference(training):
    x, scale, offset, mean, variance, residual = make_problem((4, 3, 2, 5), -1, tf.float32)
    inputs = [x, scale, offset, residual, *([] if training else [mean, variance])]

    def derivatives(function):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y, m, v = function(
                    x, scale, offset, mean, variance, is_training=training, activation="silu", residual=residual
                )
                loss = tf.reduce_sum(y**3) + tf.reduce_sum(m**2 * v)
            first = inner.gradient(loss, inputs)
            square = sum(tf.reduce_sum(g**2) for g in first)
        with tf.autodiff.ForwardAccumulator(x, tf.sin(x)) as forward:
            outputs = function(x, scale, offset, mean, variance, is_training=training, residual=residual)
        return [
            *first,
            *outer.gradient(square, inputs),
            *(forward.jvp(each) for each in outputs[: 3 if training else 1]),
        ]

    for got, want in zip(
        derivatives(tfops.fused_batch_norm), derivatives(tfops.reference.fused_batch_norm), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-4 * (1 + np.abs(want).max()))


@pytest.mark.usefixtures("gpus_cannot_be_served")
@pytest.mark.parametrize("shape", [(0, 3, 3, 4), (2, 0, 5, 4), (0, 4), (1, 1, 1, 4)], ids=str)
def test_empty_batches_and_single_elements(shape):
    x, scale, offset = tf.ones(shape), tf.ones(4), tf.zeros(4)
    for unbiased in (True, False):
        y, mean, variance = tfops.fused_batch_norm(x, scale, offset, scale, scale, unbiased=unbiased)
        assert y.shape == shape
        np.testing.assert_array_equal(mean, np.ones(4))
        np.testing.assert_array_equal(variance, np.zeros(4) if tf.size(x) else np.ones(4))


@pytest.mark.usefixtures("gpus_cannot_be_served")
def test_graphs_of_unknown_shapes():
    x, scale, offset, mean, variance, residual = make_problem((4, 3, 5, 7), 1, tf.float32)

    def call(x, scale, offset, mean, variance, residual, training):
        return tfops.fused_batch_norm(
            x, scale, offset, mean, variance, axis=1, is_training=training, activation="relu", residual=residual
        )

    for shape in (None, [None] * 4, [4, None, None, 7]):
        data, vector = tf.TensorSpec(shape), tf.TensorSpec([None])
        function = tf.function(call, input_signature=[data, *[vector] * 4, data, tf.TensorSpec([], tf.bool)])
        for training in (True, False):
            arguments = (x, scale, offset, mean, variance, residual)
            want = call(*arguments, training)
            for got, each in zip(function(*arguments, training), want, strict=True):
                np.testing.assert_allclose(got, each, rtol=0, atol=1e-5)
        with pytest.raises(tf.errors.InvalidArgumentError):
            function(x, scale, offset, mean, variance, residual[:, :, :1], True)
        with pytest.raises(tf.errors.InvalidArgumentError):
            function(x, scale, offset[:1], mean, variance, residual, True)


@pytest.mark.usefixtures("gpus_cannot_be_served")
def test_wrong_arguments_raise_what_the_op_raises():
    with pytest.raises(tf.errors.InvalidArgumentError, match="scale must have shape"):
        tfops.fused_batch_norm(tf.ones([2, 3]), tf.ones(4), tf.ones(3))
    with pytest.raises(tf.errors.InvalidArgumentError, match="epsilon must be"):
        tfops.fused_batch_norm(tf.ones([2, 3]), tf.ones(3), tf.ones(3), epsilon=-1.0)


@pytest.mark.parametrize("keep", [None, "half", "none"])
@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 3), -1), ((3, 4, 5, 6), 1)], ids=str)
def test_phases_agree_with_the_kernels(gpus_cannot_be_served, monkeypatch, shape, axis, keep):
    x, scale, offset, _, _, residual = make_problem(shape, axis, tf.float32)
    rng = np.random.default_rng(3)
    flags = None if keep is None else tf.constant(rng.random(shape[:-1]) < (0.5 if keep == "half" else 0))

    def step():
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch([x, scale, offset, residual])
                statistics = _phases.batch_statistics(x, axis, keep=flags, ballast=1e-3)
                y = _phases.normalize(
                    x, scale, offset, statistics, axis=axis, epsilon=1e-3, activation="silu", residual=residual
                )
            gradients = tape.gradient(y, [x, scale, offset, residual], tf.cos(y))
        return [*statistics[:3], y, *gradients, outer.gradient(gradients[0], x, tf.sin(x))]

    got = step()
    monkeypatch.setattr(_gpus, "problem", lambda: "")
    for plain, fused in zip(got, step(), strict=True):
        np.testing.assert_allclose(plain, fused, rtol=0, atol=1e-4 * (1 + np.abs(fused).max()))


def _model():
    keras.utils.set_random_seed(1)
    inputs = keras.Input([8, 8, 3])
    shortcut = y = keras.layers.Conv2D(4, 3, padding="same")(inputs)
    for activation in ("relu", None):
        y = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, padding="same")(y))
        y = keras.layers.ReLU()(y) if activation else y
    y = keras.layers.ReLU()(keras.layers.Add()([y, shortcut]))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(y)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.usefixtures("gpus_cannot_be_served")
def test_converted_model_trains_as_before(tmp_path):
    stock = _model()
    fused = tfops.keras.convert(stock)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 8, 8, 3)).astype("float32"), rng.standard_normal((64, 2)).astype("float32")
    losses = [m.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0).history["loss"] for m in (stock, fused)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    fused.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), fused.predict(x, verbose=0))
    ops = _ops_of(lambda x: fused(x, training=True), tf.TensorSpec([4, 8, 8, 3]))
    assert "FusedBatchNormV3" in ops
    assert not [op for op in ops if op.startswith("Tfops>")]


@pytest.mark.usefixtures("gpus_cannot_be_served")
def test_layer_with_a_mask_and_renorm():
    layer = tfops.keras.BatchNormalization()
    stock = keras.layers.BatchNormalization()
    x, mask = tf.random.stateless_normal([4, 6, 3], [0, 0]), tf.sequence_mask([6, 2, 3, 1], 6)
    np.testing.assert_allclose(
        layer(x, training=True, mask=mask), stock(x, training=True, mask=mask), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(layer.moving_variance, stock.moving_variance, rtol=1e-5)


def test_scope_of_a_cpu_has_the_ops(gpus_cannot_be_served, monkeypatch):
    def step(x):
        with tf.device("/CPU:0"), tf.GradientTape() as tape:
            tape.watch(x)
            y = tfops.fused_batch_norm(x, tf.ones(3), tf.zeros(3))[0]
        return tape.gradient(y, x)

    def unpinned(x):
        return tfops.fused_batch_norm(x, tf.ones(3), tf.zeros(3))[0]

    spec = tf.TensorSpec([4, 2, 2, 3])
    assert {"Tfops>BatchNormTraining", "Tfops>BatchNormTrainingGrad"} <= _ops_of(step, spec)
    graph = tf.function(step).get_concrete_function(spec).graph
    devices = [tf.DeviceSpec.from_string(op.device) for op in graph.get_operations() if op.type.startswith("Tfops>")]
    assert {device.device_type for device in devices} == {"CPU"}
    assert not [op for op in _ops_of(unpinned, spec) if op.startswith("Tfops>")]
    monkeypatch.setattr(_fallback, "fused_batch_norm", None)
    step(tf.ones([4, 2, 2, 3]))
    with pytest.raises(TypeError, match="NoneType"):
        unpinned(tf.ones([4, 2, 2, 3]))


def test_one_warning_says_why_and_points_here(gpus_cannot_be_served, monkeypatch):
    monkeypatch.setattr(_gpus, "_warned", False)
    x = tf.ones([4, 3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            tfops.keras.BatchNormalization()(x)
            tfops.fused_batch_norm(x, tf.ones(3), tf.zeros(3))
    (warning,) = [each for each in caught if "TensorFlow's own operations" in str(each.message)]
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    assert str(warning.message).startswith(WHY)


def test_strict_mode_raises(gpus_cannot_be_served, monkeypatch):
    arguments = tf.ones([4, 3]), tf.ones(3), tf.zeros(3)
    monkeypatch.setenv("TFOPS_STRICT", "1")
    with pytest.raises(tf.errors.UnavailableError, match=WHY):
        tfops.fused_batch_norm(*arguments)
    with pytest.raises(tf.errors.UnavailableError, match=WHY):
        tfops.keras.BatchNormalization()(arguments[0])
    monkeypatch.setenv("TFOPS_STRICT", "yes")
    with pytest.raises(ValueError, match="TFOPS_STRICT must be 0 or 1, but it is 'yes'"):
        tfops.fused_batch_norm(*arguments)


def test_info_tells(gpus_cannot_be_served, capsys):
    assert tfops.build_info()["fallback"] == WHY
    info.main()
    assert f"Fallback      TensorFlow's own operations in place of the kernels: {WHY}" in capsys.readouterr().out


def test_gpus_are_asked_for_by_number(monkeypatch):
    """A GPU that TensorFlow does not use is none of its problems."""
    visible = []
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [SimpleNamespace(name=name) for name in visible])
    monkeypatch.setattr(_gpus, "_problem_of", lambda index: {0: "", 1: "GPU 1 cannot"}[index])
    assert _gpus.problem() == ""
    visible.append("/physical_device:GPU:0")
    assert _gpus.problem() == ""
    visible.append("/physical_device:GPU:1")
    assert _gpus.problem() == "GPU 1 cannot"
