"""The table of features names what the op and the layer take beyond TensorFlow's and Keras' own."""

from __future__ import annotations

import inspect

import keras
import pytest

import tfops
from tfops_testing.paths import ROOT

pytestmark = pytest.mark.source_tree


def _new(function, stock=()):
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is each.KEYWORD_ONLY} - set(stock)


def test_every_new_argument_is_in_the_table():
    text = (ROOT / "docs" / "features.md").read_text()
    known = inspect.signature(keras.layers.BatchNormalization).parameters
    arguments = _new(tfops.fused_batch_norm) | _new(tfops.keras.BatchNormalization, known) | {"renorm", "synchronized"}
    assert {"activation", "residual", "skip_nonfinite"} <= arguments
    assert not [name for name in arguments if f"`{name}=" not in text]
