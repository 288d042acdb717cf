"""The CUDA kernels of the installed library, as NVIDIA's cuobjdump sees them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tfops_kernels

STREAMING = ("MomentsKernel", "NormalizeKernel", "GradientMomentsKernel", "GradientNormalizeKernel")
ON_CHIP = ("OnChipForwardKernel", "OnChipBackwardKernel")


def tool(name: str) -> str:
    """A program of NVIDIA's, from its package or from a CUDA toolkit. Skips the test if there is none."""
    packaged = [Path(p) / "nvidia/cu13/bin" / name for p in sys.path]
    found = next((str(p) for p in packaged if p.exists()), None) or shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")
    return found


def cuobjdump(*arguments: str, **environment: str) -> str:
    """The output of cuobjdump for the library."""
    library = Path(tfops_kernels.__file__).with_name("libtfops_kernels.so")
    command = [tool("cuobjdump"), *arguments, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment}).stdout


def kernels() -> dict[tuple[str, str], dict[str, int]]:
    """For each architecture and kernel, the compiler's report: REG, STACK, SHARED, LOCAL and so on."""
    found = {}
    architecture = name = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+\w?)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[architecture, name] = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)}
    return found
