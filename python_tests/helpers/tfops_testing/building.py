"""Builds the CMake projects of csrc that tests alone need. They are kept in build/, and what changed is built again."""

from __future__ import annotations

import fcntl
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from .paths import ROOT


def run(*command: str | Path, timeout: float = 1800, env: dict[str, str] | None = None) -> str:
    """The output of a command. Raises AssertionError, with the output, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=env)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def tool(name: str) -> str:
    """The path of a program, of this environment if that has it."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        raise RuntimeError(f"to build this, the tests need {name}: pip install {name}")
    return found


def load(file: Path) -> ModuleType:
    """A module of the build, such as cmake/build_backend.py, from its file."""
    sys.path.insert(0, str(file.parent))  # as pip has it, by backend-path
    try:
        return importlib.import_module(file.stem)
    finally:
        sys.path.remove(str(file.parent))


def configure(folder: Path, env: dict[str, str] | None = None, **definitions: str | Path) -> str:
    """Configures the project in `folder`, as for a wheel, with these definitions; returns what CMake says."""
    import pybind11

    definitions = {
        "SKBUILD_PROJECT_VERSION": "1.0",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        **definitions,
    }
    options = (f"-D{name}={value}" for name, value in definitions.items())
    return run(tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *options, env=env)


def build(source: Path, folder: Path, *options: str) -> None:
    """Builds the project in `source`, or what of it is out of date, in `folder`. One process at a time does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]
        if ccache := shutil.which("ccache"):
            settings.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
        configured = folder / ".settings"  # of the environment that built it last
        if not configured.exists() or configured.read_text() != "\n".join(settings):
            (folder / "CMakeCache.txt").unlink(missing_ok=True)
            run(tool("cmake"), "-S", source, "-B", folder, "-G", "Ninja", *settings)
            configured.write_text("\n".join(settings))
        run(tool("ninja"), "-C", folder)
