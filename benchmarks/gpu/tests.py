"""Steps that run tests: pytest in this process, and a line for each test when it begins and when it has ended."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

from .records import EXIT_BROKEN, EXIT_FAILED, EXIT_UNFINISHED, FAILED, GOOD, NOT_RUN, OK, ROOT, Records

KERNELS = ["python_tests/kernels", "-m", "gpu", "--ignore-glob=*jax*"]
KERNELS_DRY = ["python_tests/simt/test_kernels.py", "-k", "nonfinite_channel or empty_tensors"]
FIRST = re.compile("plan|tier|graph")  # in the names of tests that force tiers


class Lines:
    """A plugin of pytest. It leaves out the tests that have a result, and ends the process if the GPU is lost."""

    def __init__(self, records: Records, step: str, end: float):
        self.records, self.step, self.end = records, step, end
        self.ended = records.ended(step)
        self.result: dict[str, Any] = {}
        self.start = 0.0

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        done = [item for item in items if item.nodeid in self.ended]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in self.ended]
        items.sort(key=lambda item: not FIRST.search(item.name))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        import pytest

        if time.monotonic() >= self.end:
            pytest.exit("no time is left", returncode=EXIT_UNFINISHED)
        self.result, self.start = {"status": OK}, time.monotonic()
        self.records.write(step=self.step, item=nodeid, event="begin")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.result = {"status": NOT_RUN, "error": reason[:300]}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.result = {"status": FAILED, "error": str(crash.message if crash else report.longrepr)[:1000]}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        took = round(time.monotonic() - self.start, 4)
        self.records.write(step=self.step, item=nodeid, event="end", **self.result, took=took)
        if self.result["status"] == FAILED and not _is_sound():
            os._exit(EXIT_BROKEN)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            error = str(report.longrepr)[-1000:]
            self.records.write(step=self.step, item=report.nodeid, event="end", status=FAILED, error=error)


def _is_sound() -> bool:
    """Whether the frameworks that a test has imported can still use the GPU."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if jax is not None:
            jax.block_until_ready(jax.numpy.zeros(1) + 1)
    except RuntimeError:
        return False
    return True


def run(context: Any, step: str, arguments: list[str]) -> int:
    import pytest

    os.chdir(ROOT)
    options = [f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=short"]
    options.append("--continue-on-collection-errors")
    code = pytest.main([*options, *arguments], plugins=[Lines(context.records, step, context.end)])
    if code == EXIT_UNFINISHED:
        return EXIT_UNFINISHED
    statuses = [record["status"] for record in context.records.ended(step).values()]
    if OK not in statuses:  # nothing was shown: none was there, or all were skipped
        error = f"no test passed: pytest ended with status {int(code)}"
        context.records.write(step=step, item="pytest", event="end", status=FAILED, error=error)
        return EXIT_FAILED
    return EXIT_FAILED if set(statuses) - set(GOOD) else 0


def kernels(context: Any) -> int:
    return run(context, "tests", KERNELS_DRY if context.dry_run else KERNELS)


def jax(context: Any) -> int:
    """The tests whose files say that they are about JAX, on its GPU; in the dry run every twentieth of the others."""
    import importlib.util

    files = sorted(map(str, (ROOT / "python_tests").glob("**/test_*jax*.py")))
    missing = "" if importlib.util.find_spec("jax") else "JAX is not installed"
    missing = missing if files else "there are no tests of JAX"
    if missing:
        context.records.write(step="jax", item="pytest", event="end", status=NOT_RUN, error=missing)
        return 0
    return run(context, "jax", [*files, *(["-m", "not gpu", "--every", "20"] if context.dry_run else ["-m", "gpu"])])
