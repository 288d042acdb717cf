"""A plugin: skips tests that are marked as needing what is not there, or was not asked for.

At the end of a run it says what was skipped, not collected, or failed as expected, with one line for each reason.
`--slow` asks for the tests that take minutes too, and `--every N` for a sample: every N-th test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import pytest

import tfops_kernels

from .requirements import has_source_tree

MARKERS = {
    "gpu": "needs a GPU (and no TensorFlow); skipped where there is none",
    "slow": "minutes, not seconds; skipped unless asked for, with --slow",
    "limits": "minutes, and up to 24 GiB; skipped unless selected, with -m limits",
    "xla": "needs XLA kernels; skipped where this TensorFlow or this build has none",
    "source_tree": "needs the source tree, not only the installed package; skipped beside an installed package alone",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tfops")
    group.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    group.addoption("--every", type=int, default=1, metavar="N", help="run every N-th test only")


@pytest.hookimpl(trylast=True)  # a sample of what -k and -m have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (every := config.option.every) < 1:
        raise pytest.UsageError(f"--every must be at least 1, not {every}")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every])
    items[:] = items[::every]
    reasons = {}
    info = tfops_kernels.build_info()
    if not info["gpus"]:
        reasons["gpu"] = f"no GPU: {info['cuda_problem'] or 'the driver lists none'}"
    if not config.option.slow and "slow" not in config.option.markexpr:
        reasons["slow"] = "takes minutes: make test-all"
    if "limits" not in config.option.markexpr:
        reasons["limits"] = "takes minutes and up to 24 GiB: make limits"
    if not has_source_tree():
        reasons["source_tree"] = "needs the source tree, not only the installed package"
    if any(item.get_closest_marker("xla") for item in items):
        import tfops

        if problem := tfops.build_info()["xla_problem"]:
            reasons["xla"] = f"no XLA kernels: {problem}"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Reports what a folder's conftest.py keeps from being collected, with its docstring, which says why, as reason."""
    report = yield
    conftest = collector.config.pluginmanager.get_plugin(str(collector.path / "conftest.py"))
    if isinstance(collector, pytest.Directory) and conftest:
        for name in (*getattr(conftest, "collect_ignore", []), *getattr(conftest, "collect_ignore_glob", [])):
            reason = f"Skipped: {collector.nodeid}/{name} was not collected. {conftest.__doc__}"
            skip = pytest.CollectReport(f"{collector.nodeid}/{name}", "skipped", (str(collector.path), 0, reason), [])
            collector.ihook.pytest_collectreport(report=skip)
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ")
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = Counter(
        (outcome, _reason(report))
        for outcome in ("skipped", "xfailed", "xpassed")
        for report in terminalreporter.stats.get(outcome, [])
    )
    for (outcome, reason), count in counts.most_common():
        terminalreporter.write_line(f"{outcome} {count}: {reason or 'no reason given'}")
