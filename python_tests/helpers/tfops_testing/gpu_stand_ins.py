"""Stand-ins for what a machine with a GPU has: PyTorch, the CUDA driver's library, and the kernels, simulated.

benchmarks/gpu_proof.py then runs as it does there, in processes of its own: `environment()` is what they are started
with. They import `torch` from torch_stand_in.py and `tfops_kernels._kernels` from csrc/simt; ctypes finds a
libcuda.so.1 whose memory is this process'; and of the benchmark's cells a few small ones are left.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .paths import HELPERS, ROOT

DEVICE = "three"
CELLS = [
    ("small", (20, 3, 3, 24), "NHWC", "float32", "add_relu"),
    ("small", (6, 4, 6, 16), "NCHW", "float16", "relu"),
    ("small", (64, 32), "NHWC", "bfloat16", "plain"),
    ("small", (4, 2, 3, 4, 16), "NHWC", "float32", "add_relu"),
]
OTHERS = {"small": [(30, 8)]}

# What nvidia-smi is asked for, and would refuse if it did not know one field. This one lacks the last.
NVIDIA_SMI = """#!/bin/sh
case "$1" in *compute_mode*) echo 'Field "compute_mode" is not a valid field to query.'; exit 2;; esac
fields=${1#--query-gpu=}
echo "$fields" | sed 's/[^,]*/1980 MHz/g'
"""


def environment(folder: Path) -> dict[str, str]:
    """Of processes that have the stand-ins; files that it takes are written into a folder."""
    (folder / "sitecustomize.py").write_text("from tfops_testing import gpu_stand_ins\n\ngpu_stand_ins.install()\n")
    (folder / "nvidia-smi").write_text(NVIDIA_SMI)
    (folder / "nvidia-smi").chmod(0o755)
    path = os.pathsep.join(filter(None, [str(folder), str(HELPERS), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PATH": f"{folder}:{os.environ['PATH']}"}


def install() -> None:
    """Puts the stand-ins in their places, to be imported."""
    sys.meta_path.insert(0, _Finder())
    ctypes.CDLL = _Libraries  # type: ignore[misc]


class _Finder:
    """Finds modules elsewhere, or changes them once they are imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "torch":
            return importlib.util.spec_from_file_location(name, Path(__file__).with_name("torch_stand_in.py"))
        if name == "tfops_kernels._kernels":
            library = str(ROOT / "build" / "simt" / "plain" / "_kernels.so")
            return _after(importlib.util.spec_from_file_location(name, library), _choose_device)
        if name == "gpu.cells":
            return _after(importlib.machinery.PathFinder.find_spec(name, path), _leave_few)
        return None


class _Loader:
    """Another loader, and what is done with a module that it has loaded."""

    def __init__(self, loader: Any, change: Callable[[ModuleType], None]):
        self._loader, self._change = loader, change
        self.create_module = loader.create_module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


def _after(spec: Any, change: Callable[[ModuleType], None]) -> Any:
    spec.loader = _Loader(spec.loader, change)
    return spec


def _choose_device(kernels: Any) -> None:
    driver = kernels.driver

    def one_gpu() -> dict[str, Any]:
        found = driver()
        kernels.set_device(DEVICE)  # the simulator has one current device, which that question changes
        return {**found, "gpus": [gpu for gpu in found["gpus"] if gpu["name"] == DEVICE]}

    kernels.driver = one_gpu
    kernels.set_device(DEVICE)


def _leave_few(cells: Any) -> None:
    cells._TELLING = CELLS
    cells.NETWORKS.clear()
    cells.NETWORKS.update(OTHERS)


# ----------------------------------------------------------------------------------------------------------------------
# The CUDA driver


class _Libraries(ctypes.CDLL):
    def __new__(cls, name: Any = None, *arguments: Any, **named: Any) -> Any:
        return Cuda() if name == "libcuda.so.1" else super().__new__(cls)


_Pointer, _Size, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_Address = ctypes.c_uint64  # CUdeviceptr
_ILLEGAL_ADDRESS, _NOT_INITIALIZED, _OUT_OF_MEMORY, _SUCCESS = 700, 3, 2, 0


class Cuda:
    """libcuda.so.1, with the memory of this process. Arguments must be of the types that cuda.h says."""

    def __init__(self) -> None:
        self._libc = ctypes.PyDLL(None)
        self._libc.free.argtypes, self._libc.free.restype = [_Pointer], None
        self._sizes: dict[int, int] = {}
        self._steps: list[str] = []

    def _holds(self, address: int, size: int) -> bool:
        return any(begin <= address and address + size <= begin + of for begin, of in self._sizes.items())

    def cuInit(self, flags: ctypes.c_uint) -> int:
        assert isinstance(flags, ctypes.c_uint)
        assert flags.value == 0
        self._steps.append("init")
        return _SUCCESS

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:
        assert isinstance(context._obj, _Pointer)
        assert isinstance(device, _Int)
        context._obj.value = 1
        self._steps.append("retain")
        return _SUCCESS

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:
        assert isinstance(context, _Pointer)
        assert context.value == 1
        self._steps.append("current")
        return _SUCCESS

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> int:
        assert isinstance(address._obj, _Address)
        assert isinstance(size, _Size)
        if self._steps != ["init", "retain", "current"]:
            return _NOT_INITIALIZED
        found = _Pointer()
        if not size.value or self._libc.posix_memalign(ctypes.byref(found), _Size(256), size):
            return _OUT_OF_MEMORY
        address._obj.value = found.value
        self._sizes[found.value or 0] = size.value
        return _SUCCESS

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        assert isinstance(address, _Address)
        if self._sizes.pop(address.value, None) is None:
            return _ILLEGAL_ADDRESS
        self._libc.free(address.value)
        return _SUCCESS

    def cuMemsetD8_v2(self, address: ctypes.c_uint64, value: ctypes.c_ubyte, size: ctypes.c_size_t) -> int:
        assert isinstance(address, _Address)
        assert isinstance(value, ctypes.c_ubyte)
        assert isinstance(size, _Size)
        if not self._holds(address.value, size.value):
            return _ILLEGAL_ADDRESS
        ctypes.memset(address.value, value.value, size.value)
        return _SUCCESS

    def cuMemcpyHtoD_v2(self, to: ctypes.c_uint64, source: ctypes.c_void_p, size: ctypes.c_size_t) -> int:
        assert isinstance(source, _Pointer)
        return self._copy(to, source, to, size)

    def cuMemcpyDtoH_v2(self, to: ctypes.c_void_p, source: ctypes.c_uint64, size: ctypes.c_size_t) -> int:
        assert isinstance(to, _Pointer)
        return self._copy(to, source, source, size)

    def _copy(self, to: Any, source: Any, device: Any, size: ctypes.c_size_t) -> int:
        assert isinstance(device, _Address)
        assert isinstance(size, _Size)
        if not self._holds(device.value, size.value):
            return _ILLEGAL_ADDRESS
        ctypes.memmove(to.value, source.value, size.value)
        return _SUCCESS

    def cuGetErrorString(self, code: int, text: Any) -> int:
        assert isinstance(code, int)
        text._obj.value = f"error {code}".encode()
        return _SUCCESS
