"""The CUDA sources compile with CUDA 12 as well, for the GPUs that it begins with: tfops_testing/cuda12.py says how."""

from __future__ import annotations

from collections import Counter

import pytest

import tfops_kernels
from tfops_testing import cuda12, cuda_binary

pytestmark = pytest.mark.source_tree

INFO = tfops_kernels.build_info()
KERNELS = (*cuda_binary.STREAMING, *cuda_binary.ON_CHIP)


@pytest.fixture(scope="module")
def toolkit(request):
    cuda12.clang()
    return cuda12.toolkit(request.param)


@pytest.mark.parametrize("toolkit", cuda12.PACKAGES, indirect=True)
def test_host_side_compiles(toolkit):
    code = {source.name: cuda12.host_code(toolkit, source) for source in cuda12.SOURCES}
    assert len(code) >= 6
    # The driver that is asked for is that of the toolkit.
    assert "(release 525 or later)" in code["runtime.cu"]
    assert "(release 580 or later)" not in code["runtime.cu"]


@pytest.mark.parametrize(
    ("toolkit", "architecture"),
    [
        ("12.2", 70),
        ("12.2", 90),
        pytest.param("12.9", 70, marks=pytest.mark.slow),
        pytest.param("12.9", 90, marks=pytest.mark.slow),
    ],
    indirect=["toolkit"],
)
def test_device_side_compiles(toolkit, architecture, tmp_path):
    # PTX of 9.0 is what the GPUs of 10.0 and later get from an nvcc before 12.8.
    later = [100, 120] if architecture == 90 and toolkit.name == "12.9" else []
    code = [cuda12.device_code(toolkit, source, architecture, *later, folder=tmp_path) for source in cuda12.SOURCES]
    kernels = set().union(*(each.kernels for each in code))
    # 4 data types, on vectors; streaming takes single elements too
    assert Counter(
        kernel for name in kernels for kernel in KERNELS if f"{len(kernel)}{kernel}I" in name
    ) == dict.fromkeys(cuda_binary.STREAMING, 8) | dict.fromkeys(cuda_binary.ON_CHIP, 4)
    if INFO["cuda"]:
        assert kernels == {name for _, name in cuda_binary.kernels()}
    # An array that is indexed at run time would be in local memory. (Spills come later, and differ from nvcc's.)
    assert not [each for each in code if ".local" in each.ptx]
