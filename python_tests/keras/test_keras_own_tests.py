"""Keras' own tests of its layer, as Keras installs them, pass with this layer in its place."""

from __future__ import annotations

import importlib.util
import re

import keras
import pytest

from tfops_testing.fresh_process import run_python

_RUN = """
import os
import sys
import pytest
import keras.src.layers
import tfops
keras.src.layers.BatchNormalization = tfops.keras.BatchNormalization
no_settings = ["-c", os.devnull, f"--rootdir={sys.prefix}"]  # of a checkout that Keras is installed within
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *no_settings, sys.argv[1]]))
"""


def test_keras_own_tests_pass():
    spec = importlib.util.find_spec("keras.src.layers.normalization.batch_normalization_test")
    if spec is None:
        pytest.skip(f"Keras {keras.__version__} was installed without its tests")
    run = run_python("-c", _RUN, spec.origin)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 25, run.stdout
    assert "skipped" not in run.stdout
