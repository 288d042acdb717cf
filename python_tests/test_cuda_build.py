"""The CUDA kernels as compiled, which needs no GPU: every architecture is there, nothing spills, all ops have them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorflow.python.framework import kernels

import tfops_kernels

INFO = tfops_kernels.build_info()
pytestmark = pytest.mark.skipif(not INFO["cuda"], reason="this build has no CUDA kernels")

OPS = [f"Tfops>BatchNorm{mode}{grad}" for mode in ("Training", "Inference") for grad in ("", "Grad")]


def _cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump, from the package nvidia-cuda-cuobjdump or from a CUDA toolkit, for the library."""
    packaged = [Path(p) / "nvidia/cu13/bin/cuobjdump" for p in sys.path]
    found = next((str(p) for p in packaged if p.exists()), None) or shutil.which("cuobjdump")
    if not found:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump")
    library = Path(tfops_kernels.__file__).with_name("libtfops_kernels.so")
    return subprocess.run([found, *arguments, str(library)], capture_output=True, text=True, check=True).stdout


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
    wanted = {f"sm_{arch.removesuffix('-real')}" for arch in INFO["cuda_architectures"].split()}
    by_architecture: dict[str, set[str]] = {}
    for architecture, name in resources:
        by_architecture.setdefault(architecture, set()).add(name)
    assert set(by_architecture) == wanted
    assert len({frozenset(names) for names in by_architecture.values()}) == 1
    # 4 data types, vectors and single elements, for each phase
    names = by_architecture[min(wanted)]
    for phase in ("MomentsKernel", "NormalizeKernel", "GradientMomentsKernel", "GradientNormalizeKernel"):
        assert sum(f"{len(phase)}{phase}I" in name for name in names) == 8, phase


def test_newest_architecture_has_ptx():
    virtual = [arch for arch in INFO["cuda_architectures"].split() if not arch.endswith("-real")]
    assert virtual, "no PTX: the wheel would not run on GPUs to come"
    assert f"sm_{virtual[-1]}" in _cuobjdump("-lptx")


def test_nothing_spills(resources):
    """Registers that spill, and arrays that are indexed at run time, live in local memory, on the stack."""
    bad = {key: usage for key, usage in resources.items() if usage["STACK"] or usage["LOCAL"]}
    assert not bad


def test_registers_leave_room_for_two_blocks(resources):
    """The streaming kernels are planned for 2 blocks of 256 threads a multiprocessor, of 65,536 registers."""
    assert max(usage["REG"] for usage in resources.values()) <= 128


@pytest.mark.parametrize("op", OPS)
def test_gpu_kernels_are_registered(op):
    registered = {}
    for kernel in kernels.get_registered_kernels_for_op(op).kernel:
        types = {c.name: c.allowed_values.list.type[0] for c in kernel.constraint}
        registered.setdefault(kernel.device_type, set()).add((types["T"], types["U"]))
    half, float32, float64, bfloat16 = 19, 1, 2, 14
    wanted = {(half, float32), (bfloat16, float32), (float32, float32), (float64, float64)}
    assert registered == {"CPU": wanted, "GPU": wanted}
