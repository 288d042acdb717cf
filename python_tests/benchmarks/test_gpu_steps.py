"""The steps of benchmarks/gpu_proof.py as they run beside a GPU, on stand-ins (gpu_stand_ins.py); and what fails."""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import json
import os
import re
import sys
import threading
import time
import zipfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tfops_kernels
from tfops_testing import gpu_stand_ins, kernel_cases
from tfops_testing.fresh_process import run_python
from tfops_testing.gpu_proof import PROOF, STEPS, ended, lines, make_sanitizer
from tfops_testing.paths import BENCHMARKS, ROOT

pytest_plugins = ["tfops_testing.gpu_proof"]

TESTS = "graph_holds_what_was_captured or every_tier_that"  # of python_tests/kernels/test_gpu.py


@pytest.fixture(scope="module")
def whole(simt, tmp_path_factory):
    """A run of all steps, with a sanitizer and few tests."""
    folder = tmp_path_factory.mktemp("stand_ins")
    environment = gpu_stand_ins.environment(folder)
    environment["PATH"] = f"{make_sanitizer(folder)}:{environment['PATH']}"
    environment["PYTEST_ADDOPTS"] = f"-k '{TESTS}'"
    run = run_python(PROOF, "--calibrate", "--minutes", "60", "--out", folder / "out", **environment)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}{(folder / 'out' / 'log.txt').read_text()[-3000:]}"
    return SimpleNamespace(folder=folder / "out", out=run.stdout, text=(folder / "out" / "summary.md").read_text())


def test_every_step_runs_beside_a_gpu(whole):
    last = {r["step"]: r["status"] for r in lines(whole.folder) if r.get("event") == "step"}
    assert last == dict.fromkeys(STEPS, "ok")
    bad = {(step, item): r["error"] for step in STEPS for item, r in ended(whole.folder, step).items() if "error" in r}
    assert {step for step, _ in bad} <= {"sanitize", "jax"}, bad
    assert set(bad) >= {("sanitize", "racecheck")}


def test_facts_are_read_at_rest_and_at_work(whole):
    facts = ended(whole.folder, "facts")
    assert facts["driver"]["nvidia_smi"]["clocks.sm"] == "1980 MHz"
    assert "compute_mode" not in facts["driver"]["nvidia_smi"]  # which this nvidia-smi does not know
    assert facts["device"]["device"]["multiprocessors"] == 3
    assert facts["arrays"].items() >= {"gpu": "a stand-in", "cudnn": 91900, "torch": "stand-in"}.items()
    assert len([name for name in facts if name.startswith("occupancy")]) == 4
    for step in ("bench", "peers"):
        copy = ended(whole.folder, step)["copy"]
        assert copy["copy_bytes_per_second"] > 0
        assert copy["at_work"]["clocks_throttle_reasons.active"] == "1980 MHz"
    assert "TB/s; meanwhile clocks.sm 1980 MHz" in whole.text


def test_forced_tiers_are_tested_with_pytorch(whole):
    tests = ended(whole.folder, "tests")
    assert len(tests) >= 2
    assert all(name.startswith("python_tests/kernels/test_gpu.py") for name in tests)


def test_every_tier_is_sanitized_in_memory_of_the_driver(whole):
    sanitized = ended(whole.folder, "sanitize")
    assert {name: r["status"] for name, r in sanitized.items() if r["status"] != "ok"} == {"racecheck": "not run"}
    assert {r["checks"] for r in sanitized.values() if "checks" in r} == {22}
    log = (whole.folder / "log.txt").read_text()
    (calls,) = set(re.findall("sanitized: ran ({.*})", log))
    assert ast.literal_eval(calls) == {"cluster": 11, "grid": 9, "one_block": 13, "streaming": 15}


def test_cells_are_timed_in_graphs(whole, gpu):
    bench = [r for name, r in ended(whole.folder, "bench").items() if name != "copy"]
    assert {r["tier"] for r in bench} == {"one_block", "cluster", "grid", "streaming"}
    assert len({r["cell"] for r in bench}) == 2 * len(gpu_stand_ins.CELLS)
    assert all(r["seconds"] > 0 for r in bench)
    assert all(0 < max(r["error_sizes"].values()) <= 1 for r in bench)
    fit = ended(whole.folder, "calibrate")["fit"]
    assert json.loads((whole.folder / "tuning.json").read_text()) == fit["tuning"]
    constants = {r["constants"] for r in ended(whole.folder, "rest").values()}
    assert constants == {"fitted" if fit["regret_after"] <= fit["regret_before"] else "built in"}
    assert len(ended(whole.folder, "rest")) == 3 * 3 * 3
    assert f"Constants of the policy, beside the first cells: {constants.pop()} in 27 cells." in whole.text


def test_peers_are_called_as_pytorch_wants_it(whole):
    peers = {name: r for name, r in ended(whole.folder, "peers").items() if name != "copy"}
    assert len(peers) == 2 * len(gpu_stand_ins.CELLS) + 27
    for name, r in peers.items():
        assert not r["peer_errors"], name
        if "x" not in name.split()[1].partition("x")[2]:  # 2-D
            assert set(r["peers"]) == {"native, contiguous"}
        else:
            assert len(r["peers"]) == 4
    compiled = ended(whole.folder, "compile")
    assert len(compiled) == len(gpu_stand_ins.CELLS)
    assert all(r["forward"] > 0 for r in compiled.values())
    assert "| best of PyTorch and cuDNN |" in whole.text
    assert "## torch.compile" in whole.text


def test_first_timing_begins_when_clocks_have_risen(gpu):
    backends, replays = gpu("backends"), []
    event = SimpleNamespace(record=bool, synchronize=bool, elapsed_time=lambda end: 1.0)
    stream = SimpleNamespace(wait_stream=bool)
    cuda = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=contextlib.nullcontext,
        synchronize=lambda: None,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: replays.append(time.monotonic())),
        graph=lambda graph, stream: contextlib.nullcontext(),
        Event=lambda enable_timing: event,
    )
    torch = backends.Torch.__new__(backends.Torch)
    torch.torch, torch._warm = SimpleNamespace(cuda=cuda), False
    assert torch.seconds([bool, bool], 0) == 1e-3 / 2
    first = len(replays)
    assert replays[-1] - replays[0] > 0.09
    assert torch.seconds([bool, bool], 0) == 1e-3 / 2
    assert len(replays) - first == 6  # to see that it can be replayed, and five that are timed
    assert first > 6


def test_copy_goes_on_while_clocks_are_read(gpu, monkeypatch):
    clocks, done = gpu("clocks"), threading.Event()
    rates = itertools.chain([1.0, 5.0], itertools.repeat(3.0))

    def query(fields: Any) -> dict[str, str]:
        assert done.wait(10)
        raise FileNotFoundError("nvidia-smi")

    def copy_rate() -> float:
        rate = next(rates)
        if rate == 3:
            done.set()
        return rate

    monkeypatch.setattr(clocks, "query", query)
    found = clocks.copy_rate(SimpleNamespace(copy_rate=copy_rate), simulated=False)
    assert found == {"copy_bytes_per_second": 3.0, "at_work": {"nvidia-smi": "FileNotFoundError: nvidia-smi"}}


# ----------------------------------------------------------------------------------------------------------------------
# What fails


@pytest.fixture
def context(gpu, simt, tmp_path):
    """Of a step, in this process."""
    steps = gpu("steps")
    context = steps.Context(tmp_path, 100, dry_run=True)
    before = context.backend.raw.policy_settings()
    yield context
    context.backend.raw.refuse_launches("", 0)
    context.backend.raw.set_policy_settings(**before)
    context.backend.raw.reset_cuda_launches()


FAILED = 74  # EXIT_FAILED of gpu/records.py


def test_occupancy_needs_no_pytorch(gpu, simt, monkeypatch, tmp_path):
    simt.configure()
    monkeypatch.setattr(tfops_kernels, "_kernels", simt.machine)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    steps = gpu("steps")
    assert steps.run("facts", steps.Context(tmp_path, 100, dry_run=False)) == FAILED
    facts = ended(tmp_path, "facts")
    assert facts["arrays"]["error"].startswith("ModuleNotFoundError: ")
    assert facts["driver"]["status"] == "not run"
    assert facts["device"]["device"]["multiprocessors"] == 3
    assert facts["occupancy bfloat16 backward"]["occupancy"]["clusters"]["2"] == 1
    text = gpu("summary").summarize(gpu("records").Records(tmp_path), brief=True)
    assert "| bfloat16 backward | CUDA | 3 | 1 | 0 | 0 | 0 |" in text


def test_cell_without_plans_is_a_failed_item(context, gpu, monkeypatch):
    steps = gpu("steps")
    plans_of, calls = steps.plans_of, []

    def plans(raw: Any, cell: Any) -> list[Any]:
        calls.append(cell)
        if cell.what == "forward":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return plans_of(raw, cell)

    monkeypatch.setattr(steps, "plans_of", plans)
    assert steps.run("rest", context) == FAILED
    first, *others = ended(context.folder, "rest").values()
    assert first["error"] == "RuntimeError: CUDA error: unspecified launch failure"
    assert [r["status"] for r in others] == ["ok", "ok"]
    before = (context.folder / "results.jsonl").read_bytes()
    assert steps.run("rest", context) == FAILED
    assert (context.folder / "results.jsonl").read_bytes() == before


def test_step_that_fails_by_itself_is_recorded(context, gpu, monkeypatch):
    steps = gpu("steps")
    monkeypatch.setattr(steps.backends, "Simt", lambda: 1 / 0)
    assert steps.run("rest", steps.Context(context.folder, 100, dry_run=True)) == FAILED
    assert ended(context.folder, "rest")["the step"]["error"] == "ZeroDivisionError: division by zero"


def test_refused_launch_fails(context, gpu):
    steps = gpu("steps")
    context.backend.raw.refuse_launches("dynamic", 701)
    assert steps.run("rest", context) == FAILED
    refused = [r["error"] for r in ended(context.folder, "rest").values() if r["status"] == "failed"]
    assert len(refused) == 2  # inference streams
    assert all(error.startswith("a launch was refused: {'tier': ") for error in refused)
    assert steps.run("bench", context) == FAILED
    bench = ended(context.folder, "bench")
    forced = [r["status"] for name, r in bench.items() if name.endswith((" one_block", " grid"))]
    assert set(forced) == {"failed"}
    assert {r["status"] for name, r in bench.items() if name.endswith(" streaming")} == {"ok"}


def test_wrong_result_and_time_zero_fail_and_are_no_choice(context, gpu, monkeypatch):
    steps, summary, records = gpu("steps"), gpu("summary"), context.records
    make_call = steps.make_call

    def spoiled(backend: Any, cell: Any, t: Any) -> Any:
        call, out = make_call(backend, cell, t)

        def run() -> None:
            call()
            if cell.what == "forward":
                out["y"].reshape(-1)[3] = np.nan

        return run, out

    monkeypatch.setattr(steps, "make_call", spoiled)
    monkeypatch.setattr(context.backend, "seconds", lambda calls, budget: 1e-6)
    assert steps.run("rest", context) == FAILED
    wrong, *others = ended(context.folder, "rest").values()
    assert wrong["error"] == "wrong results, in units of what rounding allows: {'y': inf}"
    assert {r["status"] for r in others} == {"ok"}
    monkeypatch.setattr(steps, "make_call", make_call)
    monkeypatch.setattr(context.backend, "seconds", lambda calls, budget: 0.0)
    assert steps.run("bench", context) == FAILED
    bench = [r for r in ended(context.folder, "bench").values() if "tier" in r]
    assert {r["error"] for r in bench} == {"the time of a call must be > 0, but it is 0.0"}
    times = summary._times(records)
    assert len(times) == 2
    assert wrong["cell"] not in times
    assert "could not be made" not in summary.summarize(records)


@pytest.mark.parametrize("refused", [True, False])
def test_sanitized_program_leaves_out_what_is_refused(gpu, simt, monkeypatch, capsys, refused):
    sanitized, judge = gpu("sanitized"), gpu("sanitizers").judge
    monkeypatch.setattr(sanitized, "import_simt", lambda: simt)
    simt.configure()
    before = simt.policy_settings()
    if refused:
        simt.refuse_launches("cooperative", 701)
    try:
        assert sanitized.main(dry_run=True, as_allocated=False) == 0
    finally:
        simt.refuse_launches("", 0)
        simt.set_policy_settings(**before)
        simt.reset_cuda_launches()
    out = capsys.readouterr().out
    assert out.count("sanitized: refused: ") == 3 * refused
    found = judge("memcheck", 0, out + "========= ERROR SUMMARY: 0 errors\n")
    assert found["status"] == "ok"
    assert found["checks"] == 19 - 3 * refused
    assert ("were left out" in found["summary"]) == refused
    assert judge("", 0, out)["status"] == ("failed" if refused else "ok")


def test_sanitized_program_ends_at_other_errors(gpu, simt, monkeypatch):
    sanitized = gpu("sanitized")
    monkeypatch.setattr(sanitized, "import_simt", lambda: simt)

    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernel_cases, "check", fail)
    before = simt.policy_settings()
    try:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            sanitized.main(dry_run=True, as_allocated=False)
    finally:
        simt.set_policy_settings(**before)


# ----------------------------------------------------------------------------------------------------------------------
# Peers that are missing, or fail


def test_peers_errors_are_no_failures(gpu, monkeypatch):
    peers = gpu("peers")
    sound = True
    backend = SimpleNamespace(is_sound=lambda: sound, exhausted=MemoryError, seconds=None)
    context = SimpleNamespace(backend=backend)

    def fail(*arguments: Any) -> Any:
        raise OSError("Failed to find C compiler\nPlease specify it")

    monkeypatch.setattr(peers, "measure_compiled", fail)
    found = peers.try_compiled(context, None)
    assert found == {"status": "not run", "error": "OSError: Failed to find C compiler"}

    def refuse(calls: Any, budget: float) -> float:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(backend, "seconds", refuse)
    monkeypatch.setattr(peers, "make_sets", lambda backend, cell: [None])
    monkeypatch.setattr(peers, "calls_of", lambda cell, t: {"cudnn": lambda: None, "native": lambda: None})
    found = peers.measure(context, None)
    assert found["status"] == "not run"
    assert found["error"] == "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"
    sound = False  # and then whatever was in flight is lost
    with pytest.raises(OSError, match="C compiler"):
        peers.try_compiled(context, None)
    with pytest.raises(RuntimeError, match="CUDNN_STATUS"):
        peers.measure(context, None)


FAKE_JAX = {
    "": "JAX is not installed: ",
    "raise RuntimeError('jaxlib version 0.4 is incompatible')": "JAX cannot be imported: RuntimeError: jaxlib version",
    "def devices(p): raise RuntimeError('Unable to initialize backend')": "JAX has no device of cuda: RuntimeError: Un",
    "devices = lambda p: [0]\ndef __getattr__(n): raise ImportError(n)": "the handlers for JAX cannot be used: Import",
}


@pytest.mark.parametrize("source", FAKE_JAX, ids=["missing", "incompatible", "no GPU", "no handlers"])
def test_jax_that_cannot_be_used_is_no_failure(gpu, monkeypatch, tmp_path, source):
    for name in [name for name in sys.modules if name.split(".")[0] == "jax" or name == "tfops_kernels.jax"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(tfops_kernels, "jax", raising=False)
    if source:
        (tmp_path / "jax.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "jax", None)
    records = gpu("records").Records(tmp_path)
    try:
        assert gpu("tests").jax(SimpleNamespace(dry_run=False, records=records, end=0)) == 0
    finally:
        for name in ("jax", "tfops_kernels.jax"):
            sys.modules.pop(name, None)
    (found,) = ended(tmp_path, "jax").values()
    assert found["status"] == "not run"
    assert found["error"].startswith(FAKE_JAX[source])


def test_what_jax_is_for_comes_first(tmp_path):
    """Of its tests on a GPU: a program that is a command buffer, then loops."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\nimport pytest\nfrom pathlib import Path\n"
    code += "from gpu import records, tests\nlines = tests.Lines(records.Records(Path(sys.argv[2])), 'jax', 0)\n"
    code += "options = ['--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider']\n"
    code += "sys.exit(pytest.main([*options, sys.argv[3]], plugins=[lines]))"
    pytest.importorskip("tfops_kernels.jax", reason="needs the handlers for JAX", exc_type=ImportError)
    run = run_python("-c", code, BENCHMARKS, tmp_path, ROOT / "python_tests" / "kernels" / "test_jax.py")
    assert run.returncode == 0, run.stdout + run.stderr
    names = [line.partition("::")[2] for line in run.stdout.splitlines() if "::" in line]
    assert "command_buffer" in names[0]
    assert any("scan" in name for name in names[:6])
    assert len(names) > 10


# ----------------------------------------------------------------------------------------------------------------------
# The summary, the build and the disk


@pytest.fixture
def proof(gpu):
    return importlib.import_module("gpu_proof")


def test_summary_of_facts_that_failed_and_of_a_part_that_cannot_be_made(gpu, proof, tmp_path, monkeypatch, capsys):
    records = gpu("records").Records(tmp_path)
    records.write(step="facts", item="machine", event="end", status="failed", error="KeyError: 'gpus'")
    records.write(step="facts", item="device", event="end", status="failed", error="no device")
    records.write(step="bench", event="step", status="crashed: the process ended with status 1", said="no such file")
    assert proof.write_summary(tmp_path, brief=True) == 2
    text = (tmp_path / "summary.md").read_text()
    assert "- bench: **crashed: the process ended with status 1**: no such file" in text
    assert "could not be made" not in text
    records.write(step="calibrate", item="fit", event="end", status="ok", tuning={})
    assert proof.write_summary(tmp_path, brief=True) == 2
    assert "The part 'calibration' could not be made: KeyError" in (tmp_path / "summary.md").read_text()
    assert "## What failed" in (tmp_path / "summary.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(proof, "summarize", lambda *arguments, **named: 1 / 0)
    assert proof.write_summary(tmp_path) == 2
    assert "the summary could not be written: ZeroDivisionError" in capsys.readouterr().err


def test_disk_that_takes_no_results_is_named(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "results.jsonl").symlink_to("/dev/full")
    run = run_python(PROOF, "--dry-run", "--out", full)
    assert run.returncode == 2
    assert f"gpu_proof.py: cannot write results in {full}: [Errno 28] No space left on device" in run.stderr
    assert "Traceback" not in run.stderr
    file = tmp_path / "file"
    file.touch()
    run = run_python(PROOF, "--dry-run", "--out", file / "folder")
    assert run.returncode == 2
    assert f"gpu_proof.py: cannot write results in {file / 'folder'}: [Errno 20] Not a directory" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("does", "limit", "message"),
    [
        ("sleep 600", 5, "the build took more than 5 s"),
        ("echo no nvcc; exit 1", 60, "the build failed: .*log.txt says why"),
    ],
)
def test_build_has_a_limit(proof, monkeypatch, tmp_path, does, limit, message):
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{does}\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    monkeypatch.setattr(proof.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(proof.NotRun, match=message):
        proof.install(None, False, "", tmp_path / "log.txt", limit)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_resumed_run_takes_what_was_built(proof, monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "ROOT", tmp_path)
    monkeypatch.setattr(proof.importlib.util, "find_spec", lambda name: None)
    built = tmp_path / "build" / "gpu" / "installed"
    (built / "tfops_kernels").mkdir(parents=True)
    assert proof.install(None, False, "", tmp_path / "log.txt", 1, resume=True) == str(built)


def test_damaged_wheel_is_named(proof, tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", np.random.default_rng(0).integers(97, 105, 4000, np.uint8).tobytes())
    data = wheel.read_bytes()
    for place in range(40, 1000, 60):  # which a checksum tells of, or what unpacks it
        wheel.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with pytest.raises(proof.NotRun, match=r"--wheel: .*a.whl is damaged: "):
            proof.install(wheel, False, str(tmp_path), tmp_path / "log.txt", 1)


def test_wheel_that_cannot_be_unpacked_is_named(proof, tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / "file").touch()
    with pytest.raises(proof.NotRun, match=r"--wheel: .*a.whl cannot be unpacked in .*file: "):
        proof.install(wheel, False, str(tmp_path / "file"), tmp_path / "log.txt", 1)
