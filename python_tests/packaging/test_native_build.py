"""TFOPS_NATIVE=ON configures a build for this machine alone: its best instruction set, and the GPUs that it has."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import pytest

import tfops_kernels
from tfops_testing import building

pytest.importorskip("pybind11")
pytestmark = pytest.mark.source_tree


def _configure(folder: Path, gpus: str, status: int = 0) -> dict[str, str]:
    """What CMake says of the build and writes into _build.py, with an nvidia-smi that prints this."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{gpus}'\nexit {status}\n")
    (tools / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(tools), os.environ["PATH"]])}
    said = building.configure(folder / "build", environment, TFOPS_NATIVE="ON", TFOPS_TENSORFLOW="OFF")
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


@pytest.mark.skipif(not tfops_kernels.build_info()["cuda"], reason="this build has no CUDA kernels")
@pytest.mark.parametrize(
    ("gpus", "options", "architectures"),
    [
        ("9.0\\n7.0\\n8.6\\n9.0\\n", ["compute_90,code=sm_90", "compute_80,code=sm_86"], "90-real;86-real"),
        ("99.0\\n", ["compute_100,code=compute_100"], "100-virtual"),  # newer than nvcc: by PTX
    ],
)
def test_native_build_is_for_the_gpus_that_are_there(tmp_path, gpus, options, architectures):
    built = _configure(tmp_path, gpus)
    asked = {word.partition("-gencode=")[2] for word in built["commands"].split() if word.startswith("-gencode=")}
    assert asked == {f"arch={option}" for option in options}
    assert re.search(rf"CUDA kernels: nvcc \S+ for {architectures}\n", built["said"])


@pytest.mark.parametrize(
    ("printed", "status"),
    [
        ("7.0\\n", 0),
        ("Failed to initialize NVML: Driver/library version mismatch\\nNVML library version: 535.183\\n", 18),
    ],
)
def test_without_a_gpu_that_can_be_used_there_is_no_cuda(tmp_path, printed, status):
    built = _configure(tmp_path, printed, status)
    assert "nvidia-smi lists no GPU of compute capability 7.5 or later" in " ".join(built["said"].split())


def test_this_build_says_what_it_is_for():
    info = tfops_kernels.build_info()
    assert info["native"] or info["cpu_instruction_sets"] in ("x86-64-v2 x86-64-v3 x86-64-v4", "generic")
