"""What the tests of `tfops.keras.fold` have in common."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tfops.keras import fold

TOLERANCE = 1e-12  # of the largest element, in float64
NO_LAYER = "kept: its input does not come from a convolution or dense layer"


def randomize(model: keras.Model, kernels: bool = True) -> None:
    """No weight is 0 or 1, and batch norms do something.

    Large networks keep their kernels. With scales around 1, residual blocks would double what goes through them, and
    what rounding errors become of that says nothing: EfficientNetV2-M turns 1e-15 at its inputs into 6e-3.
    """
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name.startswith("moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name.startswith("gamma"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape) * (1 if kernels else 0.5))
        elif variable.name.startswith(("beta", "moving_mean")):
            variable.assign(rng.normal(0, 0.1, variable.shape))
        elif kernels and "float" in variable.dtype:
            variable.assign(rng.normal(0, 0.3, variable.shape))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape)


def norms(model: keras.Model) -> dict[str, keras.Layer]:
    return {
        layer.name: layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)
    }


def assert_same(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(keras.tree.flatten(got), keras.tree.flatten(want), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def check_fold(
    model: keras.Model, x: Any, capsys: pytest.CaptureFixture, tolerance: float = TOLERANCE
) -> tuple[keras.Model, dict[str, str]]:
    """The folded model, whose outputs are the model's, and what is said of each batch norm."""
    if model.built:
        randomize(model)
    weights = model.get_weights()
    folded = fold(model, verbose=2)
    told = dict(line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert {name for name, text in told.items() if text.startswith("kept")} == norms(folded).keys()
    for got, want in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(got, want)
    assert_same(folded(x, training=False), model(x, training=False), tolerance)
    return folded, told
