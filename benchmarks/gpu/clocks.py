"""What nvidia-smi says of the GPU: at rest, and while it works."""

from __future__ import annotations

import concurrent.futures
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from .records import first_line

AT_REST = ("name", "driver_version", "vbios_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm")
AT_REST += ("clocks.max.mem", "power.limit", "memory.total", "ecc.mode.current", "mig.mode.current", "compute_mode")
AT_REST += ("temperature.gpu",)
# Why clocks are lowered has two names, the newer one first. nvidia-smi is asked field by field where it lacks one.
AT_WORK = ("clocks.sm", "clocks.mem", "clocks_event_reasons.active", "clocks_throttle_reasons.active")
AT_WORK += ("temperature.gpu", "power.draw")
MOST_SECONDS = 10  # that nvidia-smi may take


def query(fields: Sequence[str]) -> dict[str, str]:
    """What nvidia-smi says of the first GPU. Fields that it does not know are left out."""
    end = time.monotonic() + MOST_SECONDS
    try:
        return _query(fields, end)
    except subprocess.CalledProcessError:  # it says nothing at all if it does not know one of them
        found: dict[str, str] = {}
        for field in fields:
            try:
                found |= _query([field], end)
            except (subprocess.SubprocessError, IndexError):
                continue
        if not found:
            raise
        return found


def _query(fields: Sequence[str], end: float) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    left = max(end - time.monotonic(), 0.1)
    answer = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True).stdout
    return dict(zip(fields, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def copy_rate(backend: Any, simulated: bool) -> dict[str, Any]:
    """The rate of copies that go on while nvidia-smi reads the clocks, and what it reads."""
    if simulated:
        return {"copy_bytes_per_second": backend.copy_rate(), "at_work": {}}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(query, AT_WORK)
        rates = [backend.copy_rate()]
        end = time.monotonic() + MOST_SECONDS
        while not reading.done() and time.monotonic() < end:
            rates.append(backend.copy_rate())
        try:
            at_work: dict[str, str] = reading.result()
        except (OSError, subprocess.SubprocessError, IndexError) as problem:
            at_work = {"nvidia-smi": first_line(problem)}
    return {"copy_bytes_per_second": statistics.median(rates), "at_work": at_work}
