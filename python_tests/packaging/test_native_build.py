"""TFOPS_NATIVE=ON configures a build for this machine alone: its best instruction set, and the GPUs that it has."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import pytest

import tfops_kernels
from tfops_testing import building
from tfops_testing.requirements import needs_cuda_build

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


@needs_cuda_build
@pytest.mark.parametrize(
    ("gpus", "options", "architectures"),
    [
        ("9.0\\n6.1\\n8.6\\n9.0\\n", "compute_80,code=sm_86 compute_90,code=sm_90", "90-real;86-real"),
        ("99.0\\n", r"compute_(\d+),code=compute_\1", r"\d+-virtual"),  # newer than nvcc: by PTX
    ],
)
def test_native_build_is_for_the_gpus_that_are_there(tmp_path, gpus, options, architectures):
    built = _configure(tmp_path, gpus)
    asked = {word.removeprefix("-gencode=arch=") for word in built["commands"].split() if word.startswith("-gencode=")}
    assert re.fullmatch(options, " ".join(sorted(asked)))
    assert re.search(rf"CUDA kernels: nvcc \S+ for {architectures}\n", built["said"])


@pytest.mark.parametrize(
    ("printed", "status"),
    [
        pytest.param("6.1\\n", 0, marks=needs_cuda_build),  # older than nvcc knows, or the kernels
        ("", 0),
        ("Failed to initialize NVML: Driver/library version mismatch\\nNVML library version: 535.183\\n", 18),
    ],
)
def test_without_a_gpu_that_can_be_used_there_is_no_cuda(tmp_path, printed, status):
    built = _configure(tmp_path, printed, status)
    too_old = r" of compute capability 7\.[05] or later, which \S+ compiles for" if printed == "6.1\\n" else ""
    assert re.search(rf"CUDA kernels: none, .* nvidia-smi lists no GPU{too_old}\n", built["said"])


def test_this_build_says_what_it_is_for():
    info = tfops_kernels.build_info()
    assert info["native"] or info["cpu_instruction_sets"] in ("x86-64-v2 x86-64-v3 x86-64-v4", "neon", "generic")
