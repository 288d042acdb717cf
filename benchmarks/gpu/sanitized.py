"""A small program that runs every tier of the kernels, for compute-sanitizer to watch.

It has no PyTorch, whose own kernels and thousands of allocations would take the tools minutes: memory comes from the
CUDA driver's library by ctypes. Problems are small, for racecheck slows a kernel down a hundred times or more. Results
are compared with float64, so that it is known that what was watched also was right.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .backends import import_simt
from .records import ROOT

TIERS = (("one_block", 0), ("cluster", 2), ("cluster", 8), ("cluster", 16), ("grid", 0), ("streaming", 0))
# (shape, axis, dtype, activation, residual): rows and planes, wide accesses and single ones, with and without a mask.
CASES = [
    ((72, 4, 4, 32), -1, "float16", "relu", True),
    ((600, 12), -1, "float32", None, False),
    ((16, 6, 12, 12), 1, "bfloat16", "relu6", True),
    ((9, 5, 7, 11), 1, "float32", "silu", True),
]


class Driver:
    """Memory of a GPU by the CUDA driver's own interface. It begins as NaN, or as it is, which initcheck asks for."""

    def __init__(self, as_allocated: bool):
        self._library = ctypes.CDLL("libcuda.so.1")
        self._as_allocated = as_allocated
        context = ctypes.c_void_p()
        self.call("cuInit", ctypes.c_uint(0))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(0))
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed: {(text.value or b'unknown error').decode()}")

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        if not self._as_allocated and size:
            self.call("cuMemsetD8_v2", address, ctypes.c_ubyte(0xFF), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, array: np.ndarray) -> None:
        data = array.ctypes.data_as(ctypes.c_void_p)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(array.nbytes))

    def read(self, address: int, array: np.ndarray) -> None:
        """Waits for the kernels before."""
        data = array.ctypes.data_as(ctypes.c_void_p)
        self.call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))


class Array:
    """An array in a GPU's memory."""

    device = 0

    def __init__(self, driver: Driver, shape: tuple[int, ...], dtype: Any):
        self.driver, self.shape, self.dtype = driver, shape, np.dtype(dtype)
        self.ndim = len(shape)
        self.size = int(np.prod(shape))
        self.address = driver.allocate(self.size * self.dtype.itemsize)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.driver.free(self.address)

    def to_host(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        if array.size:
            self.driver.read(self.address, array)
        return array


class Library:
    """What tfops_kernels has to know of such arrays (tfops_kernels/_arrays.py)."""

    is_cuda = True
    kind = "array of the CUDA driver"

    def __init__(self, driver: Driver):
        self.driver = driver

    def has(self, array: Any) -> bool:
        return isinstance(array, Array)

    def dtype(self, array: Array) -> str:
        return array.dtype.name

    def fault(self, array: Array) -> str:
        return ""

    def address(self, array: Array) -> int:
        return array.address

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Array:
        return Array(self.driver, shape, like.dtype if dtype == like.dtype.name else dtype)

    def stream(self, array: Array) -> int:
        return 0

    def place(self, array: np.ndarray) -> Array:
        placed = Array(self.driver, array.shape, array.dtype)
        if array.size:
            self.driver.write(placed.address, np.ascontiguousarray(array))
        return placed


class Checks:
    """Runs checks, tier by tier, and keeps what came of them."""

    def __init__(self, raw: Any):
        self.raw, self.passed = raw, 0
        self.wrong: list[str] = []
        self.refused: list[str] = []

    def _refusals(self) -> int:
        return sum(refusal["count"] for refusal in self.raw.cuda_launches()["refusals"])

    def run(self, name: str, check: Callable[[], None], tiers: Sequence[tuple[str, int]] = TIERS) -> None:
        """In each of the tiers that the check's problem has."""
        for tier, cluster in tiers:
            self.raw.set_policy_settings(tier=tier, cluster=cluster)
            before, label = self._refusals(), f"{name} {tier} {cluster or ''}"
            try:
                check()
            except ValueError as problem:
                if "is forced, and cannot be had" not in str(problem):
                    raise
                print(f"there is no {label}: {problem}", flush=True)
                continue
            except AssertionError as problem:
                self.wrong.append(f"{label}: {problem}")
            except RuntimeError as problem:
                if self._refusals() == before:
                    raise
                # Tools need registers and shared memory of their own: below one that is not wrong.
                self.refused.append(f"{label}: {problem}")
                continue
            self.passed += 1
        self.raw.set_policy_settings(tier="", cluster=0)

    def tell(self) -> int:
        """Prints what came of them, for sanitizers.judge; returns the exit status."""
        print(f"sanitized: ran {self.raw.cuda_launches()['calls']}", flush=True)
        for each in self.refused:
            print(f"sanitized: refused: {each}", flush=True)
        for each in self.wrong:
            print(f"sanitized: wrong: {each}", flush=True)
        if not self.wrong and self.passed:
            print(f"sanitized: {self.passed} checks agree with float64", flush=True)
        return 1 if self.wrong or not self.passed else 0


def main(dry_run: bool, as_allocated: bool) -> int:
    sys.path.insert(0, str(ROOT / "python_tests" / "helpers"))
    import tfops_kernels
    from tfops_testing import in_place_cases, kernel_cases, phase_cases, virtual_batches

    if dry_run:
        kernels = import_simt()
        raw, place, to_host = kernels.machine, kernels.place, np.asarray
        phases = functools.partial(phase_cases.Phases, raw, True, place)
    else:
        from tfops_kernels import _api as kernels
        from tfops_kernels import _kernels as raw

        driver = Driver(as_allocated)
        library = Library(driver)
        kernels.library_of = lambda x: library
        kernels._device = lambda x: contextlib.nullcontext()
        place, to_host = library.place, Array.to_host
        memory = (lambda array: array.address), to_host, (lambda size: Array(driver, (size,), np.uint8))
        phases = functools.partial(phase_cases.Phases, raw, True, place, 1, *memory)

    checks = Checks(raw)
    raw.reset_cuda_launches()
    arguments = (place, to_host, kernels)
    for shape, axis, dtype, activation, residual in CASES[:2] if dry_run else CASES:
        case = kernel_cases.Case(shape, axis, dtype, True, activation, residual)
        checks.run(str(case), functools.partial(kernel_cases.check, case, *arguments))
    case = kernel_cases.Case((780, 64), -1, "float16", True, "relu", True, 0.25)
    checks.run("virtual batches", functools.partial(virtual_batches.check, case, 390, *arguments))
    case = kernel_cases.Case((72, 32), -1, "float32", activation="leaky_relu")
    checks.run("in place", functools.partial(in_place_cases.check, case, *arguments))
    for shape, axis in ((37, 24), -1), ((5, 6, 4, 9), 1):  # what has no tiers
        case = kernel_cases.Case(shape, axis, "float32", False, "silu", True)
        checks.run(str(case), functools.partial(kernel_cases.check, case, *arguments), [("", 0)])
        if tfops_kernels.build_info()["cpu_instruction_set"] != "none":  # with which phases are compared
            agree = functools.partial(phase_cases.assert_cuda_agrees, lambda i, keep: phases(), shape, axis, "float32")
            checks.run(f"phases {shape}", agree, [("", 0)])
    return checks.tell()
