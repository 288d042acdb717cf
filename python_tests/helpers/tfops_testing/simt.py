"""Builds csrc/simt and loads it: the CUDA kernels, run on the CPU, behind the interface of tfops_kernels."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tfops_kernels._api
import tfops_kernels._arrays
import tfops_kernels._policy

from . import building
from .paths import ROOT

BUILD = ROOT / "build" / "simt"
ALIGNMENT = 64

# Fields of ForwardArrays and BackwardArrays that are tensors; the others but `activation_bits` are vectors [C].
TENSORS = ("x", "y", "dy", "dx", "residual", "dresidual")
FORWARD = ("x", "residual", "y", "activation_bits", "scale", "offset", "mean", "variance")
FORWARD += ("mean_out", "variance_out", "saved_mean", "saved_inv_std")
BACKWARD = ("dy", "x", "residual", "dx", "dresidual", "activation_bits", "scale", "offset", "mean")
BACKWARD += ("inv_std", "variance", "dmean", "dvariance", "dscale", "doffset", "dmean_in", "dvariance_in")


def xla_headers() -> str:
    """The folder of xla/ffi/api/ffi.h, of JAX or TensorFlow; "" if neither has it."""
    for package in ("jaxlib", "tensorflow"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations if spec else ():
            if Path(folder, "include", "xla", "ffi", "api", "ffi.h").exists():
                return f"{folder}/include"
    return ""


def build() -> None:
    """Builds the variants, or what of them is out of date."""
    import pybind11

    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    options.append(f"-DTFOPS_XLA_HEADERS={xla_headers()}")
    building.build(ROOT / "csrc" / "simt", BUILD, *options)


def sanitizer_environment(name: str = "asan") -> dict[str, str]:
    """Of a process that loads what was built with it ("asan" or "tsan"): it has to be there when that starts."""

    def library(name: str) -> str:
        command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # With the C++ library, whose exceptions it wants to know at once. Python leaks by design.
    preload = f"{library(f'lib{name}.so')} {library('libstdc++.so')}"
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    options |= {"UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return os.environ | {"LD_PRELOAD": preload} | options


def memory(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> np.ndarray:
    """An array of NaN, `offset` elements beyond a multiple of ALIGNMENT, with nothing behind its last element."""
    dtype = np.dtype(dtype)
    libc = ctypes.CDLL(None)
    address = ctypes.c_void_p()
    elements = offset + int(np.prod(shape))
    if elements == offset:
        return np.empty(shape, dtype)
    size = ctypes.c_size_t(elements * dtype.itemsize)
    if libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(ALIGNMENT), size):
        raise MemoryError
    buffer = (ctypes.c_uint8 * size.value).from_address(address.value)
    weakref.finalize(buffer, libc.free, ctypes.c_void_p(address.value))
    whole = np.frombuffer(buffer, np.uint8)
    whole[:] = 0xFF
    return whole.view(dtype)[offset:].reshape(shape)


class _Arrays(tfops_kernels._arrays._NumPy):
    """NumPy's arrays as the memory of a GPU."""

    is_cuda = True
    offset = 0

    def empty(self, shape: tuple[int, ...], dtype: str, like: np.ndarray) -> np.ndarray:
        kind = like.dtype if dtype == like.dtype.name else np.dtype(dtype)
        return memory(shape, kind, 0 if dtype == "uint8" else self.offset)


class Simt:
    """forward() and backward() of tfops_kernels on the CUDA kernels, and csrc/simt's controls."""

    def __init__(self, variant: str = "plain") -> None:
        # A name for each, for pybind11 has one module for a name. PyInit__kernels is after the last part of it.
        spec = importlib.util.spec_from_file_location(f"simt_{variant}._kernels", BUILD / variant / "_kernels.so")
        self.machine: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.machine)
        # A second instance of the Python side, with this module in the place of its own.
        spec = importlib.util.spec_from_file_location("simt_api", tfops_kernels._api.__file__)
        self._api = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._api)
        self._arrays = _Arrays()
        self._watching = False
        self._api._kernels = self
        self._api.library_of = lambda x: self._arrays
        self._api._device = lambda x: contextlib.nullcontext()
        self.forward = self._api.forward
        self.backward = self._api.backward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.machine, name)

    def settings(self, **changed: Any) -> contextlib.AbstractContextManager[None]:
        """tfops_kernels._policy.settings() of this machine."""
        return tfops_kernels._policy.settings(self.machine, **changed)

    def configure(self, device: str = "three", seed: int = 1, offset: int = 0) -> None:
        """`offset`: how many elements each array lies beyond an aligned address."""
        self.machine.set_device(device)
        self.machine.set_seed(seed)
        self._arrays.offset = offset

    def place(self, array: np.ndarray) -> np.ndarray:
        placed = memory(array.shape, array.dtype, self._arrays.offset)
        placed[...] = array
        return placed

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[dict[str, Any]]]:
        """Counts memory accesses. Afterwards the list holds a report of each launch."""
        reports: list[dict[str, Any]] = []
        self.machine.take_reports()
        self.machine.set_counting(True)
        self._watching = True
        try:
            yield reports
        finally:
            self._watching = False
            self.machine.set_counting(False)
            reports += self.machine.take_reports()

    def _watch(self, problem: Any, arrays: Any, fields: tuple[str, ...]) -> None:
        self.machine.clear_watches()
        if not self._watching:
            return
        item = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[problem.dtype.name]
        for field in fields:
            if address := getattr(arrays, field):
                size = problem.elements * item if field in TENSORS else problem.channels * max(item, 4)
                if field == "activation_bits":
                    size = problem.activation_bits_bytes
                self.machine.watch(field, address, size)

    # What the Python side calls.

    def cuda_forward(self, problem: Any, arrays: Any, workspace: int, stream: int) -> None:
        self._watch(problem, arrays, FORWARD)
        self.machine.cuda_forward(problem, arrays, workspace, stream)

    def cuda_backward(self, problem: Any, arrays: Any, workspace: int, stream: int) -> None:
        self._watch(problem, arrays, BACKWARD)
        self.machine.cuda_backward(problem, arrays, workspace, stream)


@pytest.fixture
def force() -> Iterator[Callable[..., None]]:
    """force(simt, tier="grid") changes settings of a machine's policy until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda machine, **changed: stack.enter_context(machine.settings(**changed))


@pytest.fixture(scope="session")
def simt() -> Simt:
    """The CUDA kernels on the CPU, built if need be. `make sanitize` asks for the variant with sanitizers."""
    pytest.importorskip("pybind11", reason="needs pybind11, to build csrc/simt")
    build()
    return Simt(os.environ.get("TFOPS_SIMT_VARIANT", "plain"))
