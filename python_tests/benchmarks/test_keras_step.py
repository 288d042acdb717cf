"""keras_step.py measures the MNIST network."""

from __future__ import annotations

import json

import pytest

from tfops_testing.fresh_process import run_python
from tfops_testing.paths import BENCHMARKS
from tfops_testing.requirements import needs_tensorflow


@needs_tensorflow
@pytest.mark.exclusive
def test_keras_step_measures_the_mnist_network(tmp_path):
    out = tmp_path / "out"
    options = ["--network", "mnist", "--seconds", "0.1", "--threads", "1", "--out", str(out)]
    run = run_python(BENCHMARKS / "keras_step.py", *options)
    assert run.returncode == 0, run.stderr
    assert out.with_suffix(".md").read_text() in run.stdout
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["threads"] == 1
    (row,) = report["rows"]
    assert row["rounds"] >= 5
    assert row["batch_norms"] == row["folded_activations"] == 4
    assert row["folded_additions"] == 0
    assert row["error"] < 1e-4
    assert set(row["step"]) == {"keras", "xla", "tfops", "fused", "xla_fused", "without"}
    assert all(median > 0 for median, _ in row["step"].values())
    assert all(share < 1 for share, _ in row["share"].values())
