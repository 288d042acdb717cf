"""What `make compat` counts as passed."""

from __future__ import annotations

import pytest

from tfops_testing.paths import TESTS

pytestmark = pytest.mark.source_tree

GOOD = {
    "tensorflow": "2.21.0",
    "keras": "3.15.1",
    "numpy": "2.4.6",
    "python": "3.11.7",
    "jit_compile": "yes",
    "gradcheck": "passed",
    "tests": "10 passed, 2 skipped",
}


@pytest.fixture(scope="module")
def compat():
    from tfops_testing import compat

    return compat


@pytest.mark.parametrize(
    "changes",
    [
        {"gradcheck": "failed"},
        {"jit_compile": "no"},  # although that TensorFlow has the interface
        {"tensorflow": "2.19.1"},  # which has none
        {"tests": "9 passed, 2 skipped, 1 failed"},
        {"tests": "0 passed, 12 skipped"},
        {"tests": "pytest ended without a report"},
    ],
    ids=str,
)
def test_what_is_not_passed(compat, changes):
    assert compat.Row(**GOOD).passed
    assert compat.Row(**GOOD | {"tensorflow": "2.18.1", "jit_compile": "no"}).passed
    assert not compat.Row(**GOOD | changes).passed


def test_reports_are_counted(compat, tmp_path):
    report = tmp_path / "report.xml"
    suite = '<testsuite errors="{}" failures="{}" skipped="2" tests="12" />'
    for errors, failures, want in ((0, 0, "10 passed, 2 skipped"), (1, 2, "7 passed, 2 skipped, 3 failed")):
        report.write_text(f"<testsuites>{suite.format(errors, failures)}</testsuites>")
        assert compat.count(report) == want


def test_all_that_it_runs_exists(compat):
    assert not [test for test in compat.TESTS if not (TESTS / test).exists()]
