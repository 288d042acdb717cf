"""Settings for all tests: quiet TensorFlow, the helpers' plugins, and asserts there that say as much as in tests."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TFOPS_STRICT", "1")  # on a GPU, no test passes without the kernels
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # processes side by side share a GPU

import pytest

pytest.register_assert_rewrite("tfops_testing")
pytest_plugins = ["tfops_testing.exclusive", "tfops_testing.skips", "tfops_testing.simt"]
