"""Compiled by XLA, the ops are custom calls on the same kernels: the same bits as without, and the same errors."""

from __future__ import annotations

import re
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

import tfops
from tfops import _gpus, _xla
from tfops_testing.fresh_process import run_python

pytestmark = pytest.mark.xla
DTYPES = ("float16", "bfloat16", "float32", "float64")
OPS = [f"Tfops>BatchNorm{mode}{grad}" for mode in ("Training", "Inference") for grad in ("", "Grad")]


def _inputs(shape, axis, dtype, seed=0):
    """x, scale, offset, mean, variance, residual, and gradients of the three outputs."""
    rng = np.random.default_rng(seed)
    param = tf.float64 if dtype == "float64" else tf.float32
    data = [tf.constant(rng.standard_normal(shape) * 2 + 1, dtype) for _ in range(3)]
    vectors = [tf.constant(rng.uniform(0.5, 2, shape[axis]), param) for _ in range(6)]
    return [data[0], *vectors[:4], data[1]], [data[2], *vectors[4:]]


def _results(inputs, upstream, residual, **kwargs):
    """Outputs, and gradients with respect to all inputs."""
    inputs = inputs if residual else inputs[:-1]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = tfops.fused_batch_norm(*inputs[:5], residual=inputs[5] if residual else None, **kwargs)
    gradients = tape.gradient(outputs, inputs, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [*outputs, *gradients]


def _assert_same_bits(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours.numpy().view(np.uint8), theirs.numpy().view(np.uint8))


def _compiled(**kwargs):
    return tf.function(lambda *arguments: _results(*arguments, **kwargs), jit_compile=True, reduce_retracing=True)


CASES = [
    # shape, axis, activation, residual: channels first and last, with and without a mask, ragged
    ((4, 5, 6, 24), -1, "relu", True),
    ((3, 7, 5, 9), 1, None, True),
    ((33, 131), 1, "silu", True),
    ((2, 3, 4, 5, 17), -1, "leaky_relu", False),
    ((4, 65, 7), 1, "relu6", True),
]


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "activation", "residual"), CASES, ids=str)
def test_same_bits_as_without_xla(shape, axis, activation, residual, dtype, is_training):
    kwargs = {"residual": residual, "axis": axis, "activation": activation, "is_training": is_training}
    kwargs |= {"exponential_avg_factor": 0.1, "epsilon": 0.003}
    arguments = _inputs(shape, axis, dtype)
    want = _results(*arguments, **kwargs)
    assert any(np.any(tf.cast(tensor, tf.float64) != 0) for tensor in want[3:])
    _assert_same_bits(_compiled(**kwargs)(*arguments), want)


def test_work_shared_among_threads_has_the_same_bits():
    arguments = _inputs((64, 56, 56, 24), -1, "float32")
    kwargs = {"residual": True, "activation": "relu"}
    _assert_same_bits(_compiled(**kwargs)(*arguments), _results(*arguments, **kwargs))


@pytest.mark.parametrize("unbiased", [True, False])
def test_same_bits_without_running_statistics(unbiased):
    x, scale, offset = _inputs((6, 5), -1, "float32")[0][:3]
    compiled = tf.function(lambda *a: tfops.fused_batch_norm(*a, unbiased=unbiased), jit_compile=True)
    _assert_same_bits(compiled(x, scale, offset), tfops.fused_batch_norm(x, scale, offset, unbiased=unbiased))


@pytest.mark.parametrize(("mode", "is_training"), [("Training", True), ("Inference", False)])
def test_the_compiled_program_holds_the_custom_calls(mode, is_training):
    arguments = _inputs((4, 3, 3, 5), -1, "float32")
    program = _compiled(residual=True, activation="relu", is_training=is_training)
    for stage in ("hlo", "optimized_hlo"):
        text = program.experimental_get_compiler_ir(*arguments)(stage=stage)
        for op in (f"Tfops>BatchNorm{mode}", f"Tfops>BatchNorm{mode}Grad"):
            assert text.count(f'custom_call_target="{op}"') == 1
    # The gradient of relu alone, and nothing that would normalize outside of the kernels.
    assert "rsqrt" not in text
    assert "reduce(" not in text


def _block(training, fused=True):
    """What a ResNet has: convolutions, each with its batch norm, and a shortcut."""

    def normalize(x, vectors, **kwargs):
        return tfops.fused_batch_norm(x, *vectors, is_training=training, activation="relu", **kwargs)[0]

    def block(x, kernels, vectors):
        y = normalize(tf.nn.conv2d(x, kernels[0], 1, "SAME"), vectors)
        y = tf.nn.conv2d(y, kernels[1], 1, "SAME")
        return normalize(y, vectors, residual=x) if fused else normalize(y, vectors) + x

    def network(x, kernels, vectors):
        for _ in range(3):
            x = block(x, kernels, vectors)
        return x

    def gradient(x, kernels, vectors):
        with tf.GradientTape() as tape:
            tape.watch(kernels)
            loss = tf.reduce_sum(network(x, kernels, vectors) ** 2)
        return tape.gradient(loss, kernels)

    rng = np.random.default_rng(0)
    kernels = [tf.constant(rng.standard_normal((3, 3, 16, 16)) / 12, tf.float32) for _ in range(2)]
    vectors = [tf.constant(rng.uniform(0.5, 2, 16), tf.float32) for _ in range(4)]
    return network, gradient, (tf.constant(rng.standard_normal((2, 12, 12, 16)), tf.float32), kernels, vectors)


def _custom_calls(function, arguments):
    """The calls in a compiled program, and the number of copies of whole tensors in it."""
    program = tf.function(function, jit_compile=True)
    text = program.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    calls = [line for line in text.splitlines() if 'custom_call_target="Tfops>' in line]
    return calls, len(re.findall(r"= f32\[2,12,12,16\]\S* copy\(", text))


_IN_PLACE = "output_to_operand_aliasing={{0}: (0, {})}"


def test_workspaces_are_results_of_the_calls():
    _, gradient, arguments = _block(training=True)
    calls, _ = _custom_calls(gradient, arguments)
    assert len(calls) == 12
    for call in calls:
        results = call.split(" = ")[1].split(" custom-call(")[0]
        assert int(re.search(r", u8\[(\d+)\]\{0\}\)$", results)[1]) > 0


def test_inference_is_done_in_place():
    network, _, arguments = _block(training=False)
    calls, copies = _custom_calls(network, arguments)
    assert len(calls) == 6
    assert all(_IN_PLACE in call for call in calls)
    assert copies == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("nested", [True, False])
def test_nothing_is_copied_where_there_is_a_gradient(training, fused, nested):
    """x is needed for the gradient, and the program's inputs are not its own to write to."""
    _, gradient, arguments = _block(training, fused)
    calls, copies = _custom_calls(tf.function(gradient) if nested else gradient, arguments)
    assert len(calls) == 12
    assert not any(_IN_PLACE in call for call in calls)
    assert copies == 0


def test_input_of_the_program_is_not_overwritten():
    (x, scale, offset, mean, variance, _), _ = _inputs((64, 8), -1, "float32")
    before = x.numpy().copy()

    @tf.function(jit_compile=True)
    def compiled(x):
        return tfops.fused_batch_norm(x, scale, offset, mean, variance, is_training=False)[0]

    assert "output_to_operand_aliasing" not in compiled.experimental_get_compiler_ir(x)(stage="hlo")
    want = tfops.fused_batch_norm(x, scale, offset, mean, variance, is_training=False)[0]
    _assert_same_bits([compiled(x)], [want])
    np.testing.assert_array_equal(x, before)


def test_gradient_may_be_added_to_a_graph_that_has_run():
    """TensorFlow 1 allows no change to what has run."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.constant(np.eye(4, 3), tf.float32)
        vectors = [tf.ones(3)] * 4
        y = tfops.fused_batch_norm(x, *vectors, is_training=False)[0]
        session.run(y)
        gradient = tf.gradients(y, x)[0]
        assert session.run(gradient).shape == (4, 3)
        assert session.run(y).shape == (4, 3)


def test_same_bits_for_a_batch_unknown_when_traced():
    """Compiled anew for each size, zero and one element among them."""

    @tf.function(
        jit_compile=True,
        input_signature=[tf.TensorSpec([None, None, 5]), *[tf.TensorSpec([None])] * 4, tf.TensorSpec(None)],
    )
    def compiled(x, scale, offset, mean, variance, residual):
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            outputs = tfops.fused_batch_norm(
                x, scale, offset, mean, variance, exponential_avg_factor=0.5, activation="relu", residual=residual
            )
        return [*outputs, *tape.gradient(outputs[0], [x, residual])]

    for batch in (7, 1, 0, 12):
        inputs, _ = _inputs((batch, 1, 5), -1, "float32", seed=batch)
        _assert_same_bits(compiled(*inputs), compiled.python_function(*inputs))


@pytest.mark.parametrize("shape", [(0, 4), (5, 0, 4), (3, 2, 0)], ids=str)
@pytest.mark.parametrize("is_training", [True, False])
def test_same_bits_without_elements(shape, is_training):
    arguments = _inputs(shape, -1, "float32")
    kwargs = {"residual": True, "activation": "relu", "is_training": is_training}
    _assert_same_bits(_compiled(**kwargs)(*arguments), _results(*arguments, **kwargs))


def test_same_bits_with_is_training_as_a_tensor():
    arguments = _inputs((6, 4, 5), -1, "float32")

    @tf.function(jit_compile=True)
    def compiled(is_training):
        return _results(*arguments, residual=True, activation="relu", is_training=is_training)

    for is_training in (True, False):
        want = _results(*arguments, residual=True, activation="relu", is_training=is_training)
        _assert_same_bits(compiled(tf.constant(is_training)), want)


def test_function_may_be_traced_before_it_is_compiled(tmp_path):
    """Nothing tells, when the op is added to the graph, that XLA will compile it: nor in a saved model."""
    inputs, _ = _inputs((6, 5), -1, "float32")

    @tf.function
    def plain(x, scale, offset):
        return tfops.fused_batch_norm(x, scale, offset)[0]

    module = tf.Module()
    module.call = tf.function(lambda *a: plain(*a), jit_compile=True)
    want = plain(*inputs[:3])
    _assert_same_bits([module.call(*inputs[:3])], [want])
    tf.saved_model.save(module, str(tmp_path))
    _assert_same_bits([tf.saved_model.load(str(tmp_path)).call(*inputs[:3])], [want])


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("activation", "residual"), [("silu", False), ("leaky_relu", True)])
def test_second_derivatives_agree_with_those_without_xla(activation, residual, is_training, axis):
    inputs, upstream = _inputs((4, 3, 2, 5), axis, "float64")

    def second(*inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            first = _results(inputs, upstream, residual, axis=axis, activation=activation, is_training=is_training)
            loss = tf.add_n([tf.reduce_sum(g * g) for g in first[3:]])
        return outer.gradient(loss, inputs[:3])

    for got, want in zip(tf.function(second, jit_compile=True)(*inputs), second(*inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10 * np.abs(want).max())


# ----------------------------------------------------------------------------------------------------------------------
# Errors


_ANY = tf.TensorSpec(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (4,)}, r"scale must have shape \[3\], but it has \[4\]"),
        ({"offset": (3, 1)}, r"offset must have shape \[3\], but it has \[3,1\]"),
        ({"mean": (2,)}, r"mean must have shape \[3\], but it has \[2\]"),
        ({"residual": (4, 1)}, r"residual must have shape \[4,3\], but it has \[4,1\]"),
        ({"x": (3,)}, "rank"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_training", [True, False])
def test_shapes_are_checked_when_xla_knows_them(changes, message, is_training):
    shapes = {"x": (4, 3), "scale": (3,), "offset": (3,), "mean": (3,), "variance": (3,), "residual": (4, 3)}
    names = list(shapes)

    @tf.function(jit_compile=True, input_signature=[_ANY] * len(names))
    def compiled(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        return tfops.fused_batch_norm(**arguments, is_training=is_training)

    assert compiled(*map(tf.ones, shapes.values()))[0].shape == (4, 3)
    if is_training:  # and need not be there
        y, mean, _ = compiled(*map(tf.ones, (shapes | {"mean": (0,), "variance": (0,)}).values()))
        np.testing.assert_array_equal(y, np.full((4, 3), 2))
        np.testing.assert_array_equal(mean, np.ones(3))
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        compiled(*map(tf.ones, (shapes | changes).values()))


def test_size_that_only_the_running_program_knows_is_refused():
    vectors = [tf.ones(3)] * 2

    @tf.function(jit_compile=True)
    def compiled(x, keep):
        return tfops.fused_batch_norm(tf.boolean_mask(x, keep), *vectors)[0]

    with pytest.raises(tf.errors.UnimplementedError, match=r"x has shape .*<=4.*known when the program is compiled"):
        compiled(tf.ones([4, 3]), tf.constant([True, False, True, True]))


# ----------------------------------------------------------------------------------------------------------------------
# Keras


def _model(jit_compile, policy="float32"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    shortcut = tfops.keras.BatchNormalization(activation="relu", dtype=policy)(x)
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(shortcut)
    x = tfops.keras.BatchNormalization(activation="relu", dtype=policy)(x, residual=shortcut)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(4, dtype="float32")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=jit_compile)
    return model


@pytest.mark.parametrize(
    ("policy", "epochs", "tolerance"),
    # In float16 every step makes more of a difference in the last digits, so there are few.
    [("float32", 5, 1e-5), ("mixed_float16", 1, 5e-3)],
)
def test_keras_model_trains_compiled(policy, epochs, tolerance):
    rng = np.random.default_rng(0)
    y = rng.integers(4, size=40)
    x = (rng.standard_normal((40, 6, 6, 3)) + y[:, None, None, None]).astype(np.float32)
    runs = []
    for jit_compile in (False, True):
        model = _model(jit_compile, policy)
        assert model.jit_compile == jit_compile
        history = model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)  # a last batch of 8
        runs.append([history.history["loss"], model.predict(x, batch_size=16, verbose=0), *model.get_weights()])
    assert epochs == 1 or runs[1][0][-1] < 0.7 * runs[1][0][0]
    # Convolutions are XLA's here and oneDNN's there; they differ in the last digits.
    for compiled, plain in zip(runs[1], runs[0], strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=0, atol=tolerance * (1 + np.abs(plain).max()))


@pytest.mark.parametrize("policy", ["float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("training", [True, False])
def test_layer_has_the_same_bits(policy, training):
    x = tf.constant(np.random.default_rng(0).standard_normal((6, 5, 5, 3)), "float32")
    layers = [tfops.keras.BatchNormalization(axis=1, activation="silu", dtype=policy) for _ in range(2)]
    for layer in layers:
        layer.build(x.shape)
    results = [
        [run(x, training=training), *layer.weights]
        for layer, run in ((layers[0], layers[0]), (layers[1], tf.function(layers[1], jit_compile=True)))
    ]
    _assert_same_bits([tf.convert_to_tensor(r) for r in results[1]], [tf.convert_to_tensor(r) for r in results[0]])


# ----------------------------------------------------------------------------------------------------------------------
# The library


def test_kernels_are_registered():
    for op in OPS:
        devices = {kernel.device_type for kernel in kernels.get_registered_kernels_for_op(op).kernel}
        cuda = {"GPU", "XLA_GPU_JIT"} if tfops.build_info()["cuda"] else set()
        assert devices == {"CPU", "XLA_CPU_JIT"} | cuda


def test_missing_kernels_say_why(tmp_path):
    assert "TFOPS_XLA=OFF" in _xla.load(tmp_path / "nowhere.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert str(broken) in _xla.load(broken)
    info = tfops.build_info()
    assert (info["xla"], info["xla_problem"]) == (True, "")


@pytest.mark.parametrize(
    ("problem", "cuda", "gpus", "supported"),
    [
        ("", "", [], True),
        ("", "", ["GPU:0"], True),
        ("", "this build of tfops has no CUDA kernels", ["GPU:0"], True),
        ("libtensorflow_cc.so.2: cannot open shared object file", "", [], False),
        ("libtensorflow_cc.so.2: cannot open shared object file", "no CUDA kernels", ["GPU:0"], True),
    ],
    ids=["cpu", "gpu", "gpu without CUDA kernels", "no library", "no library, gpu without CUDA kernels"],
)
def test_keras_compiles_only_where_there_are_kernels(monkeypatch, problem, cuda, gpus, supported):
    """Where no CUDA kernels can serve the GPU, TensorFlow's own operations take their place: these have XLA kernels."""
    devices = [SimpleNamespace(device_type="CPU"), *(SimpleNamespace(device_type="GPU") for _ in gpus)]
    monkeypatch.setattr(_xla, "PROBLEM", problem)
    monkeypatch.setattr(_gpus, "problem", lambda: cuda)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda: devices)
    layer = tfops.keras.BatchNormalization()
    assert layer.supports_jit is supported
    model = keras.Sequential([layer])
    model.compile("sgd", "mse")  # jit_compile="auto": where there is a GPU
    assert model.jit_compile is (supported and bool(gpus))


def test_kernels_are_found_by_a_process_that_has_compiled_before():
    """REGISTER_XLA_OP's would not be."""
    run = run_python(
        "-c",
        "import tensorflow as tf\n"
        "tf.function(tf.nn.relu, jit_compile=True)(tf.ones([2]))\n"
        "import tfops\n"
        "f = tf.function(lambda x: tfops.fused_batch_norm(x, tf.ones(3), tf.zeros(3))[0], jit_compile=True)\n"
        "print(f(tf.ones([2, 3])).shape)",
    )
    assert run.stdout.strip() == "(2, 3)", run.stderr


def test_without_the_library_keras_does_not_compile():
    run = run_python(
        "-c",
        "import tensorflow as tf\n"
        "def fails(path):\n"
        "    raise tf.errors.NotFoundError(None, None, 'libtensorflow_cc.so.2: cannot open shared object file')\n"
        "tf.load_library = fails\n"
        "import keras, numpy as np, tfops\n"
        "info = tfops.build_info()\n"
        "model = keras.Sequential([tfops.keras.BatchNormalization()])\n"
        "model.compile('sgd', 'mse', jit_compile=True)\n"
        "x = np.eye(8, 3)\n"
        "model.fit(x, x, verbose=0)\n"
        "print(info['xla'], model.jit_compile)\n"
        "from tfops.info import main\n"
        "main()",
    )
    assert run.stdout.startswith("False False\n"), run.stderr
    assert "\nXLA kernels   none: libtensorflow_cc.so.2: cannot open shared object file\n" in run.stdout
