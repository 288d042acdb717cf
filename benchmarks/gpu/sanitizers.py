"""The step that runs NVIDIA's compute-sanitizer, one tool after another, over a small program (sanitized.py)."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from typing import Any

from .records import FAILED, NOT_RUN, OK, ROOT
from .runner import adopt_descendants, end_descendants

ENTRY = ROOT / "benchmarks" / "gpu_proof.py"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99  # compute-sanitizer's exit status where it found errors, or met what it counts as one
# The kernels ask CUDA questions to which an error is an answer, such as how many clusters of 16 blocks fit.
OPTIONS = {"memcheck": ["--report-api-errors", "no"], "racecheck": ["--racecheck-report", "all"]}
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
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *OPTIONS.get(tool, [])]
        command = [sanitizer, *options, *command, *(["--as-allocated"] if tool == "initcheck" else [])]
    # What is left is shared among this tool and those after it.
    tools = len(TOOLS) - (TOOLS.index(tool) if tool else 0)
    limit = max(context.left() / tools * (1.5 if tools > 1 else 1), 5)
    code, output = run_within(command, limit)
    print(output[:MOST_OUTPUT] if code is not None else output[-MOST_OUTPUT:], flush=True)
    if code is None:
        return {"status": NOT_RUN, "error": f"it took more than {limit:.0f} s"}
    return judge(tool, code, output)


def run_within(command: list[str], limit: float) -> tuple[int | None, str]:
    """The exit status, None if it took more seconds than `limit`, and the output.

    A tool starts the program, which would keep the GPU busy below the next tool: it is ended with all that descends
    from this process. They stay in its group, which the step's end ends.
    """
    adopt_descendants()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=limit)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired as problem:
        output, code = problem.stdout or b"", None
    end_descendants()
    return code, output.decode(errors="replace")


def judge(tool: str, code: int, output: str) -> dict[str, Any]:
    """What a run's exit status and output say."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    unable = [line for line in lines if "Device not supported" in line]
    if tool and unable:  # and what follows from that, which may end with any status
        return {"status": NOT_RUN, "error": unable[0][:500]}
    checks = re.search(r"sanitized: (\d+) checks agree", output)
    summaries = re.findall(r"=+ (?:\w+ SUMMARY: .*)", output)
    summary = summaries[-1].strip("= ") if summaries else ""
    count = int(checks[1]) if checks else 0
    refused = re.findall(r"^sanitized: refused: (.*)", output, re.MULTILINE)
    if refused and not tool:
        return {"status": FAILED, "error": f"a launch was refused: {refused[0]}"}
    if code == 0 and checks:
        summary += f"; CUDA refused {len(refused)} of the tiers below this tool, which were left out" if refused else ""
        return {"status": OK, "checks": count, "summary": summary}
    if code == FOUND and summary:
        reports = [line.strip("= ") for line in output.splitlines() if re.match(r"=+ (?!COMPUTE|Target)\S", line)]
        return {"status": FAILED, "checks": count, "error": summary, "reports": reports[:10]}
    telling = [line for line in lines if re.search(r"[Ee]rror|not supported|[Uu]nable|[Ff]ailed", line)]
    reason = (telling or lines or ["no output"])[-1][:500]
    if tool and "sanitized: wrong" not in output:  # without the tool the program says itself what is wrong
        return {"status": NOT_RUN, "error": f"exit status {code}: {reason}"}
    return {"status": FAILED, "error": f"exit status {code}: {reason}"}
