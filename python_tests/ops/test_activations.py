"""The activations: one list, whose names and functions are the same in C++, in TensorFlow and in the documentation."""

from __future__ import annotations

import re
from typing import get_args

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

import tfops
from tfops import _activations, _arguments
from tfops.gradcheck import _op
from tfops_kernels import _api, _arrays, _kernels
from tfops_testing import kernel_cases, oracle
from tfops_testing.paths import ROOT

NAMES = kernel_cases.ACTIVATIONS[1:]


def test_names_are_the_kernels():
    assert ("", *_activations.ACTIVATIONS) == _kernels.ACTIVATIONS
    assert get_args(_arguments.Activation) == get_args(_arrays.Activation) == NAMES
    assert (None, *NAMES) == _op.ACTIVATIONS
    linear = {name for name, each in _activations.ACTIVATIONS.items() if isinstance(each, _activations.PiecewiseLinear)}
    assert linear == set(kernel_cases.PIECEWISE_LINEAR)


def test_the_op_has_their_names():
    for op in ("Tfops>BatchNormTraining", "Tfops>BatchNormInferenceGrad", "Tfops>BatchNormGradientNormalize"):
        attribute = next(each for each in op_def_registry.get(op).attr if each.name == "activation")
        assert tuple(name.decode() for name in attribute.allowed_values.list.s) == _kernels.ACTIVATIONS


def test_the_documentation_has_them():
    table = (ROOT / "docs" / "op.md").read_text().partition("## Activations")[2].partition("\n## ")[0]
    assert tuple(re.findall(r'^\| `"(\w+)"` \|', table, re.MULTILINE)) == NAMES
    for function in (tfops.fused_batch_norm, tfops.keras.BatchNormalization, _api.forward):
        listed = re.findall(r'"(\w+)"', function.__doc__.partition("activation: ")[2].partition("softplus")[0])
        assert set(NAMES) - set(listed) <= {"softplus", "mish"}


@pytest.mark.parametrize("name", NAMES)
def test_tables_agree_with_numpy(name):
    """The function and its derivatives, the second by differences of the first."""
    z = np.concatenate([np.linspace(-9, 9, 3601) + 1e-3, [-60.0, -20.0, 20.0, 60.0]])
    each = _activations.ACTIVATIONS[name]
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
