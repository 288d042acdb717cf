"""The benchmark's prediction runs without a GPU, says that it is one, and without a GPU there is nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tfops_kernels

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not tfops_kernels.build_info()["cuda"], reason="this build has no CUDA kernels")


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=sys.prefix, capture_output=True, text=True, check=False)


def test_prediction(tmp_path):
    run = _run("--predict", "--network", "mnist-256", "--dtype", "float16", "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("## PREDICTION, not measured")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["prediction"]
    # three 4-D problems in two layouts, one 2-D problem in one; three variants, three passes
    assert len(report["rows"]) == (3 * 2 + 1) * 3 * 3
    for row in report["rows"]:
        assert row["moved_bytes"] >= row["least_bytes"]
        streams = row["tier"] == "streaming" and row["what"] != "inference"
        assert (row["moved_bytes"] > row["least_bytes"]) == streams


def test_nothing_is_measured_without_a_gpu():
    if tfops_kernels.build_info()["gpus"]:
        pytest.skip("there is a GPU")
    pytest.importorskip("torch", reason="needs PyTorch")
    run = _run("--network", "mnist-256")
    assert run.returncode == 2
    assert "no GPU" in run.stderr
