"""The code is formatted and lints clean; versions that are written down in several places agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tfops_testing import building
from tfops_testing.paths import ROOT

pytestmark = pytest.mark.source_tree


def _tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}")
    return found


def _run(*command: str | Path) -> None:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_python_is_linted_and_formatted():
    ruff = _tool("ruff")
    _run(ruff, "check", ".")
    _run(ruff, "format", "--check", ".")


def test_cpp_is_formatted():
    files = [path for suffix in ("h", "cc", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    assert files
    _run(_tool("clang-format"), "--dry-run", "--Werror", *files)


def test_no_file_is_too_long():
    for folder in ("csrc", "tfops", "python_tests", "models", "cmake"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".h", ".cc", ".cu", ".cuh", ".cmake"):
                assert len(path.read_text().splitlines()) <= 500, path


def test_tensorflow_releases_are_the_same_everywhere(tmp_path):
    releases = [*building.load(ROOT / "cmake" / "tensorflow_packages.py").RELEASES]
    major, minor = releases[-1].split(".")
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r'"(tensorflow\S*?)(>=[^";]+)', project[project.index("[project.optional-dependencies]") :])
    assert {name for name, _ in extras} == {"tensorflow", "tensorflow-cpu", "tensorflow[and-cuda]"}
    assert {bounds for _, bounds in extras} == {f">={releases[0]},<{major}.{int(minor) + 1}"}
    cmake = (ROOT / "cmake" / "TensorFlow.cmake").read_text()
    assert re.findall(r"VERSION_LESS (\d+\.\d+)", cmake) == [releases[0]]
    make = ["make", "--dry-run", f"PYTHON={sys.executable}", f"VENV={tmp_path}", f"{tmp_path}/.environment"]
    dry = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"'tensorflow\S*~=(\S+)'", dry) == [f"{releases[-1]}.0"]


def test_documentation_names_the_releases_of_tensorflow():
    """All of them, one of them, or the newest, wherever a later one will have to be named."""
    releases = [*building.load(ROOT / "cmake" / "tensorflow_packages.py").RELEASES]
    kinds = {
        r"\b(2\.\d\d) to (?=2\.\d\d\b)": releases[:1],
        r"\b2\.\d\d to (2\.\d\d)\b": releases[-1:],
        r"_tfops_(?:ops|xla)-([\d.]+)\.so": releases[-1:],
        r"tensorflow\S*[=~]=(\d+\.\d+)": releases[-1:],
        r"beside TensorFlow (\d+\.\d+)\b(?! or)": releases[-1:],
        r"another release than (\d+\.\d+)": releases[-1:],
        r"TFOPS_TENSORFLOW=(\d+\.\d+)": releases,
    }
    files = [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md")),
    ]
    texts = {file: " ".join(file.read_text().split()) for file in files}
    for kind, right in kinds.items():
        found = [(file, release) for file, text in texts.items() for release in re.findall(kind, text)]
        assert found, kind
        assert not [(str(file), kind, release) for file, release in found if release not in right]
