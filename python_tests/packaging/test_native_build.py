"""TFOPS_NATIVE=ON configures a build for this machine alone: its best instruction set, and the GPUs that it has."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path

import pybind11
import pytest

import tfops_kernels
from tfops_testing import building
from tfops_testing.paths import ROOT

pytestmark = pytest.mark.source_tree


def _configure(folder: Path, gpus: str) -> dict[str, str]:
    """What CMake says of the build and writes into _build.py, with an nvidia-smi that lists these capabilities."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
    (tools / "nvidia-smi").chmod(0o755)
    definitions = {
        "SKBUILD_PROJECT_VERSION": "1.0",
        "TFOPS_NATIVE": "ON",
        "TFOPS_TENSORFLOW": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_MAKE_PROGRAM": building.tool("ninja"),
    }
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    said = building.run(
        *(building.tool("cmake"), "-S", ROOT, "-B", folder / "build", "-G", "Ninja"),
        *(f"-D{name}={value}" for name, value in definitions.items()),
        env={**os.environ, "PATH": path},
    )
    built: dict[str, str] = {"said": said}
    exec((folder / "build" / "_build.py").read_text(), built)
    built["commands"] = (folder / "build" / "build.ninja").read_text()
    return built


def test_native_build_has_the_best_instruction_set_alone(tmp_path):
    built = _configure(tmp_path, gpus="")
    assert built["NATIVE"] is True
    if platform.machine() == "x86_64":
        assert built["CPU_INSTRUCTION_SETS"] == _supported()[-1]
    assert "CUDA kernels: none" in built["said"]
    assert "cuda/unavailable.cc" in built["commands"]


def _supported() -> list[str]:
    """The levels of this machine by the flags that Linux lists."""
    flags = set(
        next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    )
    levels = {
        "x86-64-v2": {"sse4_2"},
        "x86-64-v3": {"avx2", "fma", "bmi1", "bmi2", "f16c"},
        "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    }
    supported = []
    for level, needed in levels.items():
        if not needed <= flags:
            break
        supported.append(level)
    return supported


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_native_build_is_for_the_gpus_that_are_there(tmp_path):
    built = _configure(tmp_path, gpus="9.0\\n7.0\\n8.6\\n9.0\\n")
    wanted = {"arch=compute_90,code=sm_90", "arch=compute_80,code=sm_86"}
    options = {word.partition("-gencode=")[2] for word in built["commands"].split() if word.startswith("-gencode=")}
    assert options == wanted
    assert re.search(r"CUDA kernels: nvcc \S+ for 90-real;86-real\n", built["said"])


def test_gpus_that_are_too_old_mean_no_cuda(tmp_path):
    built = _configure(tmp_path, gpus="7.0\\n")
    assert "nvidia-smi lists no GPU of compute capability 7.5 or later" in " ".join(built["said"].split())


def test_this_build_says_what_it_is_for():
    info = tfops_kernels.build_info()
    assert info["native"] or info["cpu_instruction_sets"] in ("x86-64-v2 x86-64-v3 x86-64-v4", "generic")
