"""The committed prediction for an H200 is what the policy of these sources says."""

from __future__ import annotations

from tfops_testing.fresh_process import run_python
from tfops_testing.paths import ROOT
from tfops_testing.requirements import needs_cuda_build

RESULT = ROOT / "benchmarks" / "results" / "h200-prediction.md"


@needs_cuda_build
def test_committed_prediction_is_that_of_the_policy():
    command = [ROOT / "benchmarks" / "gpu_proof.py", "--predict", "--dtype", "float32", "float16"]
    run = run_python(*command, TFOPS_TIER="streaming")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == RESULT.read_text().splitlines(), f"{RESULT} is older: {command} > {RESULT}"
