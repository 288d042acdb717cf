"""`tfops.gradcheck.check`: right derivatives of functions of all kinds pass, and each wrong one is named."""

from __future__ import annotations

import collections
import json
import math

import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import gradcheck

RNG = np.random.default_rng(0)
Pair = collections.namedtuple("Pair", ["left", "right"])


def numbers(*shape, dtype="float64"):
    """Not near 0, where some functions have a kink."""
    return tf.constant(RNG.uniform(0.25, 1, shape) * RNG.choice([-1, 1], shape), dtype)


@tf.function
def power_by_loop(x, count):
    return tf.while_loop(lambda i, _: i < count, lambda i, y: (i + 1, y * x), (0, tf.ones_like(x)))[1]


@tf.function(jit_compile=True)
def compiled(x):
    return tf.reduce_sum(tf.sin(x) * x, axis=-1)


@tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
def only_float32(x):
    return tf.exp(x)


def of_structure(inputs):
    a, (b, c), d = inputs["z"], inputs["pair"], inputs["a"][0]
    return {"sum": [a @ tf.cast(d, a.dtype), Pair(b, tf.stack([b, c]))], "count": tf.size(a), "none": None}


STRUCTURE = {
    "z": numbers(2, 3, dtype="float32"),
    "pair": Pair(numbers(), RNG.normal()),
    "a": [np.float32(RNG.normal(size=[3, 1])), 7],
}


RIGHT = {
    "matmul": (tf.matmul, (numbers(2, 3), numbers(3, 4))),
    "convolution": (
        lambda x, k: tf.nn.conv2d(x, k, 1, "SAME"),
        (numbers(2, 5, 4, 3, dtype="float32"), numbers(3, 3, 3, 2, dtype="float32")),
    ),
    "softmax": (tf.nn.softmax, numbers(3, 4, dtype="float32")),
    "loop": (power_by_loop, (numbers(3), tf.constant(4))),
    "gather": (tf.gather, (numbers(4, 2), tf.constant([3, 0, 3]))),
    "structure": (of_structure, STRUCTURE),
    "scalar": (lambda x: x**3, numbers()),
    "complex": (lambda z: tf.signal.fft(z) * z, tf.complex(numbers(4), numbers(4))),
    "complex64": (lambda z: tf.abs(z) ** 2, tf.complex(numbers(3, dtype="float32"), numbers(3, dtype="float32"))),
    "ragged": (
        lambda x: tf.reduce_sum(x**2, axis=1),
        tf.RaggedTensor.from_row_lengths(numbers(5), tf.constant([2, 3])),
    ),
    "compiled": (compiled, numbers(3, 4, dtype="float32")),
    "only float32": (only_float32, numbers(5, dtype="float32")),
    "pooling": (lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"), numbers(2, 4, 6, 3, dtype="float32")),
    "statistics": (lambda x: (tf.reduce_mean(x, 0), tf.math.reduce_std(x, 0)), numbers(9, 4, dtype="float32")),
    "large numbers": (lambda x: tf.math.log(x), tf.constant([1e8, 1e-2, 3e5], tf.float64)),
    "small numbers": (lambda x: 1e-12 * tf.sin(x), numbers(4)),
    "empty beside": (lambda x, y: tf.concat([x, y], 0), (numbers(3), tf.zeros([0], tf.float64))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_derivatives_pass(name):
    function, inputs = RIGHT[name]
    report = gradcheck.check(function, inputs)
    assert report, report
    assert {"gradient", "gradient of gradient", "forward mode"} == {row.kind for row in report.rows}
    if name != "loop":  # TensorFlow has no forward mode of loops in functions
        assert not any(row.note.startswith("not supported") for row in report.rows)
    gradients = [row for row in report.rows if row.kind == "gradient"]
    assert all(row.error <= row.tolerance and row.compared > 0 for row in gradients)
    assert any(row.largest > 0 for row in gradients)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_op_of_tfops_passes(dtype, data_format):
    def function(x, scale, offset, residual):
        param = tf.float64 if x.dtype == tf.float64 else tf.float32
        scale, offset = tf.cast(scale, param), tf.cast(offset, param)
        options = {"data_format": data_format, "activation": "silu", "residual": residual, "is_training": True}
        return tfops.fused_batch_norm(x, scale, offset, **options)

    channels = 3 if data_format == "NHWC" else 5
    inputs = numbers(4, 5, 2, 3), numbers(channels), numbers(channels), numbers(4, 5, 2, 3)
    report = gradcheck.check(function, tuple(tf.cast(each, dtype) for each in inputs), forward=True)
    assert report, report
    assert {row.dtype for row in report.rows} >= {"float64", dtype}


def test_paths_name_elements_of_structures():
    names = [row.input for row in gradcheck.check(of_structure, STRUCTURE, order=1, float64=False).rows]
    assert names[:3] == ["inputs['a'][0]", "inputs['pair'].left", "inputs['z']"]
    ragged = gradcheck.check(*RIGHT["ragged"], order=1, forward=False).rows
    assert [row.input for row in ragged] == ["inputs.parts[0]"]
    parts = gradcheck.check(*RIGHT["complex"], order=1, forward=False).rows
    assert [row.input for row in parts] == ["inputs.real", "inputs.imag"]


def scaled(factor):
    """The identity, with derivatives that are multiplied with `factor`."""

    @tf.function  # where forward mode follows the gradient
    @tf.custom_gradient
    def function(x):
        return tf.identity(x), lambda dy: dy * tf.cast(factor, dy.dtype)

    return function


def failed(report):
    assert not report.ok
    assert not report
    with pytest.raises(AssertionError, match="FAILED"):
        report.raise_if_failed()
    return [row for row in report.rows if not row.ok]


@pytest.mark.parametrize(("dtype", "factor"), [("float64", 1 + 1e-5), ("float32", 1 + 1e-5), ("bfloat16", 2)])
@pytest.mark.parametrize("size", [5, 1000])
def test_wrong_factor_is_caught(dtype, factor, size):
    report = gradcheck.check(scaled(factor), numbers(size, dtype=dtype))
    wrong = failed(report)
    assert {"gradient", "forward mode"} <= {row.kind for row in wrong}
    assert wrong[0].dtype in (dtype, "float64")
    assert wrong[0].analytic == pytest.approx(factor * wrong[0].numerical, rel=1e-7)


@pytest.mark.parametrize("shape", [(2, 3), (40, 50)])
def test_a_single_wrong_element_is_named(shape):
    index = tuple(size - 2 for size in shape)
    factor = np.ones(shape)
    factor[index] = 1.001
    x = numbers(*shape)
    function = scaled(factor)
    for seed in range(5):
        report = gradcheck.check(lambda x: function(x) ** 2, x, order=1, forward=False, seed=seed)
        (row,) = failed(report)
        assert row.place == f"inputs[{index[0]}, {index[1]}]"
        assert row.analytic == pytest.approx(1.001 * row.numerical)
        assert row.place in str(report)


def test_a_single_wrong_output_is_named_by_forward_mode():
    def function(x):
        return {"y": tf.exp(x), "z": [x, tf.tensor_scatter_nd_update(x, [[1, 2]], [scaled(1.1)(x)[1, 2]])]}

    wrong = failed(gradcheck.check(function, numbers(3, 4), order=1))
    (row,) = [row for row in wrong if row.kind == "forward mode"]
    assert row.place == "outputs['z'][1][1, 2]"


def test_missing_gradient_is_named():
    def function(x, y):
        return tf.stop_gradient(x) * y

    wrong = failed(gradcheck.check(function, (numbers(3), numbers(3)), order=1))
    assert {row.input for row in wrong} == {"inputs[0]"}
    assert "is it cut off, as by tf.stop_gradient?" in wrong[0].note
    report = gradcheck.check(lambda x, y: tf.sin(x), (numbers(3), numbers(3)), order=1, forward=False)
    assert [row.note for row in report.rows] == ["", "None, which means 0"]
    assert report.ok


def square_with_second_derivative(change):
    """x^2, whose gradient's own derivative by x is changed."""

    @tf.custom_gradient
    def gradient(dy, x):
        return 2 * dy * x, lambda ddx: (2 * x * ddx, change(2 * dy * ddx))

    @tf.custom_gradient
    def function(x):
        return x**2, lambda dy: gradient(dy, x)

    return function


def test_wrong_second_derivative_alone_is_caught():
    assert gradcheck.check(square_with_second_derivative(lambda d: d), numbers(3))
    for change in (lambda d: 1.001 * d, tf.zeros_like, lambda d: d * float("nan")):
        wrong = failed(gradcheck.check(square_with_second_derivative(change), numbers(3)))
        assert {(row.kind, row.input) for row in wrong} == {("gradient of gradient", "inputs")}
    assert gradcheck.check(square_with_second_derivative(lambda d: 2 * d), numbers(3), order=1)


def test_wrong_third_derivative_is_caught_by_order_3():
    @tf.custom_gradient
    def second(x):
        return 6 * x, lambda d: 7 * d

    @tf.custom_gradient
    def first(x):
        return 3 * x**2, lambda d: d * second(x)

    @tf.custom_gradient
    def cube(x):
        return x**3, lambda dy: dy * first(x)

    assert gradcheck.check(cube, numbers(3), order=2)
    wrong = failed(gradcheck.check(cube, numbers(3), order=3))
    assert {row.kind for row in wrong} == {"gradient of gradient of gradient"}


def test_wrong_second_derivative_of_tensorflow_is_caught():
    """`tf.nn.moments` has a tf.stop_gradient in the variance, which is right for the first derivative alone."""

    def variance(x):
        return tf.nn.moments(x, [0])[1]

    assert gradcheck.check(variance, numbers(9, 2), order=1)
    wrong = failed(gradcheck.check(variance, numbers(9, 2)))
    assert {(row.kind, row.input) for row in wrong} == {("gradient of gradient", "inputs")}


def test_wrong_forward_mode_alone_is_caught():
    """In a `tf.function`, forward mode is the gradient's derivative by dy: one that is not differentiable has none."""

    @tf.function
    @tf.custom_gradient
    def function(x):
        return x**2, lambda dy: tf.stop_gradient(dy) * 2 * x

    wrong = failed(gradcheck.check(function, numbers(3), order=1))
    assert {row.kind for row in wrong} == {"forward mode"}
    assert gradcheck.check(function, numbers(3), order=1, forward=False)
    wrong = failed(gradcheck.check(function, numbers(3), forward=False))
    assert {row.input for row in wrong} == {"output gradient of outputs"}


def test_missing_second_derivative_is_a_row():
    def function(x):
        return tf.raw_ops.ResizeBicubic(images=x, size=[3, 3])

    x = numbers(1, 2, 2, 1, dtype="float32")
    wrong = failed(gradcheck.check(function, x, rtol=1e-2))
    assert {row.kind for row in wrong} == {"gradient of gradient"}
    assert wrong[0].note.startswith("not supported: LookupError: ")
    report = gradcheck.check(function, x, order=1)
    assert report, report
    (row,) = [row for row in report.rows if row.kind == "forward mode"]
    assert row.note.startswith("not supported: LookupError: ")
    assert {row.kind for row in failed(gradcheck.check(function, x, order=1, forward=True))} == {"forward mode"}


def test_functions_that_are_not_deterministic_are_told():
    (row,) = failed(gradcheck.check(lambda x: x + tf.random.normal([3], dtype=x.dtype), numbers(3)))
    assert (row.kind, row.input) == ("output", "outputs")
    assert "the function is not deterministic" in row.note


def test_what_is_not_finite_is_named():
    (row,) = failed(gradcheck.check(lambda x: {"y": tf.sqrt(x), "z": x}, tf.constant([1.0, -1.0, 4.0], tf.float64)))
    assert row.note == "not finite in 1 of 3 elements, the first is outputs['y'][1]: nan"

    def function(x):
        return tf.where(x > 0, tf.sqrt(x), 0.0)  # whose gradient is 0 * NaN

    wrong = failed(gradcheck.check(function, tf.constant([1.0, -1.0, 4.0], tf.float64), forward=False))
    assert [row.note for row in wrong] == ["not finite in 1 of 3 elements"]
    assert wrong[0].place == "inputs[1]"
    (row,) = failed(gradcheck.check(tf.math.sqrt, tf.constant([0.0, 1.0, 2.0, 3.0]), forward=False, float64=False))
    assert row.place == "inputs[0]"


def test_elements_at_kinks_are_left_out_and_named():
    x = tf.constant([0.0, 1.0, -1.0, 2.0, 1e-6, -1e-6], tf.float64)  # the last two are within the first step alone
    for function in (tf.nn.relu, tf.nn.leaky_relu, lambda x: tf.maximum(x, 0.0) * 3 + x):
        report = gradcheck.check(function, x, order=1, forward=True)
        assert report, report
        assert [row.left_out for row in report.rows] == [1, 1]
        assert report.rows[0].note == "1 of 6 within eps of a kink, left out"
    wrong = failed(gradcheck.check(tf.nn.relu, x, order=1, kinks=0.1))
    assert wrong[0].note.endswith("left out, more than 10%")
    assert failed(gradcheck.check(tf.nn.relu, tf.zeros([4]), order=1))


def test_kinks_do_not_excuse_wrong_gradients():
    for function in (lambda x: scaled(1.001)(tf.sin(50 * x)), lambda x: scaled(1.001)(tf.nn.relu(x))):
        (row,) = failed(gradcheck.check(function, numbers(8), order=1, forward=False))
        assert row.left_out == 0


def test_jumps_are_left_out():
    report = gradcheck.check(lambda x: tf.floor(x) + x, tf.constant([1.0, 0.5, 0.25, 1.5]), order=1, forward=False)
    assert report, report
    assert report.rows[0].left_out == 1


def test_narrow_types_are_checked_by_themselves():
    def function(x):
        return scaled(1.01 if x.dtype == tf.float32 else 1.0)(x)

    report = gradcheck.check(function, numbers(100, dtype="float32"), order=1, forward=False)
    assert [(row.dtype, row.ok, row.compared) for row in report.rows] == [
        ("float64", True, 18),
        ("float32", False, 100),
    ]


def test_functions_with_other_values_in_float64_are_checked_apart():
    def function(x):
        return scaled(1.1 if x.dtype == tf.float32 else 1.0)(x) * (2 if x.dtype == tf.float32 else 3)

    wrong = failed(gradcheck.check(function, numbers(3, dtype="float32"), order=1, forward=False))
    assert [(row.dtype, round(row.numerical / row.analytic, 3)) for row in wrong] == [("float32", round(1 / 1.1, 3))]


@pytest.mark.parametrize(("dtype", "excess"), [("float32", 0.01), ("float16", 0.2), ("bfloat16", 0.5)])
def test_wrong_gradients_are_caught_without_float64(dtype, excess):
    for right in (True, False):
        function = scaled(1.0 if right else 1.0 + excess)
        report = gradcheck.check(
            lambda x, function=function: tf.sin(function(x)), numbers(4, dtype=dtype), float64=False, order=1
        )
        assert {row.dtype for row in report.rows} == {dtype}
        assert report.ok is right, report


def test_variables_are_differentiated_and_restored():
    weight = tf.Variable(numbers(3, 2), name="weight")
    bias = tf.Variable(numbers(2), name="bias")
    calls = tf.Variable(0, trainable=False)

    def function(x):
        calls.assign_add(1)
        return tf.tanh(x @ weight + bias) * tf.cast(calls, x.dtype)

    before = [each.numpy() for each in (weight, bias, calls)]
    report = gradcheck.check(function, numbers(4, 3), variables=[weight, bias, calls], forward=True)
    assert report, report
    assert {row.input for row in report.rows} >= {"inputs", "weight", "bias"}
    for each, value in zip((weight, bias, calls), before, strict=True):
        np.testing.assert_array_equal(each, value)
    assert "the function is not deterministic" in failed(gradcheck.check(function, numbers(4, 3)))[0].note

    def cut(x):
        return tf.tanh(x @ weight + tf.stop_gradient(bias))

    assert {row.input for row in failed(gradcheck.check(cut, numbers(4, 3), variables=[weight, bias], order=1))} == {
        "bias"
    }


def test_variables_are_restored_after_an_error():
    weight = tf.Variable(numbers(3))
    before = weight.numpy()

    def function(x):
        if not np.array_equal(weight, before):
            weight.assign(tf.zeros_like(weight))
            raise RuntimeError("perturbed")
        return x * weight

    with pytest.raises(RuntimeError, match="perturbed"):
        gradcheck.check(function, numbers(3), variables=[weight])
    np.testing.assert_array_equal(weight, before)


def test_report_is_a_table():
    report = gradcheck.check(scaled(2.0), numbers(3), order=1, forward=False)
    lines = str(report).splitlines()
    assert lines[0].split() == ["derivative", "input", "dtype", "error", "tolerance", "largest", "compared"]
    assert lines[1].split()[:3] == ["gradient", "inputs", "float64"]
    assert lines[1].endswith("FAILED")
    assert lines[3].startswith("FAILED: gradient by inputs (float64): inputs[")
    assert lines[-1] == "0 of 1 derivatives of function are right"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"function": 3}, TypeError, "function must be callable, but it is 3"),
        ({"function": tf.size}, TypeError, "function must return a tensor of dtype float64, .* returns none"),
        ({"inputs": tf.constant([1, 2])}, ValueError, "inputs must hold a tensor or array of dtype float64, "),
        ({"inputs": tf.zeros([0])}, ValueError, "inputs must hold a tensor or array of dtype float64, "),
        ({"order": 0}, ValueError, "order must be at least 1, but it is 0"),
        ({"samples": -1}, ValueError, "samples must be at least 0, but it is -1"),
        ({"eps": 0}, ValueError, "eps must be positive and finite, but it is 0"),
        ({"rtol": -1}, ValueError, "rtol and atol must be at least 0, but they are -1 and None"),
        ({"atol": math.nan}, ValueError, "rtol and atol must be at least 0, but they are None and nan"),
        (
            {"rtol": {"int8": 1}},
            ValueError,
            "rtol must be a number or have keys among float64, .* but it is {'int8': 1}",
        ),
        ({"kinks": 2}, ValueError, r"kinks must be in \[0, 1\], but it is 2"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    arguments = {"function": tf.identity, "inputs": tf.ones([3]), **arguments}
    with pytest.raises(error, match=message):
        gradcheck.check(arguments.pop("function"), **arguments)


MODULE = """
import tensorflow as tf

right = tf.sin, tf.ones([3])

def wrong():
    return {"function": lambda x: tf.stop_gradient(x) ** 2, "inputs": tf.ones([3]), "order": 1}
"""


@pytest.mark.parametrize(("name", "status"), [("right", 0), ("wrong", 1)])
def test_command_line_checks_functions(name, status, tmp_path, monkeypatch, capsys):
    (tmp_path / "functions_to_check.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    report = tmp_path / "report.json"
    assert gradcheck.main(["--function", f"functions_to_check:{name}", "--json", str(report)]) == status
    assert ("FAILED" in capsys.readouterr().out) == bool(status)
    content = json.loads(report.read_text())
    assert content["passed"] == (status == 0)
    assert {row["ok"] for row in content["rows"]} >= {status == 0}
