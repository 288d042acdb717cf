"""The activations: one list, whose names and functions are the same in C++, in TensorFlow and in the documentation."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

import tfops
import tfops_kernels
from tfops import _activations
from tfops._library import ops
from tfops_kernels import _api, _kernels
from tfops_testing import kernel_cases, oracle
from tfops_testing.paths import ROOT

NAMES = kernel_cases.NAMES[1:]


def test_names_are_the_kernels():
    assert ("", *_activations.ACTIVATIONS) == _kernels.ACTIVATIONS
    linear = {name for name in kernel_cases.ACTIVATIONS if _activations.is_piecewise_linear(name)}
    assert linear == set(kernel_cases.PIECEWISE_LINEAR)


@pytest.mark.parametrize(
    ("activation", "plain"),
    [
        ("relu()", "relu"),
        ("relu(max_value=6)", "relu6"),
        ("relu( threshold = 0 ,max_value=6.0)", "relu6"),
        ("relu(negative_slope=0.25)", "leaky_relu(negative_slope=0.25)"),
        ("relu(negative_slope=0.2)", "leaky_relu"),
        ("leaky_relu(negative_slope=0.2)", "leaky_relu"),
        ("leaky_relu(negative_slope=-0.5)", "leaky_relu(negative_slope=-0.5)"),
        ("leaky_relu(negative_slope=0)", "relu"),
        ("elu(alpha=1)", "elu"),
        ("elu(alpha=1e-3)", "elu(alpha=0.001)"),
        ("relu(threshold=1, negative_slope=0)", "relu(threshold=1.0)"),
        ("relu(max_value=6, negative_slope=0.5)", "relu(max_value=6.0, negative_slope=0.5)"),
        ("silu()", "silu"),
    ],
)
def test_parameters_are_read(activation, plain):
    """The kernels read the same as Python, and take the plainest activation that does it."""
    assert _activations.canonical(activation) == plain
    x = np.linspace(-3, 9, 48, dtype=np.float32).reshape(16, 3)
    vectors = [np.full(3, value, np.float32) for value in (1, 0, 0, 1)]
    settings = {"training": False, "epsilon": 0.0}
    results = [tfops_kernels.forward(x, *vectors, activation=name, **settings).y for name in (activation, plain)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], oracle.activate(plain, x.astype(np.float64)), rtol=1e-6, atol=1e-7)
    assert tfops.keras.BatchNormalization(activation=activation).activation == plain
    got = tfops.fused_batch_norm(x, *vectors, epsilon=0.0, is_training=False, activation=activation)[0]
    np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("leaky_relu(alpha=0.1)", r"activation 'leaky_relu' takes negative_slope=number, but it is 'leaky_relu\(alpha"),
        ("leaky_relu(0.1)", r"activation 'leaky_relu' takes negative_slope=number, but it is"),
        (
            "relu(max_value=six)",
            r"activation 'relu' takes max_value=number, negative_slope=number, threshold=number, but",
        ),
        ("silu(beta=1)", r"activation 'silu' takes nothing, but it is 'silu\(beta=1\)'"),
        ("elu(alpha=nan)", "alpha of activation must be finite, but it is nan|'elu' takes alpha=number, but"),
        ("leaky_relu(negative_slope=inf)", "negative_slope of activation must be finite|takes negative_slope=number"),
        (
            "relu(max_value=1, threshold=1)",
            r"max_value of activation must be > threshold, which is 1(\.0)?, but it is 1",
        ),
        ("relu(max_value=0)", r"max_value of activation must be > threshold, which is 0(\.0)?, but it is 0"),
        ("relu(threshold=-1)", r"threshold of activation must be >= 0, but it is -1"),
        ("elu(", r"activation must be one of .*, but it is 'elu\('"),
        ("(alpha=1)", r"activation must be one of .*, but it is '\(alpha=1\)'"),
        ("relu6(max_value=6)", r"activation 'relu6' takes nothing, but it is 'relu6\(max_value=6\)'"),
    ],
)
def test_other_parameters_are_refused(activation, message):
    x, ones = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    for refuse in (tfops.fused_batch_norm, tfops_kernels.forward):
        with pytest.raises(ValueError, match=message):
            refuse(x, ones, ones, activation=activation)
    with pytest.raises(ValueError, match=message):
        tfops.keras.BatchNormalization(activation=activation)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        ops.tfops_batch_norm_training(x, ones, ones, running=[], residual=[], activation=activation)


def test_the_documentation_has_them():
    table = (ROOT / "docs" / "op.md").read_text().partition("## Activations")[2].partition("\n## ")[0]
    assert tuple(re.findall(r'^\| `"(\w+)"` \|', table, re.MULTILINE)) == NAMES
    for function in (tfops.fused_batch_norm, tfops.keras.BatchNormalization, _api.forward):
        listed = re.findall(r'"(\w+)"', function.__doc__.partition("activation: ")[2].partition("softplus")[0])
        assert set(NAMES) - set(listed) <= {"softplus", "mish"}


@pytest.mark.parametrize("name", kernel_cases.ACTIVATIONS[1:])
def test_tables_agree_with_numpy(name):
    """The function and its derivatives, the second by differences of the first."""
    z = np.concatenate([np.linspace(-9, 9, 3601) + 1e-3, [-60.0, -20.0, 20.0, 60.0]])
    each = _activations.find(name)
    np.testing.assert_allclose(each.of(tf.constant(z)), oracle.activate(name, z), rtol=1e-13, atol=1e-14)
    if isinstance(each, _activations.PiecewiseLinear):
        slope = np.where(each.is_on(tf.constant(z)), 1, each.off_slope)
        np.testing.assert_array_equal(slope, oracle.slope_of(name, z))
        return
    np.testing.assert_allclose(each.slope(tf.constant(z)), oracle.slope_of(name, z), rtol=1e-12, atol=1e-13)
    step = 2.0**-17
    z = z[np.all(np.abs(z[:, None] - np.array(each.kinks)) > step, axis=1)]
    differences = (oracle.slope_of(name, z + step) - oracle.slope_of(name, z - step)) / (2 * step)
    np.testing.assert_allclose(each.curvature(tf.constant(z)), differences, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", kernel_cases.SMOOTH)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_keep_their_digits(name, dtype):
    """Relative to y, also where that is small: tails, and both sides of 0. The slope, relative to itself and to 1."""
    z = np.concatenate([np.geomspace(1e-6, 12, 4001), -np.geomspace(1e-6, 12, 4001)]).astype(dtype)
    vectors = [tf.constant(np.full(2, value, dtype)) for value in (1, 0, 0, 1)]
    x = tf.constant(z.reshape(-1, 2))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tfops.fused_batch_norm(x, *vectors, axis=-1, epsilon=0.0, is_training=False, activation=name)[0]
    wide = z.astype(np.longdouble if dtype == "float64" else np.float64)
    eps = np.finfo(dtype).eps
    want = oracle.activate(name, wide)
    # What an exponential is of is rounded before: of the size of z, or of its square or cube for gelu's tails.
    tail = {"gelu": 1 + wide**2, "gelu_tanh": 4 + 2 * np.abs(wide) + np.abs(wide) ** 3 / 8}
    bound = 4 * eps * tail.get(name, 4 + 2 * np.abs(wide)) * np.abs(want) + 16 * np.finfo(dtype).tiny
    assert (np.abs(np.ravel(y) - want) <= bound).all()
    slope = np.ravel(tape.gradient(y, x))
    np.testing.assert_allclose(slope, oracle.slope_of(name, wide).astype(np.float64), rtol=16 * eps, atol=16 * eps)
