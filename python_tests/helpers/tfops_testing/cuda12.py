"""Compiles the CUDA sources against CUDA 12: with Clang, for PyPI has no nvcc 12, but it has its headers and its ptxas.

What Clang makes of the kernels is not what nvcc makes of them. It shows that the sources use nothing that CUDA 12
lacks, and that ptxas assembles them for GPUs that CUDA 13 has dropped.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import building
from .paths import ROOT

BUILD = ROOT / "build" / "cuda12"
SOURCES = sorted((ROOT / "csrc" / "batch_norm" / "cuda").glob("*.cu"))

# The least that tfops is built with, and the newest. (CCCL 12.2's package lacks a header: that of 12.3 is the next.)
PACKAGES = {
    "12.2": ("cuda-runtime-cu12==12.2.140", "cuda-nvcc-cu12==12.2.140", "cuda-cccl-cu12==12.3.101.post1"),
    "12.9": ("cuda-runtime-cu12==12.9.79", "cuda-nvcc-cu12==12.9.86", "cuda-cccl-cu12==12.9.27"),
}
LEAST_CLANG = 16

# What Clang lacks of CUDA's functions. As plain accesses, for they differ in nothing else but a hint to the cache.
# Before the C++ library's <memory>, which has an attribute of the name of CUDA's macro.
MISSING = """\
#pragma push_macro("__noinline__")
#undef __noinline__
#include <memory>
#pragma pop_macro("__noinline__")
template <typename Word>
__attribute__((device)) inline Word __ldcs(const Word* address) { return *address; }
template <typename Word>
__attribute__((device)) inline void __stcs(Word* address, Word value) { *address = value; }
"""


def clang() -> str:
    """The Clang to compile with. Skips the test if there is none."""
    for name in ("clang++", *(f"clang++-{version}" for version in range(LEAST_CLANG, 30))):
        if found := shutil.which(name):
            version = re.search(r"clang version (\d+)", building.run(found, "--version"))
            if version and int(version[1]) >= LEAST_CLANG:
                return found
    pytest.skip(f"needs Clang {LEAST_CLANG} or later, to compile against CUDA 12: apt-get install clang-{LEAST_CLANG}")


def toolkit(version: str) -> Path:
    """CUDA 12 as Clang wants it in one folder, from PyPI. Skips the test if there is none to be had."""
    home, packages = BUILD / version, BUILD / f"{version}-packages"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = home / ".packages"
        wanted = "\n".join([*PACKAGES[version], MISSING])
        if complete.exists() and complete.read_text() == wanted:
            return home
        for folder in (home, packages):
            shutil.rmtree(folder, ignore_errors=True)
        # Not into this environment, where they could clash with TensorFlow's.
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--target",
            str(packages),
        ]
        done = subprocess.run(
            [*pip, *(f"nvidia-{name}" for name in PACKAGES[version])], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs NVIDIA's packages of CUDA {version} from PyPI: {done.stderr.strip().splitlines()[-1]}")
        for package in (packages / "nvidia").glob("cuda_*"):
            ignored = shutil.ignore_patterns("__init__.py")
            shutil.copytree(package, home, dirs_exist_ok=True, ignore=ignored, copy_function=os.link)
        # Clang includes it wherever it compiles CUDA; it is of cuRAND, which is large, and which nothing here uses.
        (home / "include" / "curand_mtgp32_kernel.h").touch()
        (home / "missing.h").write_text(MISSING)
        shutil.rmtree(packages)
        complete.write_text(wanted)
    return home


def _compile(home: Path, source: Path, *arguments: str | Path) -> str:
    options = ["-x", "cuda", f"--cuda-path={home}", "-std=c++17", "-I", str(ROOT), "-include", str(home / "missing.h")]
    options += ['-DTFOPS_CUDA_ARCHITECTURES="x"', "-Wno-unknown-cuda-version"]
    # CCCL declares functions of any arguments, which it never calls.
    options += ["-Xclang", "-fcuda-allow-variadic-functions"]
    return building.run(clang(), *options, *arguments, source)


def host_code(home: Path, source: Path) -> str:
    """The host's side of a source, as assembly."""
    return _compile(home, source, "--cuda-host-only", "-O0", "-S", "-o", "-")


@dataclass
class DeviceCode:
    """What a source becomes for one architecture."""

    ptx: str
    kernels: set[str]


def device_code(home: Path, source: Path, architecture: int, *others: int, folder: Path) -> DeviceCode:
    """PTX for an architecture, and its kernels as ptxas assembles them: for that architecture, and for others too."""
    ptx = folder / f"{source.stem}.{architecture}.ptx"
    _compile(home, source, "--cuda-device-only", f"--cuda-gpu-arch=sm_{architecture}", "-O3", "-S", "-o", ptx)
    # Clang 16 knows PTX 7.8, and nvcc 12 writes 8.0 and later, of which the barriers of clusters are.
    text = re.sub(r"^\.version 7\.\d", ".version 8.0", ptx.read_text(), flags=re.MULTILINE)
    ptx.write_text(text)
    kernels = set()
    for each in (architecture, *others):
        command = [home / "bin" / "ptxas", "-v", f"-arch=sm_{each}", ptx, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        assembled = set(re.findall(r"Compiling entry function '(\w+)'", done.stdout + done.stderr))
        assert not kernels or assembled == kernels
        kernels = assembled
    return DeviceCode(text, kernels)
