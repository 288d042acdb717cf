"""The unit tests of csrc/tests: what is plain C++, compiled without the kernels. One test here for each there."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "tests"
BUILD = ROOT / "build" / "cpp_tests"

if not SOURCES.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

NAMES = [
    name
    for path in sorted(SOURCES.glob("*_test.cc"))
    for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.MULTILINE)
]


def _tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise RuntimeError(f"csrc/tests needs {name} to be built: pip install {name}")
    return found


def _run(*command: str | Path) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}"
    return run.stdout


@pytest.fixture(scope="session")
def program() -> Path:
    """Built, or what of it is out of date."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "build.ninja").exists():
            _run(_tool("cmake"), "-S", SOURCES, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}")
        _run(_tool("ninja"), "-C", BUILD)
    return BUILD / "tests"


def test_all_tests_are_known(program):
    assert sorted(_run(program, "--list").split()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cpp(program, name):
    _run(program, name)
