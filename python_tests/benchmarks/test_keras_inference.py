"""keras_inference.py measures a network."""

from __future__ import annotations

import json

import pytest

from tfops_testing.fresh_process import run_python
from tfops_testing.paths import BENCHMARKS
from tfops_testing.requirements import needs_tensorflow


@needs_tensorflow
@pytest.mark.exclusive
def test_keras_inference_measures_mobilenet(tmp_path):
    out = tmp_path / "out"
    options = ["--network", "MobileNet", "--pixels", "32", "--batch", "1", "2", "--seconds", "0", "--threads", "1"]
    run = run_python(BENCHMARKS / "keras_inference.py", *options, "--out", str(out))
    assert run.returncode == 0, run.stderr
    assert out.with_suffix(".md").read_text() in run.stdout
    report = json.loads(out.with_suffix(".json").read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert row["rounds"] >= 5
        assert row["batch_norms"] == row["into_weights"] == 27
        assert row["error"] < 1e-5
        assert set(row["call"]) == {"stock", "converted", "folded"}
        assert all(median > 0 for median, _ in [*row["call"].values(), *row["ratio"].values()])
