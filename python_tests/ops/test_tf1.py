"""As TensorFlow 1 behaves, and in its graphs, derivatives of any order and arguments of every kind work as in 2."""

from __future__ import annotations

import pytest

from tfops_testing.fresh_process import run_python

# Without v2_behavior tensors compare as in TensorFlow 1, too: the others differ in less.
OTHERS = [pytest.param(behavior, marks=pytest.mark.slow) for behavior in ("tensor_equality", "")]


@pytest.mark.parametrize("behavior", ["v2_behavior", *OTHERS])
def test_everything_works_without_the_tf2_behavior(behavior):
    result = run_python("-m", "tfops_testing.tf1_check", behavior)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["derivatives", "ok", "phases", "ok", "reference_variables", "ok", "loops", "ok"]
