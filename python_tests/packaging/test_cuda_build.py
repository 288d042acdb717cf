"""The CUDA kernels as compiled, which needs no GPU: every architecture is there, and nothing spills."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import tfops_kernels
from tfops_testing.cuda_binary import ON_CHIP, STREAMING, cuobjdump, kernels, tool
from tfops_testing.requirements import needs_cuda_build

INFO = tfops_kernels.build_info()
pytestmark = needs_cuda_build


@pytest.fixture(scope="module")
def resources():
    return kernels()


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
    assert f"sm_{virtual[-1].removesuffix('-virtual')}" in cuobjdump("-lptx")


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
    folder = str(Path(tool("nvdisasm")).parent)
    listing = cuobjdump("-sass", "-arch", "sm_90", PATH=folder + os.pathsep + os.environ["PATH"])
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
