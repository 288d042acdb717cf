"""The CUDA kernels as compiled, which needs no GPU: every architecture is there, and nothing spills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tfops_kernels
from tfops_testing.requirements import needs_cuda_build

INFO = tfops_kernels.build_info()
pytestmark = needs_cuda_build

STREAMING = ("MomentsKernel", "NormalizeKernel", "GradientMomentsKernel", "GradientNormalizeKernel")
ON_CHIP = ("OnChipForwardKernel", "OnChipBackwardKernel")


def _tool(name: str) -> str:
    """A program of NVIDIA's, from its package or from a CUDA toolkit."""
    packaged = [Path(p) / "nvidia/cu13/bin" / name for p in sys.path]
    found = next((str(p) for p in packaged if p.exists()), None) or shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")
    return found


def _cuobjdump(*arguments: str, **environment: str) -> str:
    """The output of cuobjdump for the library."""
    library = Path(tfops_kernels.__file__).with_name("libtfops_kernels.so")
    command = [_tool("cuobjdump"), *arguments, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment}).stdout


def _kernels() -> dict[tuple[str, str], dict[str, int]]:
    """For each architecture and kernel, the compiler's report: REG, STACK, SHARED, LOCAL and so on."""
    found = {}
    architecture = name = ""
    for line in _cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+\w?)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[architecture, name] = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.fixture(scope="module")
def resources():
    return _kernels()


def test_every_architecture_has_every_kernel(resources):
    # As CMake writes them: "90-real" is machine code, "90-virtual" PTX, and "90" both.
    architectures = [arch for arch in INFO["cuda_architectures"].split() if not arch.endswith("-virtual")]
    wanted = {f"sm_{arch.removesuffix('-real')}" for arch in architectures}
    by_architecture: dict[str, set[str]] = {}
    for architecture, name in resources:
        by_architecture.setdefault(architecture, set()).add(name)
    assert set(by_architecture) == wanted
    assert len({frozenset(names) for names in by_architecture.values()}) == 1
    # 4 data types, vectors and single elements, for each phase
    names = by_architecture[min(wanted)]
    for phase in (*STREAMING, *ON_CHIP):
        assert sum(f"{len(phase)}{phase}I" in name for name in names) == 8, phase


@pytest.mark.skipif(INFO["native"], reason="this build is for one machine alone")
def test_there_is_ptx_for_gpus_to_come():
    virtual = [arch for arch in INFO["cuda_architectures"].split() if not arch.endswith("-real")]
    assert virtual, "no PTX: the wheel would not run on GPUs to come"
    assert f"sm_{virtual[-1].removesuffix('-virtual')}" in _cuobjdump("-lptx")


def test_no_kernel_spills_registers(resources):
    """Registers that spill, and arrays that are indexed at run time, live in local memory, on the stack."""
    bad = {key: usage for key, usage in resources.items() if usage["STACK"] or usage["LOCAL"]}
    assert not bad


def test_registers_leave_room_for_the_planned_threads(resources):
    """512 threads a multiprocessor, of 65,536 registers: 2 blocks of 256, or on the chip one of 512."""
    assert max(usage["REG"] for usage in resources.values()) <= 128


def test_on_chip_kernels_leave_shared_memory_to_the_plan(resources):
    """It is all dynamic, but for what CUDA reserves: 1 KB on some architectures."""
    for (_, name), usage in resources.items():
        if any(kernel in name for kernel in ON_CHIP):
            assert usage["SHARED"] <= 1024, name


@pytest.fixture(scope="module")
def machine_code():
    """For each kernel on vectors, its instructions for Hopper."""
    if "90-real" not in INFO["cuda_architectures"].split():
        pytest.skip("no machine code for sm_90 in this build")
    folder = str(Path(_tool("nvdisasm")).parent)
    listing = _cuobjdump("-sass", "-arch", "sm_90", PATH=folder + os.pathsep + os.environ["PATH"])
    code = {}
    for function in re.split(r"\n\s*Function : ", listing)[1:]:
        name, _, body = function.partition("\n")
        code[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body)
    return code


def _count(instructions: list[str], pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, instruction)) for instruction in instructions)


def test_no_kernel_uses_local_memory(machine_code):
    assert machine_code
    assert not {name for name, code in machine_code.items() if _count(code, r"(LDL|STL)(\..*)?")}


@pytest.mark.parametrize("kernel", [*STREAMING, *ON_CHIP])
def test_accesses_are_of_16_bytes(machine_code, kernel):
    """As many loads as a thread has in flight, one store for each vector it has in hand."""
    vectors = {
        name: code for name, code in machine_code.items() if re.search(rf"{len(kernel)}{kernel}I\w*?Li[248]E", name)
    }
    assert len(vectors) == 4
    for name, code in vectors.items():
        assert _count(code, r"LDG\.E(\.\w+)*\.128(\.\w+)*") >= 4, name
        if "MomentsKernel" not in kernel:
            assert _count(code, r"STG\.E(\.\w+)*\.128(\.\w+)*"), name
        if kernel in ON_CHIP:
            assert _count(code, r"STS\.128"), name
            assert _count(code, r"LDS(\.\w+)*\.128"), name
