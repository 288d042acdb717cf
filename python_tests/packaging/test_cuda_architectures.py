"""cmake/CudaArchitectures.cmake: which GPUs a build is for, by what its nvcc knows."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tfops_testing import building
from tfops_testing.paths import ROOT

pytestmark = pytest.mark.source_tree

# What each nvcc lists, with architectures for one GPU alone (a) and for a family (f) as well.
CUDA_12_2 = ["50", "52", "53", "60", "61", "62", "70", "72", "75", "80", "86", "87", "89", "90", "90a"]
CUDA_12_8 = [*CUDA_12_2, "100", "100a", "101", "101a", "120", "120a"]
CUDA_12_9 = [*CUDA_12_8, "100f", "101f", "103", "103a", "103f", "120f", "121", "121a", "121f"]
CUDA_13_0 = ["75", "80", "86", "87", "88", "89", "90", "90a", "100", "110", "110f", "103", "120", "120f", "121"]

ALL_12_2 = ["70-real", "75-real", "80-real", "86-real", "89-real", "90-real"]
ALL_13_0 = [*ALL_12_2[1:], "100-real", "110-real", "120-real", "100-virtual"]


def _targets(folder: Path, known: list[str], gpus: str = "") -> tuple[str, list[str], list[str]]:
    """The least compute capability, nvcc's options and the architectures, for an nvcc that knows these."""
    nvcc, script = folder / "nvcc", folder / "script.cmake"
    codes, architectures = (r"\n".join(f"{kind}_{one}" for one in known) for kind in ("sm", "compute"))
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in\n--list-gpu-code) printf '{codes}\n';;\n*) printf '{architectures}\n';;\nesac"
    )
    nvcc.chmod(0o755)
    script.write_text(
        "cmake_minimum_required(VERSION 3.26)\n"
        f"include({ROOT}/cmake/CudaArchitectures.cmake)\n"
        f"tfops_cuda_architectures({nvcc} {gpus})\n"
        'message(STATUS "${TFOPS_CUDA_LEAST}|${TFOPS_CUDA_OPTIONS}|${TFOPS_CUDA_ARCHITECTURES}")\n'
    )
    said = building.run(building.tool("cmake"), "-P", script)
    least, options, architectures = said.removeprefix("-- ").strip().split("|")
    return least, options.split(";") if options else [], architectures.split(";") if architectures else []


def _options(pairs: str) -> list[str]:
    return [f"-gencode=arch=compute_{virtual},code={code}" for virtual, code in (p.split(":") for p in pairs.split())]


def test_cuda_13_compiles_for_turing_and_later(tmp_path):
    least, options, architectures = _targets(tmp_path, CUDA_13_0)
    assert least == "7.5"
    machine_code = "75:sm_75 80:sm_80 80:sm_86 80:sm_89 90:sm_90 100:sm_100 100:sm_110 100:sm_120"
    assert options == _options(f"{machine_code} 100:compute_100")
    assert architectures == ALL_13_0


@pytest.mark.parametrize(
    ("known", "newest", "architectures"),
    [
        (CUDA_12_2, "90:compute_90", [*ALL_12_2, "90-virtual"]),
        (CUDA_12_8, "100:sm_100 100:sm_120 100:compute_100", [*ALL_12_2, "100-real", "120-real", "100-virtual"]),
        (CUDA_12_9, "100:sm_100 100:sm_120 100:compute_100", [*ALL_12_2, "100-real", "120-real", "100-virtual"]),
    ],
    ids=["12.2", "12.8", "12.9"],
)
def test_cuda_12_compiles_for_volta_and_for_the_newest_that_it_knows(tmp_path, known, newest, architectures):
    least, options, found = _targets(tmp_path, known)
    assert least == "7.0"
    quiet, *options = options
    assert quiet == "-Wno-deprecated-gpu-targets"
    assert options == _options(f"70:sm_70 75:sm_75 80:sm_80 80:sm_86 80:sm_89 90:sm_90 {newest}")
    assert found == architectures


@pytest.mark.parametrize(
    ("known", "gpus", "architectures"),
    [
        (CUDA_12_2, "90 86", ["90-real", "86-real"]),
        (CUDA_12_2, "70", ["70-real"]),
        (CUDA_12_2, "61 72 87", ["72-real", "87-real"]),  # older than the kernels; Jetsons
        (CUDA_12_2, "120 100", ["90-virtual"]),  # newer than nvcc
        (CUDA_12_2, "88 120", ["80-virtual", "90-virtual"]),  # 8.8 does not run code of 9.0
        (CUDA_13_0, "70 75", ["75-real"]),
        (CUDA_13_0, "130", ["100-virtual"]),
        (CUDA_13_0, "70 61", []),
        ([], "90", []),
    ],
    ids=str,
)
def test_gpus_that_are_named(tmp_path, known, gpus, architectures):
    _, options, found = _targets(tmp_path, known, gpus)
    assert found == architectures
    assert len([each for each in options if each.startswith("-gencode")]) == len(architectures)


def _refusal(folder: Path, nvcc: str | Path | None, **definitions: str) -> str:
    """What CMake says of a build with that nvcc, or with none, which it must refuse."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDAHOSTCXX")}
    environment |= {"CUDACXX": str(nvcc)} if nvcc else {}
    with pytest.raises(AssertionError) as error:
        building.configure(folder / "build", environment, TFOPS_TENSORFLOW="OFF", TFOPS_JAX="OFF", **definitions)
    return " ".join(str(error.value).split())


def _program(folder: Path, script: str) -> Path:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize("setting", ["AUTO", "ON"])
def test_nvcc_that_does_not_work_is_named_with_what_it_said(tmp_path, setting):
    said = _refusal(tmp_path, "/nowhere/nvcc", TFOPS_CUDA=setting)
    assert re.search(r"nvcc does not work: /nowhere/nvcc compiles no kernel \(no such file", said, re.IGNORECASE), said
    nvcc = _program(tmp_path, "echo '#error -- unsupported GNU version!' >&2; exit 1")
    said = _refusal(tmp_path, nvcc, TFOPS_CUDA=setting)
    assert f"nvcc does not work: {nvcc} compiles no kernel (1)." in said
    assert "CUDAHOSTCXX, or set TFOPS_CUDA=OFF. It said: #error -- unsupported GNU version!" in said


def test_nvcc_is_tried_as_it_will_be_called(tmp_path, monkeypatch):
    """With the flags and the host compiler that were named."""
    nvcc = _program(tmp_path, 'echo "given $*"; exit 1')
    assert "given -ccbin g++-9 -c " in _refusal(tmp_path, nvcc, CMAKE_CUDA_HOST_COMPILER="g++-9")
    monkeypatch.setenv("CUDAFLAGS", "-allow-unsupported-compiler -O1")
    assert "given -allow-unsupported-compiler -O1 -c " in _refusal(tmp_path / "again", nvcc)


def test_nvcc_that_lists_no_gpu_is_refused(tmp_path):
    nvcc = _program(tmp_path, "exit 0")
    assert f"{nvcc} --list-gpu-code lists no GPU of compute capability 7.0 or later" in _refusal(tmp_path, nvcc)


def test_missing_nvcc_is_refused_where_cuda_is_asked_for(tmp_path):
    if any((Path(folder) / "nvidia" / "cu13" / "bin" / "nvcc").exists() for folder in sys.path):
        pytest.skip("nvcc is installed beside this Python")
    nowhere = {"CMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH": "OFF", "CMAKE_FIND_USE_CMAKE_SYSTEM_PATH": "OFF"}
    tools = {name: shutil.which(program) for name, program in (("CMAKE_CXX_COMPILER", "c++"), ("CMAKE_AR", "ar"))}
    said = _refusal(tmp_path, None, TFOPS_CUDA="ON", **nowhere, **tools)
    assert "TFOPS_CUDA=ON, but no nvcc was found: set CUDACXX, or put nvcc on PATH" in said
