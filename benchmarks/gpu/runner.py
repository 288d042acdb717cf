"""Runs steps, each in a process of its own that is ended, with its children, when its time is up."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .records import CRASHED, EXIT_BROKEN, EXIT_FAILED, EXIT_UNFINISHED, FAILED, HUNG, OK, Records

WHOLE = 540  # seconds of the run that limits and reserves are those of
MOST_STARTS = 20  # of a step's process, in one run
INTERVAL = 0.05  # seconds between two looks at a process
GRACE = 8  # seconds that a process has, after those it was told, to notice that its time is up

# How steps end, beside those whose process ends as none should.
TIME_UP, NO_TIME = "time is up", "no time left"
USUAL = (OK, FAILED, TIME_UP, NO_TIME)


class Step(NamedTuple):
    """What is done in one process, and the seconds that it has. All but `stall` are those of a run of nine minutes."""

    name: str
    what: str
    limit: float  # at most
    reserve: float  # that the steps before leave for it
    stall: float  # without a new line, after which an item counts as hung


# In this order. Reserves are what a step needs to tell something, its start included, and fit in a run together.
STEPS = [
    Step("facts", "what machine it is", 40, 15, 40),
    Step("tests", "the kernels' tests, each tier forced", 120, 60, 60),
    Step("sanitize", "NVIDIA's compute-sanitizer over a small program", 110, 60, 120),
    Step("bench", "the most telling cells, in every tier that fits", 110, 60, 40),
    Step("calibrate", "the policy's constants from these times", 30, 15, 40),
    Step("recheck", "what the new constants choose, measured", 20, 12, 40),
    Step("rest", "the other cells, in the tier that the policy takes", 540, 15, 40),
    Step("peers", "the same by PyTorch and cuDNN", 80, 60, 40),
    Step("compile", "the same by torch.compile", 60, 45, 60),
    Step("jax", "XLA's handlers under JAX", 110, 90, 90),
]
BY_NAME = {step.name: step for step in STEPS}


def _own_group() -> None:
    """In a new process: a group of its own, to be ended as a whole; it ends with the process that started it."""
    os.setpgrp()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """The processes that descend from a process and still run."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = stat.read_text(errors="replace").rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = children.get(process, [])
    for pid in found:  # which grows
        found += children.get(pid, [])
    return found


def adopt_descendants() -> None:
    """From now on, descendants of this process whose parents end stay its own, and so can be found."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def end_descendants() -> None:
    """Ends all processes that descend from this one, also those that they start meanwhile."""
    end = time.monotonic() + GRACE
    while (found := descendants(os.getpid())) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that was started with _own_group, its group, and, if it still runs, its descendants in others."""
    others = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a driver may be slow to go
        process.wait(GRACE)


def start(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a command whose output is appended to a file."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_own_group,
        )


class Runner:
    """Runs steps within a time. Their processes are of `command`, with --step and --seconds."""

    def __init__(self, folder: Path, seconds: float, command: Sequence[str], environment: dict[str, str] | None = None):
        self.records = Records(folder)
        self.log = folder / "log.txt"
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.command = list(command)
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self._begin_of_log = 0  # of what the step's process has written there

    def left(self) -> float:
        return self.end - time.monotonic()

    def stop(self) -> None:
        """Ends the process of the step that runs, if one does."""
        if self.process is not None:
            end_group(self.process)

    def run(self, step: Step, later: Sequence[Step] = ()) -> str:
        """Runs a step; returns how it ended, and records it. `later`: the steps that time is to be left for."""
        share = self.seconds / WHOLE
        allowed = min(step.limit * share, self.left() - sum(other.reserve for other in later) * share)
        if allowed < 2:
            self.records.write(step=step.name, event="step", status=NO_TIME)
            return NO_TIME
        begin = time.monotonic()
        status = self._attempts(step, begin + allowed)
        took = round(time.monotonic() - begin, 1)
        said = {} if status in USUAL else {"said": self._last_words()}
        self.records.write(step=step.name, event="step", status=status, took=took, **said)
        return status

    def _last_words(self) -> str:
        """The last line that the step's last process left in the log, such as the error that it ended with."""
        with open(self.log, "rb") as file:
            file.seek(self._begin_of_log)
            lines = file.read()[-4000:].decode(errors="replace").split("\n")
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")

    def _attempts(self, step: Step, end: float) -> str:
        """Starts the step's process, and starts it again behind an item at which it crashed or hung."""
        for _ in range(MOST_STARTS):
            seconds = end - time.monotonic()
            if seconds < 1:
                return TIME_UP
            code = self._attempt(step, end)
            if code in (EXIT_UNFINISHED, None):
                return TIME_UP
            item = self.records.begun(step.name)
            how = HUNG if code == "stalled" else CRASHED
            if item is not None:
                error = ": ".join(filter(None, [_describe(code), self._last_words()]))
                self.records.write(step=step.name, item=item, event="end", status=how, error=error)
            elif code == 0:
                return OK
            elif code == EXIT_FAILED:
                return FAILED
            elif code != EXIT_BROKEN:  # between items only a GPU that no longer answers is worth another try
                return f"{how}: {_describe(code)}"
        return CRASHED

    def _attempt(self, step: Step, end: float) -> int | str | None:
        """The exit status of one process; "stalled", or None if its time was up, and it was ended."""
        seconds = end - time.monotonic()
        grace = min(GRACE, seconds / 4)
        command = [*self.command, "--step", step.name, "--seconds", str(seconds - grace)]
        with open(self.log, "a") as file:
            file.write(f"\n=== {step.name}\n")
            self._begin_of_log = file.tell()
        self.process = process = start(command, self.log, self.environment)
        size, changed = -1, time.monotonic()
        try:
            self.records.write(step=step.name, event="start", pid=process.pid)
            while (code := process.poll()) is None:
                now = time.monotonic()
                if now >= end:
                    return None
                if (new := self.records.path.stat().st_size) != size:
                    size, changed = new, now
                if now - changed > step.stall:
                    return "stalled"
                time.sleep(INTERVAL)
            return code
        finally:
            end_group(process)  # the children that it left behind, too
            self.process = None


def _describe(code: int | str | None) -> str:
    if isinstance(code, int) and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with status {code}" if isinstance(code, int) else "nothing came of it for too long"
