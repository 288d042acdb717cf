"""Where cells run: on a GPU with PyTorch's memory, or on the CPU with csrc/simt in the GPU's place (the dry run)."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .records import ROOT

WARM_UP = 0.1  # seconds of work before the first timing, in which clocks rise


class Torch:
    """A GPU, with PyTorch's tensors. `raw` is the kernels' module, `exhausted` what is raised where memory ends."""

    def __init__(self) -> None:
        import torch

        import tfops_kernels

        self.torch = torch
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU")
        if problem := tfops_kernels.build_info()["cuda_problem"]:
            raise RuntimeError(problem)
        torch.manual_seed(1)
        self.raw = tfops_kernels._kernels
        self.exhausted = torch.cuda.OutOfMemoryError
        self._warm = False
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def facts(self) -> dict[str, Any]:
        cudnn = self.torch.backends.cudnn.version()
        return {"gpu": self.torch.cuda.get_device_name(0), "torch": self.torch.__version__, "cudnn": cudnn}

    def normal(self, shape: Sequence[int], dtype: str) -> Any:
        return self.torch.randn(tuple(shape), device="cuda").to(getattr(self.torch, dtype))

    def uniform(self, n: int, low: float = 0.5) -> Any:
        return self.torch.rand(n, device="cuda") + low

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory of 0xFF bytes, which are NaN: what is not written shows."""
        array = self.torch.empty(tuple(shape), device="cuda", dtype=getattr(self.torch, dtype))
        array.view(self.torch.uint8).fill_(0xFF)
        return array

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def stream(self) -> int:
        return int(self.torch.cuda.current_stream().cuda_stream)

    def wide(self, array: Any) -> Any:
        return array.double()

    def to_host(self, array: Any) -> np.ndarray:
        return array.double().cpu().numpy()

    def is_sound(self) -> bool:
        """Whether this process' context is alive."""
        try:
            self.torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def sets(self, least_bytes: int) -> int:
        """Sets of buffers to take in turns, so that a call's data are gone from L2 when its turn comes again."""
        return min(max(2, math.ceil(3 * self.l2_bytes / max(least_bytes, 1))), 64)

    def seconds(self, calls: Sequence[Callable[[], Any]], budget: float) -> float:
        """The median time of one of `calls`, which are captured in a graph, replayed for about `budget` seconds."""
        torch = self.torch
        stream = torch.cuda.Stream()
        keep = []  # what the calls allocate has to live until the last replay
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            keep += [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
        end = time.perf_counter() + (0 if self._warm else WARM_UP)
        while time.perf_counter() < end:
            graph.replay()
            torch.cuda.synchronize()
        self._warm = True
        times: list[float] = []
        end = time.perf_counter() + budget
        while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3 / len(calls))
        return statistics.median(times)

    def copy_rate(self) -> float:
        """Bytes read and written a second by a device-to-device copy of 1 GiB."""
        source = self.torch.empty(2**30, dtype=self.torch.uint8, device="cuda")
        target = self.torch.empty_like(source)
        return 2 * 2**30 / self.seconds([lambda: target.copy_(source)], 0.2)


def import_simt() -> Any:
    """The tests' csrc/simt, built if need be."""
    sys.path.insert(0, str(ROOT / "python_tests" / "helpers"))
    from tfops_testing import simt

    simt.build()
    machine = simt.Simt()
    machine.configure("three")
    return machine


class Simt:
    """The simulated GPU, with NumPy's arrays. Its times are the simulation's: they prove nothing but that all ran."""

    exhausted = MemoryError

    def __init__(self) -> None:
        self.simt = import_simt()
        self.raw = self.simt.machine
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        return {"gpu": "three multiprocessors, simulated"}

    def _memory(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        from tfops_testing import kernel_cases, simt

        return simt.memory(tuple(shape), kernel_cases.numpy_dtype(dtype))

    def normal(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        array = self._memory(shape, dtype)
        array[...] = self._random.standard_normal(tuple(shape))
        return array

    def uniform(self, n: int, low: float = 0.5) -> np.ndarray:
        array = self._memory((n,), "float32")
        array[...] = self._random.random(n) + low
        return array

    def empty(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        return self._memory(shape, dtype)

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def stream(self) -> int:
        return 0

    def wide(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float64)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float64)

    def is_sound(self) -> bool:
        return True

    def sets(self, least_bytes: int) -> int:
        return 1

    def seconds(self, calls: Sequence[Callable[[], Any]], budget: float) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def copy_rate(self) -> float:
        source = np.ones(1 << 24, np.uint8)
        target = np.empty_like(source)
        return 2 * source.size / self.seconds([lambda: np.copyto(target, source)], 0)


def open_backend(dry_run: bool) -> Torch | Simt:
    return Simt() if dry_run else Torch()
