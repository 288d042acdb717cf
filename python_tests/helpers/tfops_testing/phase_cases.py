"""Calls of a machine's phases by themselves, the CPU's or those of a GPU that csrc/simt plays, and their comparison."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tfops_kernels import _kernels

from . import kernel_cases
from .simt import Simt, memory

SHAPES = [
    ((37, 3), -1),
    ((6, 50, 24), -1),
    ((3, 2049), -1),
    ((600, 64), -1),
    ((300, 1), -1),
    ((5, 6, 4, 9), 1),
    ((2, 3, 40, 16), 1),
    ((40, 7, 5), 1),
    ((30, 5, 1), 1),
]


class Phases:
    """Calls the phases of one machine: the CPU, a GPU that csrc/simt plays, or a real one."""

    def __init__(
        self,
        module: Any,
        cuda: bool,
        place: Callable[[np.ndarray], Any],
        threads: int = 2,
        address: Callable[[Any], int] = lambda array: array.ctypes.data,
        fetch: Callable[[Any], np.ndarray] = np.asarray,
        scratch: Callable[[int], Any] = lambda size: memory((size,), np.uint8),  # aligned, whatever the arrays are
    ):
        self.module, self.cuda, self.place, self.threads, self._held = module, cuda, place, threads, []
        self._address_of, self._fetch, self._scratch = address, fetch, scratch

    def _address(self, array: Any) -> int:
        self._held.append(array)
        return self._address_of(array)

    def _mask(self, mask: Any, keep: np.ndarray | None, shape: tuple[int, ...]) -> Any:
        mask.length = shape[-1]
        mask.flags = 0 if keep is None else self._address(self.place(keep.astype(np.uint8)))
        return mask

    def _problem(self, x: np.ndarray, axis: int, activation: str | None = None, residual: bool = False) -> Any:
        return self.module.Problem(
            shape=list(x.shape),
            axis=axis,
            dtype=getattr(self.module.DataType, x.dtype.name),
            activation=activation or "",
            has_residual=residual,
            training=False,
            epsilon=2**-10,
            exponential_avg_factor=1.0,
            unbiased=False,
        )

    def _outputs(self, arrays: Any, like: dict[str, np.ndarray]) -> list[np.ndarray]:
        placed = {name: self.place(np.full_like(array, 77)) for name, array in like.items()}
        for name, array in placed.items():
            setattr(arrays, name, self._address(array))
        return list(placed.values())

    def _call(self, phase: str, direction: str, problem: Any, *arguments: Any) -> None:
        if not self.cuda:
            getattr(self.module, f"cpu_{phase}")(problem, *arguments, self.threads)
            return
        workspace_bytes = getattr(self.module, f"cuda_{direction}_workspace_bytes")(problem)
        workspace = self._scratch(workspace_bytes)
        getattr(self.module, f"cuda_{phase}")(problem, *arguments, self._address(workspace), 0)

    def moments(self, x: np.ndarray, axis: int, keep: np.ndarray | None, vector: np.ndarray) -> list[np.ndarray]:
        arrays = self.module.MomentsArrays()
        arrays.x = self._address(self.place(x))
        arrays.mask = self._mask(self.module.Mask(), keep, x.shape)
        outputs = self._outputs(arrays, dict.fromkeys(("count", "mean", "variance"), vector))
        self._call("moments", "moments", self._problem(x, axis), arrays)
        return [self._fetch(output) for output in outputs]

    def gradient(
        self, given: dict[str, np.ndarray], axis: int, activation: str | None, residual: bool, keep: np.ndarray | None
    ) -> list[np.ndarray]:
        """What both gradient phases write."""
        x, scale = given["x"], given["scale"]
        arrays, statistics = self.module.BackwardArrays(), self.module.StatisticsGradient()
        for field in ("dy", "x", "scale", "offset", "mean", "variance"):
            setattr(arrays, field, self._address(self.place(given[field])))
        if residual:
            arrays.residual = self._address(self.place(given["residual"]))
        for field in ("tilt", "shift"):
            setattr(statistics, field, self._address(self.place(given[field])))
        statistics.mask = self._mask(self.module.Mask(), keep, x.shape)
        problem = self._problem(x, axis, activation, residual)
        outputs = self._outputs(arrays, dict.fromkeys(("dscale", "doffset", "dmean_in", "dvariance_in"), scale))
        self._call("gradient_phase", "backward", problem, arrays, None)
        outputs += self._outputs(arrays, {"dx": x, **({"dresidual": x} if residual else {})})
        self._call("gradient_phase", "backward", problem, arrays, statistics)
        return [self._fetch(output) for output in outputs]


def last_level_cache_bytes():
    """What the kernels take it for (cpu.cc)."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    size = int(path.read_text().rstrip("K\n")) << 10 if path.exists() else 32 << 20
    return min(size, len(os.sched_getaffinity(0)) * (16 << 20))


def make_given(shape, axis, dtype):
    case = kernel_cases.Case(shape, axis, dtype)
    given = kernel_cases.inputs(case)
    rng = np.random.default_rng(8)
    return given | {name: rng.standard_normal(shape[axis]).astype(given["scale"].dtype) for name in ("tilt", "shift")}


def make_keeps(shape):
    rng = np.random.default_rng(9)
    return [None, rng.random(shape[:-1]) < 0.5, np.zeros(shape[:-1], bool)]


def assert_close(got, want, dtype):
    bound = {"float32": 2e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        w = np.asarray(w).astype(np.float64)
        np.testing.assert_allclose(g.astype(np.float64), w, rtol=0, atol=bound * (1 + np.abs(w).max()), err_msg=str(i))


cpu = functools.partial(Phases, _kernels, False, np.copy)


def assert_cuda_agrees(make_cuda: Callable[[int, np.ndarray | None], Phases], shape, axis, dtype):
    """Compares with the CPU: moments, gradients and what statistics add to them, of all elements, some, and none."""
    given = make_given(shape, axis, dtype)
    for i, keep in enumerate(make_keeps(shape)):
        cuda = functools.partial(make_cuda, i, keep)
        assert_close(
            cuda().moments(given["x"], axis, keep, given["scale"]),
            cpu().moments(given["x"], axis, keep, given["scale"]),
            "float64" if dtype == "float64" else "float32",
        )
        activation, residual = [("silu", True), ("leaky_relu", False), (None, False)][i]
        assert_close(
            cuda().gradient(given, axis, activation, residual, keep),
            cpu().gradient(given, axis, activation, residual, keep),
            dtype,
        )


def assert_simt_agrees(simt: Simt, shape, axis, dtype, device):
    def make_cuda(i: int, keep: np.ndarray | None) -> Phases:
        simt.configure(device, seed=i, offset=i % 2 if keep is None or shape[-1] % 8 else 0)
        return Phases(simt.machine, True, simt.place)

    assert_cuda_agrees(make_cuda, shape, axis, dtype)
