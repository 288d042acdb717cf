"""All of these tests need TensorFlow."""

from __future__ import annotations

import pytest

from tfops_testing.requirements import has_tensorflow

collect_ignore_glob = [] if has_tensorflow() else ["*"]


@pytest.fixture
def float64():
    """Models are made in float64."""
    import keras

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
