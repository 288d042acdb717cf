"""The tests' own plugins: exclusive tests run alone under pytest-xdist, and skips are told by reason."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from tfops_testing import requirements
from tfops_testing.fresh_process import run_python

CONFTEST = 'pytest_plugins = ["tfops_testing.exclusive", "tfops_testing.skips"]\n'

# Each test writes when it began and ended, setup and teardown included.
SUITE = """
import os, time
import importlib.metadata
from pathlib import Path
import pytest

TIMES = Path(os.environ["TIMES"])

@pytest.fixture(autouse=True)
def timed(request):
    begin = time.monotonic()
    time.sleep(0.02)
    yield
    time.sleep(0.02)
    name = request.node.name.partition("[")[0]
    (TIMES / f"{time.monotonic_ns()}_{os.getpid()}").write_text(f"{name} {begin} {time.monotonic()}")

@pytest.mark.parametrize("i", range(12))
def test_ordinary(i):
    time.sleep(0.05)

@pytest.mark.exclusive
@pytest.mark.parametrize("i", range(6))
def test_exclusive(i):
    time.sleep(0.05)

@pytest.mark.parametrize("i", range(12))
def test_ordinary_too(i):
    time.sleep(0.05)
"""


def _run(folder: Path, suite: str, *arguments: str):
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (folder / "test_suite.py").write_text(suite)
    (folder / "times").mkdir()
    arguments = ("-p", "no:cacheprovider", "-q", *arguments, str(folder))
    return run_python("-m", "pytest", *arguments, TIMES=str(folder / "times"))


def test_nothing_runs_beside_an_exclusive_test(tmp_path):
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    run = _run(tmp_path, SUITE, "-n", "3")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [path.read_text().split() for path in (tmp_path / "times").iterdir()]
    spans = [(name == "test_exclusive", float(begin), float(end)) for name, begin, end in lines]
    assert len(spans) == 30
    overlaps = [
        one[0] or other[0]
        for i, one in enumerate(spans)
        for other in spans[:i]
        if one[1] < other[2] and other[1] < one[2]
    ]
    assert overlaps, "nothing ran beside anything"
    assert not any(overlaps)


@pytest.mark.parametrize("workers", [0, 2])
def test_skips_are_told_by_reason(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist", reason="needs pytest-xdist")
    suite = """
import pytest

@pytest.mark.skip(reason="no luck")
@pytest.mark.parametrize("i", range(5))
def test_marked(i):
    pass

def test_skips():
    pytest.skip("no time")

@pytest.mark.xfail(reason="to be mended")
def test_fails():
    assert False
"""
    run = _run(tmp_path, suite, *(["-n", str(workers)] if workers else []))
    told = [line for line in run.stdout.splitlines() if line.startswith(("skipped ", "xfailed "))]
    assert sorted(told) == ["skipped 1: no time", "skipped 5: no luck", "xfailed 1: to be mended"], run.stdout


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_not_collected_is_told(tmp_path, workers):
    """A folder, or a file, and why."""
    if workers:
        pytest.importorskip("xdist", reason="needs pytest-xdist")
    ignored = {
        "one": 'collect_ignore_glob = ["*"]',
        "two": 'collect_ignore = ["test_a.py"]',
        "three": "collect_ignore = []",
    }
    for name, ignores in ignored.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "conftest.py").write_text(f'"""They need {name}."""\n{ignores}\n')
        for file in ("a", "b"):
            (tmp_path / name / f"test_{file}.py").write_text("def test_passes(): pass\n")
    run = _run(tmp_path, "", "--import-mode=importlib", *(["-n", str(workers)] if workers else []))
    told = [line for line in run.stdout.splitlines() if line.startswith("skipped ")]
    what = ("one/* was not collected. They need one.", "two/test_a.py was not collected. They need two.")
    assert sorted(told) == [f"skipped 1: {each}" for each in what], run.stdout
    assert "3 passed" in run.stdout


CHOICES = """
import pytest

@pytest.mark.parametrize("i", range(9))
def test_quick(i):
    pass

@pytest.mark.slow
def test_slow():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "outcome"),
    [
        ((), "9 passed, 1 skipped"),
        (("--slow",), "10 passed"),
        (("-m", "slow"), "1 passed, 9 deselected"),
        (("--every=4",), "3 passed, 7 deselected"),
        (("--every=4", "-k", "3 or 4 or 5 or 6 or 7"), "2 passed, 8 deselected"),
        (("--every=0",), "--every must be at least 1, not 0"),
    ],
)
def test_slow_tests_and_samples_are_chosen(tmp_path, arguments, outcome):
    run = _run(tmp_path, CHOICES, *arguments)
    assert outcome in run.stdout + run.stderr


def test_keras_of_another_package_is_found(monkeypatch):
    """keras-nightly, which holds the package `keras` too, instead of keras."""
    if not requirements.has_tensorflow():
        pytest.skip("needs TensorFlow")
    versions = {"keras-nightly": "3.99.0.dev2026010103"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"keras": ["keras-nightly"]})
    assert requirements.has_keras("3.99")
    assert not requirements.has_keras("3.100")
