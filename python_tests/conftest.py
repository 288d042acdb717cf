"""Settings for all tests: quiet TensorFlow, the helpers' plugins, and asserts there that say as much as in tests."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import pytest

pytest.register_assert_rewrite("tfops_testing")
pytest_plugins = ["tfops_testing.exclusive", "tfops_testing.skips", "tfops_testing.simt"]
