"""What the tests of benchmarks/gpu_proof.py share: a plugin of pytest, by its fixture."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .paths import BENCHMARKS

PROOF = BENCHMARKS / "gpu_proof.py"
STEPS = ("facts", "tests", "sanitize", "bench", "calibrate", "recheck", "rest", "peers", "compile", "jax")

# In the place of NVIDIA's: a tool that knows its options, runs the program and finds nothing, and one that cannot run.
SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
  case "$1" in
    --tool) tool=$2;;
    --report-api-errors) [ "$tool" = memcheck ] || exit 3;;
    --racecheck-report) [ "$tool" = racecheck ] || exit 3;;
    --error-exitcode | --print-limit) ;;
    *) exit 3;;
  esac
  shift 2
done
echo "========= COMPUTE-SANITIZER"
[ "$tool" = racecheck ] && { echo "========= Error: Device not supported"; exit 1; }
"$@" || exit
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture(scope="module")
def gpu() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/gpu."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield lambda name: importlib.import_module(f"gpu.{name}")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, but for one that was cut off."""
    found = []
    for line in (folder / "results.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            assert len(found) > 5
    return found


def ended(folder: Path, step: str) -> dict[str, dict[str, Any]]:
    """The results of a step's items, by their names."""
    return {r["item"]: r for r in lines(folder) if r.get("step") == step and r.get("event") == "end"}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(condition: Callable[[], bool], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def make_sanitizer(folder: Path) -> Path:
    """A folder, for PATH, with a compute-sanitizer."""
    sanitizer = folder / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    return sanitizer.parent
