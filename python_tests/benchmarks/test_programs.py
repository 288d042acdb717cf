"""cpu.py's modes run, and reckon right; so do the bounds of accuracy_fused.py."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tfops_kernels
from tfops_testing import oracle
from tfops_testing.fresh_process import run_python
from tfops_testing.paths import BENCHMARKS
from tfops_testing.requirements import needs_tensorflow


def _run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return run_python(BENCHMARKS / script, *map(str, arguments))


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_builds_alternate_in_one_process(tmp_path):
    """cpu_versions.py loads a build three times, as libraries of their own, whose results are the same to the bit."""
    installed = Path(tfops_kernels.__file__).parents[1]
    cells = "mnist-256 256x128 NHWC float32 (add_relu|plain)"
    run = _run("cpu_versions.py", installed, installed, "--out", tmp_path / "out.md", "--cells", cells)
    assert run.returncode == 0, run.stderr
    report = (tmp_path / "out.md").read_text()
    assert "Results differ in 0 of 6 cells." in report
    assert len(re.findall(r"^\| mnist-256 256x128 NHWC float32 .* \| \d\.\d+ \| \d\.\d+ \|$", report, re.M)) == 6


def test_other_results_are_told_from_the_same(benchmarks):
    cpu_versions = benchmarks("cpu_versions")
    arrays = cpu_versions.Arrays(benchmarks("problems").Cell("", (4, 3), "NHWC", "float32", "plain", "forward"))
    first = cpu_versions.results(lambda: None, arrays)
    assert first == cpu_versions.results(lambda: None, arrays)
    assert first != cpu_versions.results(lambda: arrays.outputs["y"].fill(-0.0), arrays)


@needs_tensorflow
@pytest.mark.exclusive
def test_cpu_compares_with_every_peer(tmp_path):
    arguments = ["--network", "dense-256", "--dtype", "float32", "--variant", "add_relu"]
    arguments += ["--pass", "forward", "forward_backward", "--seconds", "0", "--out", str(tmp_path / "out")]
    run = _run("cpu.py", *arguments)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["rows"]) == 1
    if report["rows"][0]["others"] <= 0.05:  # there is nothing left to do but to print it again
        assert _run("cpu.py", *arguments, "--resume").stdout == run.stdout
    peers = {"tf_onednn", "tf_eigen", "keras", "keras_jit"}
    if importlib.util.find_spec("torch"):
        peers.add("torch")
    for row in report["rows"]:
        assert not row["absent"]
        for measured in row["passes"].values():
            assert set(measured["ratios"]) == peers
            for value in measured["peers"].values():
                assert value["n"] >= 3
                assert 0 < value["us"][0] <= value["us"][1] <= value["us"][2]
    assert "| dense-256 | 256x4096 | NHWC | float32 | add_relu |" in (tmp_path / "out.md").read_text()
    has_plot = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "out.svg").exists() == has_plot
    assert ("matplotlib is not installed" in run.stderr) != has_plot


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize(("dtype", "variant"), [("float32", "plain"), ("bfloat16", "add_relu"), ("float16", "relu")])
def test_cpu_exact_agrees_with_the_oracle(benchmarks, layout, dtype, variant):
    exact, worker = benchmarks("cpu_exact").exact, benchmarks("cpu_worker")
    cell = benchmarks("problems").Cell("test", (5, 4, 3, 6), layout, dtype, variant, "forward_backward")
    shape, axis = worker.memory_shape(cell)
    data = worker.numbers(cell)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x, dy, residual = (data[name].astype(kind)[: 5 * 4 * 3 * 6].reshape(shape) for name in ("x", "dy", "residual"))
    vectors = (data["scale"], data["offset"])
    options = {
        "axis": axis,
        "epsilon": worker.EPSILON,
        "activation": None if variant == "plain" else "relu",
        "residual": residual if variant == "add_relu" else None,
    }
    forward, backward = oracle.forward(x, *vectors, **options), oracle.backward(dy, x, *vectors, **options)
    want = {
        "y": forward.y,
        "dx": backward.x,
        "dscale": backward.scale,
        "doffset": backward.offset,
        "dresidual": backward.residual,
    }
    got = exact(cell)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value.ravel(), rtol=1e-10, atol=1e-13, err_msg=name)
    statistics = (data["mean"], data["variance"])
    inference = oracle.forward(x, *vectors, *statistics, training=False, **options)
    got = exact(cell._replace(what="inference"))
    np.testing.assert_allclose(got["y"], inference.y.ravel(), rtol=1e-10, atol=1e-13)


def test_cpu_says_whose_error_it_is(benchmarks):
    cpu, worker = benchmarks("cpu"), benchmarks("cpu_worker")
    cell = benchmarks("problems").Cell("test", (40, 5, 5, 6), "NHWC", "bfloat16", "add_relu", "backward")
    truth = benchmarks("cpu_exact").exact(cell)

    def result(off=0.0):
        dscale = truth["dscale"] + off * np.abs(truth["dscale"]).max()
        return worker.Prepared("peer", cell.what, 1.0, 1, {**truth, "dscale": dscale})

    for ours, theirs, whose, wrong in (
        (0, 0.04, "dscale is off by 4.0e-02 .* tfops' by 0.0e", False),
        (0.04, 0, "dscale is off by 0.0e.* tfops' by 4.0e-02", True),
        (0.03, -0.03, "dscale is off by 3.0e-02 .* tfops' by 3.0e-02", True),
        (0, 0.5, "dscale is off by 5.0e-01", True),  # no rounding
        (0, np.nan, "dscale is off by nan", True),
    ):
        text, is_wrong = cpu.disagreement(cell, result(ours), result(theirs))
        assert re.match(whose, text)
        assert is_wrong == wrong
    assert cpu.disagreement(cell, result(0.01), result()) is None


@needs_tensorflow
def test_gradients_of_fused_activations_and_additions_are_within_bounds(benchmarks):
    fused = benchmarks("accuracy_fused")
    for dtype in fused.DTYPES:
        t = fused.make_tensors(dtype, (16, 14, 14, 8))
        for variant in fused.VARIANTS:
            exact, bound = fused.reference(t, variant)
            off = {}
            for peer in ("tfops", "tf"):
                found = fused.step(peer, variant, dtype, 8)(*t)
                off[peer] = [np.abs(got - exact[name]) for name, got in zip(fused.GRADIENTS, found, strict=True)]
            for name, errors in zip(fused.GRADIENTS, off["tfops"], strict=True):
                assert np.all(errors <= bound[name])
            if variant == "add_relu":
                for ours, theirs in zip(*off.values(), strict=True):
                    assert theirs.max() > 1e4 * ours.max()


@needs_tensorflow
@pytest.mark.exclusive
def test_cpu_overhead_has_every_row(benchmarks):
    modes = benchmarks("cpu_modes")
    rows = modes.overhead(threads=1, rounds=1, shapes=[(2, 3)])
    assert len(rows) == 3 * 2 + 3  # op and graph: three passes; function: forward, inference, forward + backward
    assert "geometric mean of the ratios" in modes.overhead_table(rows)


@needs_tensorflow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
@pytest.mark.exclusive
def test_cpu_scaling_measures_both_layouts():
    run = _run("cpu.py", "--scaling", "--most", "1e4", "--dtype", "bfloat16", "--threads", "1")
    assert run.returncode == 0, run.stderr
    lines = [line.split("|") for line in run.stdout.splitlines() if "2x9x9x64" in line]
    assert [line[1].strip() for line in lines] == ["NHWC", "NCHW"]
    for line in lines:
        assert all(float(value) > 0 for value in line[4:7])
        assert all(0 <= float(value) < 4 for value in line[7:10])


def _row(variant: str, dtype: str, channels: int, ours: float, peers: dict[str, float]) -> dict[str, Any]:
    times = {name: {"us": [us, us, us], "n": 5} for name, us in {"tfops": ours, **peers}.items()}
    return {
        "network": "test",
        "shape": [1000, channels],
        "layout": "NHWC",
        "dtype": dtype,
        "variant": variant,
        "absent": {},
        "others": 0.0,
        "copy_bytes_per_second": 1e9,
        "read_bytes_per_second": 2e9,
        "passes": {what: {"peers": times} for what in ("forward", "backward", "inference", "forward_backward")},
    }


def test_cpu_report_derives_rates_and_ratios(benchmarks):
    cpu_report = benchmarks("cpu_report")
    report = {
        "last_level_cache_bytes": 100_000,
        "rows": [
            _row("plain", "float32", 64, 1000, {"tf_onednn": 1000, "torch": 800}),
            _row("plain", "float32", 32, 1000, {"tf_onednn": 4000, "torch": 3000}),
            _row("plain", "float32", 24, 1000, {"tf_onednn": 2900, "torch": 3000}),
            _row("add_relu", "bfloat16", 16, 1000, {"tf_onednn": 2000, "torch": 3000}),
        ],
    }
    cpu_report.derive(report)
    plain, _, _, add = (row["passes"] for row in report["rows"])
    tensor = 1000 * 64 * 4
    assert report["copy_bytes_per_second"] == 1e9
    # in units of bytes a nanosecond, which is the copy's rate: x twice, y; dy and x twice, dx; x, y
    for what, tensors in (("forward", 3), ("backward", 5), ("inference", 2), ("forward_backward", 8)):
        assert plain[what]["of_copy"] == pytest.approx(tensors * tensor / 1e6, abs=1e-3)
        assert plain[what]["regime"] == "streamed"
    # y is copied, and x read once more; dx is copied, and dy, x and dy read alone
    for what, tensors in (("forward", 2 + 1 / 2), ("backward", 2 + 3 / 2), ("inference", 2)):
        assert plain[what]["of_memory"] == pytest.approx(tensors * tensor / 1e6, abs=1e-3)
    tensor, mask = 1000 * 16 * 2, 1000 * 16 // 8
    # and residual, the mask written; the mask read twice, dresidual
    for what, tensors, masks in (("forward", 4, 1), ("backward", 6, 2), ("inference", 3, 0)):
        assert add[what]["gb_per_second"] == pytest.approx((tensors * tensor + masks * mask) / 1e6, abs=1e-2)
    assert [add[what]["regime"] for what in ("forward", "backward", "inference")] == ["cached", "", "cached"]
    assert plain["forward"]["ratios"] == {"tf_onednn": 1.0, "torch": 0.8}
    assert plain["forward"]["best_peer"] == "torch"
    text = "\n".join(cpu_report.summary(report))
    assert "float32 and bfloat16, C % 16 == 0 | 2.00 (2) |  | 1.5 | yes |" in text
    assert "float32 and bfloat16, other C | 2.90 (1) |  | 3 | **no** |" in text
    assert "fused op, + add + ReLU | 2.00 (1) |  | 2 | yes |" in text
    assert f"| PyTorch | {(0.8 * 27) ** 0.25:.2f} (4) |  | 1.5 | yes |" in text
    assert "below 0.95 of the best peer: 4 of 16." in text
    assert "- test 1000x64 NHWC float32 plain forward: 0.80, PyTorch" in text
    assert "| backward | 2 | 0.96 | 0.64 | 0.67 | 0.45 |" in text
    assert "- test 1000x64 NHWC float32 plain forward: 0.77, 0.64" in text
