"""The processes that time: what they share, whatever framework they hold. What is timed: cpu_peers.py.

A process holds one framework, for two thread pools in one process would disturb each other, and TensorFlow's switch for
oneDNN is a variable of the environment. It reads requests from stdin and writes replies to stdout, pickled; in between
it waits in a read, and burns nothing.

Memory that is freed stays with the process, so that pages are not faulted in anew at every call: by TensorFlow's own
allocator (the one that comes with oneDNN, or TF_CPU_ALLOCATOR_USE_BFC), and by glibc's settings for PyTorch. PyTorch
and TensorFlow without oneDNN are several times slower without.

Calling a graph takes TensorFlow 0.2 ms, whatever is in it. So a graph holds several steps if they are short, each on
the result of the one before (y is the next x, dx the next dy) and after it, and times are of a step. Only the last
step's results are returned: those in between are free to be overwritten, by whatever peer can. PyTorch does as many
steps a call, Keras' layer and the fused op without oneDNN, whose steps take several times as long, do fewer.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import pickle
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from problems import Cell

EPSILON = 2.0**-10  # exact in every type: TensorFlow's ops keep it as a float32, Keras and PyTorch as a double
MOMENTUM = 2.0**-6  # of the batch in the running statistics
STEP_SECONDS = 6e-3  # a call holds steps for so long, at so many bytes a second ...
RATE = 30e9
CACHE_RATE, CACHE_BYTES = 120e9, 32 << 20  # ... by a fast peer where so many bytes stay in the cache,
MOST_STEPS = 128  # and no more than these,
MOST_SLOW_STEPS = 32  # or these by a slow peer, whose steps take long to run, and Keras' long to trace
SAMPLES = 4096  # elements of each result that are compared
COPY_BYTES = (512 << 20, 256 << 20, 128 << 20)  # of the streaming copy
NOISE = 1048573  # random numbers in all; tensors repeat them
_MEMORY_STAYS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}

# What each process has in its environment. The threshold makes memcpy use non-temporal stores, which glibc otherwise
# does only for copies larger than what it takes for a share of the last-level cache.
ENVIRONMENT = {
    "tensorflow": {"TF_ENABLE_ONEDNN_OPTS": "1"},
    "tensorflow-eigen": {"TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPU_ALLOCATOR_USE_BFC": "true"},
    "torch": _MEMORY_STAYS,
    "copy": {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x40000"},
}
RESULTS = {
    "forward": ("y",),
    "inference": ("y",),
    "backward": ("dx", "dscale", "doffset", "dresidual"),
    "forward_backward": ("y", "dx", "dscale", "doffset", "dresidual"),
}


class Tensors(NamedTuple):
    """A problem's inputs, of either framework."""

    x: Any
    dy: Any
    residual: Any  # x, if the problem has none
    scale: Any
    offset: Any
    mean: Any
    variance: Any


class Call(NamedTuple):
    """Something to time."""

    run: Callable[[], Any]  # does `steps` steps
    steps: int
    first: Callable[[], tuple]  # the first step's results


class Prepared(NamedTuple):
    """What the coordinator gets to know of a call."""

    peer: str
    what: str
    seconds: float  # one call, after the first
    steps: int
    results: dict[str, np.ndarray]  # of the first step, SAMPLES elements of each, in the order of memory


def memory_shape(cell: Cell) -> tuple[tuple[int, ...], int]:
    """The shape of the cell's data, and the axis of their channels."""
    if cell.layout == "NHWC":
        return cell.shape, len(cell.shape) - 1
    return (cell.shape[0], cell.shape[-1], *cell.shape[1:-1]), 1


def steps_of(cell: Cell, fast: bool = True) -> int:
    rate = CACHE_RATE if fast and cell.least_bytes <= CACHE_BYTES else RATE
    most = MOST_STEPS if fast else MOST_SLOW_STEPS
    return min(max(math.ceil(STEP_SECONDS * rate / cell.streamed_bytes), 1), most)


def before(what: str, t: Tensors) -> tuple:
    """What a step continues from, in place of results: y is the next x, dx the next dy."""
    start = {"y": t.x, "dx": t.dy, "dscale": t.scale, "doffset": t.offset, "dresidual": t.residual}
    return tuple(start[name] for name in RESULTS[what])


def next_step(step: Callable[[Tensors], tuple], what: str, t: Tensors, results: tuple) -> tuple:
    named = dict(zip(RESULTS[what], results, strict=False))
    return step(t._replace(x=named.get("y", t.x), dy=named.get("dx", t.dy)))


def chain(step: Callable[[Tensors], tuple], what: str, steps: int, t: Tensors) -> tuple:
    """The results of the last of so many steps."""
    results = step(t)
    for _ in range(steps - 1):
        results = next_step(step, what, t, results)
    return results


def numbers(cell: Cell) -> dict[str, np.ndarray]:
    """Random numbers for the cell: x, dy and residual before they are repeated, and the vectors."""
    generator = np.random.default_rng(1)
    param = "float64" if cell.dtype == "float64" else "float32"
    data = {name: generator.standard_normal(NOISE).astype(param) for name in ("x", "dy", "residual")}
    channels = cell.shape[-1]
    # Such that results neither grow nor vanish over MOST_STEPS steps.
    for name, low, high in (("scale", 0.8, 1.2), ("offset", -1, 1), ("mean", -0.1, 0.1), ("variance", 0.8, 1.2)):
        data[name] = generator.uniform(low, high, channels).astype(param)
    return data


def sample_indices(elements: int) -> np.ndarray:
    return np.linspace(0, elements - 1, min(elements, SAMPLES)).astype(np.int64)


def seconds_a_call(call: Callable[[], Any], calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        del result  # or the next call could not have its memory
    return seconds


class Worker:
    """Prepares the calls of one problem after another, and times them."""

    versions: dict[str, str]

    def __init__(self, threads: int):
        self.threads = threads
        self.calls: dict[tuple[str, str], Call] = {}

    def make_calls(self, cell: Cell, passes: list[str], only: str | None) -> tuple[dict, dict[str, str]]:
        """Calls by peer and pass, and for each peer that has none why."""
        raise NotImplementedError

    def sample(self, cell: Cell, tensor: Any) -> np.ndarray:
        raise NotImplementedError

    def prepare(self, cell: Cell, passes: list[str], only: str | None = None) -> tuple[list[Prepared], dict[str, str]]:
        self.calls.clear()
        gc.collect()
        self.calls, absent = self.make_calls(cell, passes, only)
        prepared = []
        for (peer, what), call in list(self.calls.items()):
            try:
                first = call.first()
            except Exception as problem:  # whatever a framework raises where it has no kernel
                absent[peer] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
                del self.calls[peer, what]
                continue
            add = cell.variant == "add_relu"
            names = [name for name in RESULTS[what] if add or name != "dresidual"]
            results = {name: self.sample(cell, value) for name, value in zip(names, first, strict=False)}
            del first
            call.run()
            prepared.append(Prepared(peer, what, *seconds_a_call(call.run, 1), call.steps, results))
        return prepared, absent

    def time(self, peer: str, what: str, calls: int, warm: bool) -> list[float]:
        """Seconds of a step in each of so many calls. `warm`: after one that is not counted."""
        call = self.calls[peer, what]
        if warm:
            call.run()
        return [seconds / call.steps for seconds in seconds_a_call(call.run, calls)]


class CopyWorker:
    """What memory gives: each thread copies, or reads, its share of an array, by the C library."""

    def __init__(self, threads: int):
        self.versions: dict[str, str] = {}
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)
        library = ctypes.CDLL(None)
        self.memcpy, self.memchr = library.memcpy, library.memchr
        self.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self.source, self.target = np.ones(COPY_BYTES[0], np.uint8), np.ones(COPY_BYTES[0], np.uint8)
        self.best: int | None = None

    def copies(self, times: int) -> list[float]:
        """Bytes read and written a second, with non-temporal stores, of so many copies of the size that does best."""
        self.best = self.best or max(COPY_BYTES, key=lambda size: statistics.median(self._copies(9, size)))
        return self._copies(times, self.best)

    def reads(self, times: int) -> list[float]:
        """Bytes read a second, in a search for a byte that is not there."""
        source = self.source.ctypes.data
        return self._rates(times, COPY_BYTES[0], lambda begin, count: self.memchr(source + begin, 0, count))

    def _copies(self, times: int, size: int) -> list[float]:
        source, target = self.source.ctypes.data, self.target.ctypes.data
        copy = lambda begin, count: self.memcpy(target + begin, source + begin, count)  # noqa: E731
        return [2 * rate for rate in self._rates(times, size, copy)]

    def _rates(self, times: int, size: int, work: Callable[[int, int], Any]) -> list[float]:
        share = size // self.threads

        def work_all() -> None:
            list(self.pool.map(lambda i: work(i * share, share), range(self.threads)))

        work_all()
        return [share * self.threads / seconds for seconds in seconds_a_call(work_all, times)]


def serve(make: Callable[[int], Any], threads: int) -> None:
    """Answers (method, arguments) with (result, None) or (None, error) until stdin ends. First come the versions."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints does not disturb the replies
    worker: Any = None
    try:
        worker = make(threads)
        reply = (worker.versions, None)
    except ImportError as problem:
        reply = (None, str(problem))
    while True:
        pickle.dump(reply, replies)
        replies.flush()
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = (getattr(worker, method)(*arguments), None)
        except Exception:
            reply = (None, traceback.format_exc())
