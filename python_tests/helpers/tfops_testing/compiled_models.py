"""Compiled models, and what it means that a copy trains on as the original does."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

import tfops
from tfops.keras import convert

X = np.random.default_rng(0).normal(size=(16, 5))
TARGET = np.random.default_rng(1).normal(size=(16, 3))
TOLERANCE = 1e-9  # relative, where the arithmetic is float64
EXACT = {"epsilon": 2.0**-10, "momentum": 0.75}  # in float32 too


def make_model(dtype="float64", cls=keras.Model):
    """A residual block whose addition is folded in; the later of its batch norms was made first."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), dtype=None if "mixed" in dtype else dtype)
    # No biases: their gradients are rounding errors before a batch norm, and Adam makes much of them.
    dense = {"units": 4, "use_bias": False, "dtype": dtype}
    first = layers.BatchNormalization(name="first", dtype=dtype, **EXACT)(layers.Dense(**dense)(inputs))
    second = layers.Dense(**dense)(layers.Dense(name="two", **dense)(inputs))
    second = layers.BatchNormalization(name="second", dtype=dtype, **EXACT)(second)
    y = layers.ReLU(dtype=dtype)(layers.Add(dtype=dtype)([second, first]))
    return cls(inputs, layers.Dense(3, dtype=dtype, name="head")(y), name="net")


def assert_trains_alike(model, copy, x=X, target=TARGET, rtol=TOLERANCE, **kwargs):
    """Both models fit on: the same logs, and the same variables, by path, afterwards."""
    logs = [each.fit(x, target, epochs=2, shuffle=False, verbose=0, **kwargs) for each in (model, copy)]
    assert logs[0].history.keys() == logs[1].history.keys()
    for name, values in logs[0].history.items():
        np.testing.assert_allclose(logs[1].history[name], values, rtol=rtol, err_msg=name)
    got = {variable.path: variable.numpy() for variable in copy.variables}
    for variable in model.variables:
        want = variable.numpy()
        np.testing.assert_allclose(got[variable.path], want, atol=rtol * np.abs(want).max(), err_msg=variable.path)


def fit_and_convert(model, **kwargs):
    """Trains and converts it without a warning; its copy, which does not share state with it."""
    model.fit(X, TARGET, epochs=3, verbose=0, shuffle=False, **kwargs)
    before = [variable.numpy() for variable in model.optimizer.variables]
    copy = convert(model, verbose=0)
    assert type(copy.get_layer("second")) is tfops.keras.BatchNormalization
    assert copy.optimizer is not model.optimizer
    own = {id(each) for each in (*model.optimizer.variables, *model.metrics)}
    assert not own & {id(each) for each in (*copy.optimizer.variables, *copy.metrics)}
    for variable, value in zip(model.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)  # the original's is as it was
    return copy
