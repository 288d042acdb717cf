"""Tests one wheel with every TensorFlow that it is for, each in an environment of its own, and prints a table.

    make compat ARGS="--only 2.18 --pytest ARGS"

An environment is as a user would have it: TensorFlow and Keras first, and then `pip install` of the wheel, which must
leave all that is there as it is. With the oldest TensorFlow, the oldest Keras and NumPy are tried as well. A release
without wheels for this Python is left out.

As a program it needs no package of tests, and runs where no TensorFlow is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "cmake"))
import tensorflow_packages  # noqa: E402

TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
FOLDER = ROOT / "build" / "compat" / TAG
OLDEST = ["keras==3.5.0", "numpy==1.26.*"]  # which go with the oldest TensorFlow
# The op, its gradients, modes and transformations; the Keras layer, saving and conversion; without what takes long.
TESTS = [
    "ops/test_activations.py",
    "ops/test_gradcheck.py",
    "ops/test_gradients.py",
    "ops/test_in_place.py",
    "ops/test_op.py",
    "ops/test_saving.py",
    "ops/test_signature.py",
    "ops/test_transformations.py",
    "ops/test_virtual_batches.py",
    "ops/test_xla.py",
    "keras/test_compiling.py",
    "keras/test_convert_graphs.py",
    "keras/test_fold.py",
    "keras/test_in_place.py",
    "keras/test_layer.py",
    "keras/test_modes.py",
    "keras/test_saved_activations.py",
    "keras/test_saving.py",
    "keras/test_virtual_batches.py",
]
PASSED = re.compile(r"[1-9]\d* passed, \d+ skipped")
VERSIONS = """
import json, importlib.metadata, platform, sys
packages = importlib.metadata.packages_distributions()
versions = [importlib.metadata.version(packages[name][0]) for name in ("tensorflow", "keras", "numpy")]
print(json.dumps([*versions, platform.python_version()]))
"""
JIT = "import tfops; print('yes' if tfops.build_info()['xla'] else 'no')"


class Row(NamedTuple):
    """What came of one environment: a line of the table."""

    tensorflow: str
    keras: str
    numpy: str
    python: str
    jit_compile: str
    gradcheck: str
    tests: str

    @property
    def passed(self) -> bool:
        jit = "yes" if self.has_xla else "no"
        return self.gradcheck == "passed" and self.jit_compile == jit and PASSED.fullmatch(self.tests) is not None

    @property
    def has_xla(self) -> bool:
        """Whether that TensorFlow has an interface for such kernels."""
        return tuple(map(int, self.tensorflow.split(".")[:2])) >= (2, 20)


def environments(only: list[str]) -> dict[str, list[str]]:
    """The requirements of each, by its name."""
    wanted: dict[str, list[str]] = {}
    for release, newest_python in tensorflow_packages.RELEASES.items():
        if sys.version_info[:2] <= tuple(map(int, newest_python.split("."))):
            requirement = f"{tensorflow_packages.name()}=={release}.*"
            if not wanted:
                wanted[f"{release}-oldest"] = [requirement, *OLDEST]
            wanted[release] = [requirement]
    return {name: requirements for name, requirements in wanted.items() if not only or name in only}


def install(name: str, requirements: list[str], wheel: Path) -> Path:
    """The Python of the environment, with the wheel in it. Raises RuntimeError if that changed what was there."""
    python = FOLDER / name / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / name], check=True)
    subprocess.run([*pip, "install", "--upgrade", *requirements], check=True)
    subprocess.run([*pip, "uninstall", "--yes", "tfops"], check=True)

    def installed() -> set[str]:
        return set(subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout.splitlines())

    before = installed()
    subprocess.run([*pip, "install", wheel], check=True)
    if changed := {line for line in before ^ installed() if not line.startswith("tfops ")}:
        raise RuntimeError(f"installing {wheel.name} changed what was installed: {', '.join(sorted(changed))}")
    subprocess.run([*pip, "install", "pytest", "pytest-xdist"], check=True)
    return python


def run(name: str, python: Path, arguments: list[str]) -> Row:
    """Runs `python -m tfops.gradcheck` and the tests in the environment."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}

    def output(*command: str) -> str:
        options = {"capture_output": True, "text": True, "cwd": FOLDER, "env": environment}
        return subprocess.run([python, *command], check=True, **options).stdout

    tensorflow, keras, numpy, running = json.loads(output("-c", VERSIONS))
    jit = output("-c", JIT).strip()
    checked = subprocess.run([python, "-m", "tfops.gradcheck"], cwd=FOLDER, env=environment, check=False)
    report = FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-n", "auto", "--dist=worksteal", f"--junitxml={report}", "-p", "no:cacheprovider", *arguments]
    tests = [ROOT / "python_tests" / test for test in TESTS]
    command = [python.with_name("pytest"), *options, *tests]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    counts = count(report) if report.exists() else "pytest ended without a report"
    gradcheck = "passed" if checked.returncode == 0 else "failed"
    return Row(tensorflow, keras, numpy, running, jit, gradcheck, counts)


def count(report: Path) -> str:
    """What came of the tests, from pytest's report in JUnit's format."""
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    ran, skipped, failed, errors = (int(suite.get(key, 0)) for key in ("tests", "skipped", "failures", "errors"))
    failed += errors
    return f"{ran - skipped - failed} passed, {skipped} skipped" + (f", {failed} failed" if failed else "")


def table(rows: list[Row], wheel: Path) -> str:
    """In Markdown, with what was tested, when and where."""
    header = ["TensorFlow", "Keras", "NumPy", "Python", "`jit_compile`", "`tfops.gradcheck`", "tests"]
    lines = [f"`{wheel.name}` on {platform.machine()}, {time.strftime('%-d %B %Y')}:", ""]
    for cells in (header, ["---"] * len(header), *rows):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="by default that of build/dist")
    parser.add_argument("--only", nargs="+", default=[], choices=environments([]), help="some of the environments")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="arguments for pytest")
    arguments = parser.parse_args()
    wheels = [arguments.wheel] if arguments.wheel else list((ROOT / "build" / "dist").glob(f"*-{TAG}-*.whl"))
    if len(wheels) != 1 or not wheels[0].exists():
        parser.error(f"--wheel: there is not one wheel for {TAG}, but {[str(wheel) for wheel in wheels]}: make dist")
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, requirements in environments(arguments.only).items():
        print(f"==> {name}", flush=True)
        rows.append(run(name, install(name, requirements, wheels[0].resolve()), arguments.pytest))
    print(f"\n{table(rows, wheels[0])}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
