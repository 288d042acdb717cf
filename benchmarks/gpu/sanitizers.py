"""The step that runs NVIDIA's compute-sanitizer, one tool after another, over a small program (sanitized.py)."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from typing import Any

from .records import FAILED, NOT_RUN, OK, ROOT

ENTRY = ROOT / "benchmarks" / "gpu_proof.py"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99  # compute-sanitizer's exit status where it found errors
MOST_OUTPUT = 100_000  # characters of a tool's output that go into the log
PLACES = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer:/opt/nvidia/compute-sanitizer"


def run(context: Any) -> int:
    items = [("without a tool", functools.partial(_check, context, ""))]
    items += [(tool, functools.partial(_check, context, tool)) for tool in TOOLS]
    return context.run("sanitize", items, on_gpu=False)


def _check(context: Any, tool: str) -> dict[str, Any]:
    """One tool's result. Where it cannot run, that is no failure of the kernels, and is said."""
    command = [sys.executable, str(ENTRY), "--sanitized", *(["--dry-run"] if context.dry_run else [])]
    if tool:
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=PLACES)
        if not sanitizer:
            return {"status": NOT_RUN, "error": "there is no compute-sanitizer"}
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        options += ["--racecheck-report", "all"] if tool == "racecheck" else []
        command = [sanitizer, *options, *command, *(["--as-allocated"] if tool == "initcheck" else [])]
    # What is left is shared among this tool and those after it.
    tools = len(TOOLS) - (TOOLS.index(tool) if tool else 0)
    limit = max(context.left() / tools * (1.5 if tools > 1 else 1), 5)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as problem:
        out = problem.stdout or b""
        print(out.decode(errors="replace")[-MOST_OUTPUT:] if isinstance(out, bytes) else out[-MOST_OUTPUT:])
        return {"status": NOT_RUN, "error": f"it took more than {limit:.0f} s"}
    output = done.stdout + done.stderr
    print(output[:MOST_OUTPUT], flush=True)
    return judge(tool, done.returncode, output)


def judge(tool: str, code: int, output: str) -> dict[str, Any]:
    """What a run's exit status and output say."""
    checks = re.search(r"sanitized: (\d+) checks agree", output)
    summaries = re.findall(r"=+ (?:\w+ SUMMARY: .*)", output)
    summary = summaries[-1].strip("= ") if summaries else ""
    count = int(checks[1]) if checks else 0
    refused = re.findall(r"^sanitized: refused: (.*)", output, re.MULTILINE)
    if refused and not tool:
        return {"status": FAILED, "error": f"a launch was refused: {refused[0]}"}
    if code == 0 and checks:
        summary += f"; {len(refused)} launches were refused below this tool, and streamed" if refused else ""
        return {"status": OK, "checks": count, "summary": summary}
    if code == FOUND and summary:
        reports = [line.strip("= ") for line in output.splitlines() if re.match(r"=+ (?!COMPUTE|Target)\S", line)]
        return {"status": FAILED, "checks": count, "error": summary, "reports": reports[:10]}
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    telling = [line for line in lines if re.search(r"[Ee]rror|not supported|[Uu]nable|[Ff]ailed", line)]
    reason = (telling or lines or ["no output"])[-1][:500]
    if tool and "sanitized: wrong" not in output:  # without the tool the program says itself what is wrong
        return {"status": NOT_RUN, "error": f"exit status {code}: {reason}"}
    return {"status": FAILED, "error": f"exit status {code}: {reason}"}
