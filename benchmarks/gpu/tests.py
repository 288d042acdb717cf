"""Steps that run tests: pytest in this process, and a line for each test when it begins and when it has ended."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

from .records import EXIT_BROKEN, EXIT_FAILED, EXIT_UNFINISHED, FAILED, GOOD, NOT_RUN, OK, ROOT, Records, first_line

KERNELS_DRY = ["python_tests/simt/test_kernels.py", "-k", "nonfinite_channel or empty_tensors"]
# In tests' names, what comes first: XLA's command buffers; then tiers that are forced, and programs with loops.
FIRST = [re.compile(words) for words in ("command_buffer", "plan|tier|graph|loops|scan")]


def rank(name: str) -> int:
    """The place of a test among all: the least comes first."""
    return next((i for i, words in enumerate(FIRST) if words.search(name)), len(FIRST))


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
        items.sort(key=lambda item: rank(item.name))

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


def files_with(words: str) -> list[str]:
    """The files of tests that have these words: to import the others takes time, and may need what is not there."""
    files = sorted((ROOT / "python_tests").glob("**/test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if words in file.read_text(encoding="utf-8")]


def kernels(context: Any) -> int:
    """The kernels' tests that need a GPU and no TensorFlow, but those of JAX, which is a step of its own."""
    files = [file for file in files_with("mark.gpu") if file.startswith("python_tests/kernels/") and "jax" not in file]
    return run(context, "tests", KERNELS_DRY if context.dry_run else [*files, "-m", "gpu"])


def jax(context: Any) -> int:
    """The tests whose files say that they are about JAX, on its GPU; in the dry run every twentieth of the others."""
    files = sorted(map(str, (ROOT / "python_tests").glob("**/test_*jax*.py")))
    missing = what_jax_lacks("cpu" if context.dry_run else "cuda") if files else "there are no tests of JAX"
    if missing:
        context.records.write(step="jax", item="pytest", event="end", status=NOT_RUN, error=missing)
        return 0
    return run(context, "jax", [*files, *(["-m", "not gpu", "--every", "20"] if context.dry_run else ["-m", "gpu"])])


def what_jax_lacks(platform: str) -> str:
    """Why the handlers cannot run under JAX there, for a reason that is not theirs; "" if they can."""
    try:
        import jax
    except ImportError as problem:
        return f"JAX is not installed: {first_line(problem)}"
    except Exception as problem:  # a jaxlib of another version
        return f"JAX cannot be imported: {first_line(problem)}"
    try:
        jax.devices(platform)
    except Exception as problem:
        return f"JAX has no device of {platform}: {first_line(problem)}"
    try:
        import tfops_kernels.jax  # noqa: F401
    except ImportError as problem:
        return f"the handlers for JAX cannot be used: {first_line(problem)}"
    return ""
