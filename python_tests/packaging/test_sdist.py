"""The source distribution holds all that git does, and can be built, tested and worked on without git."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tfops_testing import building
from tfops_testing.paths import ROOT

pytest.importorskip("scikit_build_core", reason="needs scikit-build-core")
pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
pytestmark = pytest.mark.source_tree

# What the program says, the backend's own output aside, is the name of the file.
BUILD = """
import contextlib, sys
sys.path.insert(0, "cmake")
import build_backend
with contextlib.redirect_stdout(sys.stderr):
    name = build_backend.build_sdist(sys.argv[1])
print(name)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in a source distribution that was built as pip and `build` do it."""
    folder = tmp_path_factory.mktemp("sdist")
    run = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    name = run.stdout.strip()
    shutil.unpack_archive(folder / name, folder)
    return folder / name.removesuffix(".tar.gz")


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_what_git_does(unpacked):
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to compare with")
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    tracked = {name for name in listed if name and (ROOT / name).is_file()}
    assert {"python_tests/conftest.py", ".pre-commit-config.yaml", "Makefile", "LICENSE"} <= tracked
    assert _files(unpacked) == tracked | {"PKG-INFO"}


def test_it_has_nothing_that_was_built(unpacked):
    names = _files(unpacked)
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", ".whl", ".gz"))]
    assert not [name for name in names if name.split("/")[0] in ("build", "dist", ".venv", ".git")]
    assert sum((unpacked / name).stat().st_size for name in names) < 20e6


def test_it_is_configured_and_made_without_git(unpacked, tmp_path):
    """Also within a checkout of something else, of which git would list no file of ours."""
    environment = {**os.environ, "GIT_DIR": os.devnull}
    rules = building.run("make", "-C", unpacked, "-np", "build/wheel/.built", env=environment).splitlines()
    (rule,) = (line.split() for line in rules if line.startswith("build/wheel/.built:"))
    assert {"CMakeLists.txt", "csrc/batch_norm/batch_norm.h", "tfops/__init__.py", "pyproject.toml"} <= set(rule)
    settings = {
        "SKBUILD_PROJECT_VERSION": "1.0",
        "TFOPS_CUDA": "OFF",
        "TFOPS_TENSORFLOW": "OFF",
        "TFOPS_NATIVE": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_MAKE_PROGRAM": building.tool("ninja"),
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    building.run(building.tool("cmake"), "-S", unpacked, "-B", tmp_path, "-G", "Ninja", *options, env=environment)
    # Ninja fails here if a source is missing.
    assert "libtfops_kernels.so" in building.run(building.tool("ninja"), "-C", tmp_path, "-n", env=environment)
