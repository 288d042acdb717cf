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


class Step(NamedTuple):
    """What is done in one process, and the seconds that it has. All but `stall` are those of a run of nine minutes."""

    name: str
    what: str
    limit: float  # at most
    reserve: float  # that the steps before leave for it
    stall: float  # without a new line, after which an item counts as hung


# In this order.
STEPS = [
    Step("facts", "what machine it is", 40, 15, 40),
    Step("tests", "the kernels' tests, each tier forced", 120, 60, 60),
    Step("sanitize", "NVIDIA's compute-sanitizer over a small program", 110, 60, 120),
    Step("bench", "the most telling cells, in every tier that fits", 110, 60, 40),
    Step("calibrate", "the policy's constants from these times", 30, 15, 40),
    Step("recheck", "what the new constants choose, measured", 20, 10, 40),
    Step("rest", "the other cells, in the tier that the policy takes", 540, 0, 40),
    Step("peers", "the same by PyTorch and cuDNN", 80, 60, 40),
    Step("compile", "the same by torch.compile", 60, 30, 60),
    Step("jax", "XLA's handlers under JAX", 70, 40, 70),
]
BY_NAME = {step.name: step for step in STEPS}


def _own_group() -> None:
    """In a new process: a group of its own, to be ended as a whole; it ends with the process that started it."""
    os.setpgrp()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that was started with _own_group, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
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
            self.records.write(step=step.name, event="step", status="no time left")
            return "no time left"
        begin = time.monotonic()
        status = self._attempts(step, begin + allowed)
        took = round(time.monotonic() - begin, 1)
        self.records.write(step=step.name, event="step", status=status, took=took)
        return status

    def _attempts(self, step: Step, end: float) -> str:
        """Starts the step's process, and starts it again behind an item at which it crashed or hung."""
        for _ in range(MOST_STARTS):
            seconds = end - time.monotonic()
            if seconds < 1:
                return "time is up"
            code = self._attempt(step, end)
            if code in (EXIT_UNFINISHED, None):
                return "time is up"
            item = self.records.begun(step.name)
            how = HUNG if code == "stalled" else CRASHED
            if item is not None:
                self.records.write(step=step.name, item=item, event="end", status=how, error=_describe(code))
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
        self.process = process = start(command, self.log, self.environment)
        self.records.write(step=step.name, event="start", pid=process.pid)
        size, changed = -1, time.monotonic()
        try:
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
