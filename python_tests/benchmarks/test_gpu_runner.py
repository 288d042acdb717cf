"""benchmarks/gpu_proof.py runs steps so that none spoils the next, and so that each has its time."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from tfops_testing.fresh_process import run_python, start_python
from tfops_testing.gpu_proof import STEPS, is_alive, lines, wait
from tfops_testing.paths import BENCHMARKS

pytest_plugins = ["tfops_testing.gpu_proof"]

# A program like gpu_proof.py, whose items do what their names say.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
folder = Path(sys.argv[2])
step, seconds = sys.argv[4], float(sys.argv[6])
from gpu.records import Records, run_items

def good(): return {"value": 1}
def bad(): raise ValueError("bad\\nand long")
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def hang(apart=False):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=apart)
    (folder / "child").write_text(str(child.pid))
    time.sleep(600)
def apart(): hang(apart=True)
def slow(): time.sleep(0.4); return {}
def exit(): os._exit(0)

if "early" in step: raise ValueError("no such GPU")
does = dict(apart=apart, good=good, bad=bad, crash=crash, hang=hang, slow=slow, exit=exit)
items = [(f"{i} {word}", does[word]) for i, word in enumerate(step.split("-"))]
sys.exit(run_items(Records(folder), step, items, time.monotonic() + seconds, lambda: "broken" not in step))
"""


@pytest.fixture
def run(gpu, tmp_path):
    """Runs steps named after what their items do; returns how they ended, and the items' results."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    runner_module = gpu("runner")

    def run(*names: str, limit: float = 30, stall: float = 30, seconds: float = 540):
        runner = runner_module.Runner(tmp_path, seconds, [sys.executable, str(program), str(BENCHMARKS), str(tmp_path)])
        steps = [runner_module.Step(name, "", limit, 0, stall) for name in names]
        how = [runner.run(step) for step in steps]
        statuses = [{item: r["status"] for item, r in runner.records.ended(name).items()} for name in names]
        return how, statuses

    return run


def test_failed_item_is_recorded_and_the_rest_runs(run, tmp_path):
    how, (items,) = run("good-bad-good")
    assert how == ["failed"]
    assert items == {"0 good": "ok", "1 bad": "failed", "2 good": "ok"}
    assert "ValueError: bad" in [r.get("error") for r in lines(tmp_path)]


def test_crash_spoils_neither_the_next_item_nor_the_next_step(run, tmp_path):
    how, items = run("good-crash-good", "good")
    assert how == ["failed", "ok"]
    assert items == [{"0 good": "ok", "1 crash": "crashed", "2 good": "ok"}, {"0 good": "ok"}]
    assert any("SIGSEGV" in r.get("error", "") for r in lines(tmp_path))


@pytest.mark.parametrize("kind", ["hang", "apart"])
def test_hang_ends_with_its_children(run, tmp_path, kind):
    how, items = run(f"good-{kind}-good", "good", stall=5)
    assert how == ["failed", "ok"]
    assert items == [{"0 good": "ok", f"1 {kind}": "hung", "2 good": "ok"}, {"0 good": "ok"}]
    assert not is_alive(int((tmp_path / "child").read_text()))


def test_step_ends_at_its_limit(run, tmp_path):
    start = time.monotonic()
    how, items = run("good-hang-good", "good", limit=2)
    assert time.monotonic() - start < 15
    assert how == ["time is up", "ok"]
    assert items == [{"0 good": "ok"}, {"0 good": "ok"}]
    assert not is_alive(int((tmp_path / "child").read_text()))


def test_step_stops_by_itself_and_goes_on(run):
    how, (items,) = run("-".join(["slow"] * 12), limit=3)
    assert how == ["time is up"]
    assert 0 < len(items) < 12
    how, (items,) = run("-".join(["slow"] * 12))
    assert how == ["ok"]
    assert len(items) == 12


def test_no_step_starts_without_time(run):
    assert run("good", seconds=0.5) == (["no time left"], [{}])


def test_steps_leave_time_for_later_ones(gpu, tmp_path):
    runner_module = gpu("runner")
    runner = runner_module.Runner(tmp_path, 540, ["false"])
    step = runner_module.Step("a", "", 1000, 0, 30)
    later = [runner_module.Step("b", "", 600, 539, 30)]
    assert runner.run(step, later) == "no time left"


def test_steps_process_ends_with_the_one_that_started_it(run, tmp_path):
    code = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
    code += "from gpu.runner import Runner, Step\n"
    code += "command = [sys.executable, *sys.argv[2:]]\n"
    code += "Runner(Path(sys.argv[4]), 540, command).run(Step('hang', '', 540, 0, 540))"
    parent = start_python("-c", code, BENCHMARKS, tmp_path / "program.py", BENCHMARKS, tmp_path)
    wait(lambda: (tmp_path / "child").exists())
    pid = next(r["pid"] for r in lines(tmp_path) if r.get("event") == "start")
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    wait(lambda: not is_alive(pid))
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_line_that_was_cut_off_is_left_out(gpu, tmp_path):
    records = gpu("records").Records(tmp_path)
    for i in range(3):
        records.write(step="a", item=str(i), event="end", status="ok")
    records.path.write_bytes(records.path.read_bytes()[:-9])
    records.write(step="a", item="3", event="end", status="ok")
    assert list(records.ended("a")) == ["0", "1", "3"]


def test_process_that_ends_without_a_word_is_not_taken_for_success(run):
    how, (items,) = run("good-exit-good")
    assert how == ["failed"]
    assert items == {"0 good": "ok", "1 exit": "crashed", "2 good": "ok"}


def test_step_that_ends_before_its_items_says_why(run, tmp_path):
    how, (items,) = run("early")
    assert (how, items) == (["crashed: the process ended with status 1"], {})
    (step,) = [r for r in lines(tmp_path) if r.get("event") == "step"]
    assert step["said"] == "ValueError: no such GPU"
    run("good")
    assert "said" not in lines(tmp_path)[-1]


# A launcher like compute-sanitizer's. It leaves one child to the process that is asked to adopt such, and waits.
LAUNCHER = """
import subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
orphan = "import subprocess; print(subprocess.Popen(%r, start_new_session=True).pid)" % sleep
subprocess.run([sys.executable, "-c", orphan])
child = subprocess.Popen(sleep)
print(child.pid, flush=True)
child.wait()
"""


def test_tool_ends_with_all_that_it_started(tmp_path):
    """Also a program in a session of its own, whose parent has ended: it would share the GPU with the next tool."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom gpu.sanitizers import run_within\n"
    code += "code, output = run_within([sys.executable, '-c', sys.argv[2]], 10)\nprint(code, *output.split())"
    start = time.monotonic()
    run = run_python("-c", code, BENCHMARKS, LAUNCHER)
    assert run.returncode == 0, run.stderr
    status, *children = run.stdout.split()
    assert status == "None"
    assert len(children) == 2
    assert not any(is_alive(int(child)) for child in children)
    assert time.monotonic() - start < 60


# ----------------------------------------------------------------------------------------------------------------------
# Every step has its time

# Seconds that steps need. PLAUSIBLE: as estimated for an H200 on which the sanitizers run.
PLAUSIBLE = dict(zip(STEPS, (20, 60, 90, 100, 6, 12, 1e9, 75, 60, 90), strict=True))
NO_SANITIZERS = PLAUSIBLE | {"sanitize": 10}
SLOW = dict.fromkeys(STEPS, 1e9)
LEAST = dict(zip(STEPS, (15, 60, 60, 60, 15, 12, 15, 60, 45, 90), strict=True))  # in which a step shows something


@pytest.fixture
def simulate(gpu, monkeypatch, tmp_path):
    """Runs all steps, on paper; returns the seconds that each had."""
    runner, proof = gpu("runner"), importlib.import_module("gpu_proof")

    def simulate(needs: dict[str, float], seconds: float = 540) -> dict[str, float]:
        now, had, needs = 1000.0, dict.fromkeys(STEPS, 0.0), dict(needs)

        def attempts(self: Any, step: Any, end: float) -> str:
            nonlocal now
            took = min(needs[step.name], end - now)
            had[step.name], needs[step.name], now = had[step.name] + took, needs[step.name] - took, now + took
            return "ok" if needs[step.name] == 0 else "time is up"

        monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: now))
        monkeypatch.setattr(runner.Runner, "_attempts", attempts)
        monkeypatch.setattr(proof.signal, "signal", lambda *arguments: None)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        arguments = Namespace(out=folder, dry_run=False, minutes=9, calibrate=True, only=None)
        assert proof.run_all(arguments, {}, seconds) == 0
        return had

    return simulate


@pytest.mark.parametrize("needs", [PLAUSIBLE, NO_SANITIZERS, SLOW], ids=["plausible", "no sanitizers", "slow"])
def test_every_step_gets_the_time_to_show_something(simulate, needs):
    had = simulate(needs)
    assert sum(had.values()) <= 540
    assert sum(had.values()) > 520
    for name in STEPS:
        assert had[name] >= min(needs[name], LEAST[name]), name


def test_plausible_run_times_many_cells(simulate):
    """About 0.2 s a cell."""
    assert simulate(PLAUSIBLE)["rest"] >= 40
    assert simulate(NO_SANITIZERS)["rest"] >= 120
    assert simulate(NO_SANITIZERS)["jax"] == 90


def test_steps_end_by_themselves_where_there_is_time(simulate):
    needs = NO_SANITIZERS | {"rest": 100}
    assert simulate(needs) == needs


def test_shorter_run_shares_its_time_likewise(simulate):
    had = simulate(SLOW, seconds=270)
    assert sum(had.values()) <= 270
    assert all(had[name] >= LEAST[name] / 2 for name in STEPS)
