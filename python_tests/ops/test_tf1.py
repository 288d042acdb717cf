"""As TensorFlow 1 behaves, and in its graphs, derivatives of any order and arguments of every kind work as in 2."""

from __future__ import annotations

import pytest

from tfops_testing.fresh_process import run_python


@pytest.mark.parametrize("behavior", ["v2_behavior", "tensor_equality", ""])
def test_everything_works_without_the_tf2_behavior(behavior):
    result = run_python("-m", "tfops_testing.tf1_check", behavior)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["derivatives", "ok", "phases", "ok", "reference_variables", "ok", "loops", "ok"]
