"""gpu_proof.py: all of it without a GPU, an interruption in the middle, and its parts."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tfops_kernels
from tfops_testing.fresh_process import run_python, start_python
from tfops_testing.gpu_proof import PROOF, STEPS, ended, is_alive, lines, make_sanitizer, wait
from tfops_testing.paths import BENCHMARKS
from tfops_testing.requirements import needs_cuda_build

pytest_plugins = ["tfops_testing.gpu_proof"]


# ----------------------------------------------------------------------------------------------------------------------
# The whole of it


class Dry:
    """A dry run that was killed within the benchmark, summarized, and resumed."""

    def __init__(self, folder: Path, simt: Any):
        self.folder = folder / "out"
        path = f"{make_sanitizer(folder)}:{os.environ['PATH']}"
        arguments = [PROOF, "--dry-run", "--calibrate", "--minutes", "9", "--out", self.folder]
        first = start_python(*arguments, PATH=path)

        def timed() -> bool:
            file = self.folder / "results.jsonl"
            return file.exists() and file.read_text().count('"step": "bench"') >= 5

        wait(timed)
        self.process = [r["pid"] for r in lines(self.folder) if r.get("event") == "start"][-1]
        assert is_alive(self.process)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        self.before = (self.folder / "results.jsonl").read_bytes()
        (self.folder / "results.jsonl").write_bytes(self.before[:-5])  # as if a line had been cut off
        self.partial = run_python(PROOF, "--summary", "--out", self.folder)
        self.partial_text = (self.folder / "summary.md").read_text()
        self.refused = run_python(*arguments)
        self.run = run_python(*arguments, "--resume", PATH=path)
        self.text = (self.folder / "summary.md").read_text()
        self.records = lines(self.folder)

    def ended(self, step: str) -> dict[str, dict[str, Any]]:
        return ended(self.folder, step)


@pytest.fixture(scope="module")
def dry(tmp_path_factory, simt) -> Dry:
    return Dry(tmp_path_factory.mktemp("proof"), simt)


def test_dry_run_does_every_step(dry):
    assert dry.run.returncode == 0, dry.run.stdout + dry.run.stderr + dry.text
    last = {r["step"]: r["status"] for r in dry.records if r.get("event") == "step"}
    assert last == dict.fromkeys(STEPS, "ok")
    sanitized = dry.ended("sanitize")
    assert {name: r["status"] for name, r in sanitized.items() if r["status"] != "ok"} == {"racecheck": "not run"}
    assert "Device not supported" in sanitized["racecheck"]["error"]
    assert sanitized["without a tool"]["checks"] == sanitized["memcheck"]["checks"] > 6
    assert sanitized["memcheck"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert sum(r["status"] == "ok" for r in dry.ended("tests").values()) > 5
    tiers = {r["tier"] for r in dry.ended("bench").values() if "tier" in r}
    assert tiers == {"one_block", "cluster", "grid", "streaming"}
    for r in dry.ended("bench").values():
        if "error_sizes" in r:
            assert 0 < max(r["error_sizes"].values()) <= 1
    assert [r["constants"] for r in dry.ended("rest").values()] in (["fitted"] * 3, ["built in"] * 3)


def test_dry_run_calibrates(dry):
    fit = dry.ended("calibrate")["fit"]
    assert fit["error_after"] < fit["error_before"]
    assert json.loads((dry.folder / "tuning.json").read_text()) == fit["tuning"]
    for name, value in fit["tuning"].items():
        assert f"  double {name} = {value:g};" in dry.text


def test_interrupted_run_leaves_no_process_and_a_summary(dry):
    assert not is_alive(dry.process)
    assert dry.partial.returncode == 0, dry.partial.stderr
    assert "| bench | " in dry.partial_text
    assert "| interrupted |" in dry.partial_text
    assert "not reached" in dry.partial_text
    assert "## Tiers" in dry.partial_text


def test_resumed_run_repeats_nothing(dry):
    assert dry.refused.returncode == 2
    assert "--resume" in dry.refused.stderr
    counts = Counter((r["step"], r["item"]) for r in dry.records if r.get("event") == "end")
    assert set(counts.values()) == {1}
    # what was cut off, or under way, and nothing else, was begun again
    again = Counter((r["step"], r["item"]) for r in dry.records if r.get("event") == "begin")
    assert sum(count - 1 for count in again.values()) <= 1


def test_summary_says_that_a_dry_run_means_nothing(dry):
    assert "simulated" in dry.text.splitlines()[0]
    assert "They mean nothing" in dry.text
    assert "not reached" not in dry.text
    assert "| bfloat16 backward | CUDA | 3 | 1 | 0 | 0 | 0 |" in dry.text
    assert "| bfloat16 backward | CUDA | 3 | 1 | 0 | 0 | 0 |" in dry.run.stdout  # where the folder may not come back
    assert "## Tiers" not in dry.run.stdout
    assert "## What failed" not in dry.text


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_sanitizers_are_judged_by_what_they_say(gpu):
    judge = gpu("sanitizers").judge
    good = "========= COMPUTE-SANITIZER\nsanitized: 20 checks agree with float64\n========= ERROR SUMMARY: 0 errors\n"
    assert judge("memcheck", 0, good)["status"] == "ok"
    assert judge("memcheck", 0, good)["checks"] == 20
    bad = "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 16 bytes\n"
    bad += "========= ERROR SUMMARY: 3 errors\n"
    found = judge("memcheck", 99, bad)
    assert found["status"] == "failed"
    assert found["error"] == "ERROR SUMMARY: 3 errors"
    assert "Invalid __global__ write" in found["reports"][0]
    races = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert judge("racecheck", 99, races)["status"] == "failed"
    unable = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"
    found = judge("memcheck", 1, unable)
    assert found["status"] == "not run"
    assert "Device not supported" in found["error"]
    # As in a sandbox: the tool refuses the GPU, and CUDA then fails below it, which the exit status says.
    sandboxed = unable + "========= Program hit cudaErrorUnknown (error 999) on CUDA API call to cudaMalloc\n"
    sandboxed += "========= ERROR SUMMARY: 1 error\n"
    found = judge("memcheck", 99, sandboxed)
    assert found["status"] == "not run"
    assert found["error"] == "Error: Device not supported. Please refer to the documentation"
    refused = good + "sanitized: refused: case grid: too many resources\nsanitized: refused: case cluster 8: likewise\n"
    found = judge("racecheck", 0, refused)
    assert found["status"] == "ok"
    assert found["summary"].endswith("CUDA refused 2 of the tiers below this tool, which were left out")
    assert judge("", 0, refused)["error"] == "a launch was refused: case grid: too many resources"
    assert judge("", 1, "sanitized: wrong: case: y[3] is 1, not 2")["status"] == "failed"
    assert judge("memcheck", 1, "sanitized: wrong: case: y[3] is 1, not 2")["status"] == "failed"
    assert judge("", -11, "")["status"] == "failed"


@pytest.fixture(scope="module")
def plans(gpu, simt):
    """What the benchmark would measure on an H200, and the kernels' module."""
    raw = simt.machine
    simt.configure("h200")
    calibrate, cells, steps = gpu("calibrate"), gpu("cells"), gpu("steps")
    found = []
    for cell in cells.telling():
        problem, backward = steps.make_problem(raw, cell), cell.what == "backward"
        for plan in steps.plans_of(raw, cell):
            measured = calibrate.Measured(cells.name_of(cell), problem, backward, plan.index, plan.tier, 0)
            found.append(measured)
    yield raw, raw.CudaDevice(), found
    simt.configure()


def test_calibration_recovers_constants(gpu, plans):
    calibrate = gpu("calibrate")
    raw, device, found = plans
    start = raw.policy_settings()["tuning"]
    factors = {"launch": 0.6, "memory_rate": 1.2, "own_rate": 0.7, "grid_barrier": 1.8, "cluster_barrier": 0.5}
    factors |= {"phase": 1.4, "latency": 1.5}
    truth = {name: value * factors.get(name, 1) for name, value in start.items()}
    noise = np.exp(np.random.default_rng(1).normal(0, 0.02, len(found)))
    seconds = calibrate.reckon(raw, device, found, truth) * noise
    fit = calibrate.fit(lambda tuning: calibrate.reckon(raw, device, found, tuning), seconds, start)
    assert fit.before > 0.15
    assert fit.after < 0.03
    # what times say most about, and says least about
    assert fit.tuning["memory_rate"] == pytest.approx(truth["memory_rate"], rel=0.03)
    assert fit.tuning["launch"] == pytest.approx(truth["launch"], rel=0.3)
    measured = [m._replace(seconds=s) for m, s in zip(found, seconds, strict=True)]
    before = calibrate.regret(measured, calibrate.reckon(raw, device, found, start))
    after = calibrate.regret(measured, calibrate.reckon(raw, device, found, fit.tuning))
    assert after < 0.01
    assert after < before


def test_calibration_keeps_what_times_say_nothing_about(gpu):
    fit = gpu("calibrate").fit
    x = np.array([1.0, 2, 5, 10])
    start = {"launch": 1.0, "phase": 3.0, "cache_share": 0.5}
    found = fit(lambda tuning: tuning["launch"] * x, 2.5 * x, start)
    assert found.tuning["launch"] == pytest.approx(2.5, rel=0.02)
    assert (found.tuning["phase"], found.tuning["cache_share"]) == (3.0, 0.5)
    outlier = np.array([2.5, 5, 12.5, 2500])
    assert fit(lambda tuning: tuning["launch"] * x, outlier, start).tuning["launch"] == pytest.approx(2.5, rel=0.4)
    bound = fit(lambda tuning: tuning["launch"] * x, 1000 * x, start).tuning["launch"]
    assert bound == pytest.approx(6)  # no constant goes further


def test_cells_come_in_a_telling_order(gpu):
    cells = gpu("cells")
    first, others = cells.telling(), cells.rest()
    assert len(first) == 40
    assert len(others) == len(set(others)) == 1944 - 40
    assert not set(first) & set(others)
    assert {cell.dtype for cell in first} == {"float32", "float16", "bfloat16"}
    assert all(cells.cell_of(cells.name_of(cell)) == cell for cell in [*first, *others])


@pytest.mark.parametrize("what", ["forward", "backward", "inference"])
def test_check_sees_a_fault_in_every_result(gpu, simt, what):
    cells, backend = gpu("calls"), gpu("backends").Simt()
    cell = gpu("cells").telling(dry_run=True)[0]._replace(what=what)
    t = cells.Tensors(backend, cell)
    call, out = cells.make_call(backend, cell, t)
    errors = cells.check(backend, cell, t, call, out)
    assert max(errors.values()) <= 1
    assert set(out) - {"activation_bits"} <= errors.keys() | {"mean_out", "variance_out", "saved_mean", "saved_inv_std"}
    for name in errors:
        for value in (np.nan, 1e3):
            right = out[name].copy()

            def spoiled(name=name, value=value):
                call()
                out[name].reshape(-1)[7] = value

            assert cells.check(backend, cell, t, spoiled, out)[name] > 1
            out[name][...] = right


def test_only_the_steps_need_the_kernels():
    """Those may be in a wheel that the steps alone are given."""
    code = "import sys; sys.modules['tfops_kernels'] = None; sys.path.insert(0, sys.argv[1]); import gpu_proof"
    run = run_python("-c", code, BENCHMARKS)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("arguments", [["--wheel", "none.whl"], ["--minutes", "0"], ["--only", "nothing"]], ids=str)
def test_wrong_arguments_are_named(arguments):
    run = run_python(PROOF, *arguments)
    assert run.returncode == 2
    assert arguments[0] in run.stderr
    assert arguments[1] in run.stderr


@needs_cuda_build
def test_nothing_runs_without_a_gpu(tmp_path):
    if tfops_kernels.build_info()["gpus"]:
        pytest.skip("there is a GPU")
    run = run_python(PROOF, "--out", tmp_path)
    assert run.returncode == 2
    assert "--dry-run and --predict need no GPU" in run.stderr


@needs_cuda_build
def test_predictions_say_so_and_count_bytes(gpu):
    predict = gpu("predict")
    run = run_python(PROOF, "--predict", "--network", "mnist-256", "--dtype", "float16")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("## PREDICTION, not measured")
    # three 4-D problems in two layouts, one 2-D problem in one; three variants, three passes
    assert len(run.stdout.splitlines()) == 4 + (3 * 2 + 1) * 3 * 3
    for cell in gpu("cells").telling():
        row = predict.predict(cell)
        assert row["moved_bytes"] >= row["least_bytes"]
        if row["tier"] == "streaming":
            assert (row["moved_bytes"] > row["least_bytes"]) == (row["what"] != "inference")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--out: there is no folder "),
        (["--summary"], "--out: there is no folder "),
        (["--out", __file__], "--out must be a folder, but "),
        (["--wheel", __file__], "--wheel must be a wheel, but it is "),
    ],
    ids=["nothing to resume", "nothing to sum up", "a file", "no wheel"],
)
def test_wrong_arguments_are_named_and_leave_nothing(arguments, message, tmp_path):
    run = run_python(BENCHMARKS / "gpu_proof.py", "--out", tmp_path / "out", *arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert not list(tmp_path.iterdir())
