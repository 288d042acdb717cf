"""The CPU's phases by themselves agree with float64 NumPy; and CUDA's, run on the CPU by csrc/simt, with those."""

from __future__ import annotations

import functools
from typing import Any

import kernel_cases
import numpy as np
import oracle
import pytest
import simt_runner

from tfops_kernels import _kernels

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
VECTORS = ("scale", "offset", "mean", "variance", "tilt", "shift")


class _Run:
    """Calls the phases of one machine: the CPU, or a GPU that csrc/simt plays."""

    def __init__(self, module: Any, cuda: bool, place: Any, threads: int = 2):
        self.module, self.cuda, self.place, self.threads, self._held = module, cuda, place, threads, []

    def _address(self, array: np.ndarray) -> int:
        self._held.append(array)
        return array.ctypes.data

    def _kept(self, kept: Any, keep: np.ndarray | None, shape: tuple[int, ...]) -> Any:
        kept.length = shape[-1]
        kept.flags = 0 if keep is None else self._address(self.place(keep.astype(np.uint8)))
        return kept

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
        workspace = simt_runner.memory((workspace_bytes,), np.uint8)  # aligned, whatever the arrays are
        getattr(self.module, f"cuda_{phase}")(problem, *arguments, self._address(workspace), 0)

    def moments(self, x: np.ndarray, axis: int, keep: np.ndarray | None, vector: np.ndarray) -> list[np.ndarray]:
        arrays = self.module.MomentsArrays()
        arrays.x = self._address(self.place(x))
        arrays.kept = self._kept(self.module.Kept(), keep, x.shape)
        outputs = self._outputs(arrays, dict.fromkeys(("count", "mean", "variance"), vector))
        self._call("moments", "moments", self._problem(x, axis), arrays)
        return outputs

    def gradient(
        self, given: dict[str, np.ndarray], axis: int, activation: str | None, residual: bool, keep: np.ndarray | None
    ) -> list[np.ndarray]:
        """What both gradient phases write."""
        x, scale = given["x"], given["scale"]
        arrays, statistics = self.module.BackwardArrays(), self.module.StatisticsGradient()
        for field in ("dy", "x", "scale", "offset", "mean"):
            setattr(arrays, field, self._address(self.place(given[field])))
        arrays.spread = self._address(self.place(given["variance"]))
        if residual:
            arrays.residual = self._address(self.place(given["residual"]))
        for field in ("tilt", "shift"):
            setattr(statistics, field, self._address(self.place(given[field])))
        statistics.kept = self._kept(self.module.Kept(), keep, x.shape)
        problem = self._problem(x, axis, activation, residual)
        outputs = self._outputs(arrays, dict.fromkeys(("dscale", "doffset", "dmean_in", "dvariance_in"), scale))
        self._call("gradient_phase", "backward", problem, arrays, None)
        outputs += self._outputs(arrays, {"dx": x, **({"dresidual": x} if residual else {})})
        self._call("gradient_phase", "backward", problem, arrays, statistics)
        return outputs


def _given(shape, axis, dtype):
    case = kernel_cases.Case(shape, axis, dtype)
    given = kernel_cases.inputs(case)
    rng = np.random.default_rng(8)
    return given | {name: rng.standard_normal(shape[axis]).astype(given["scale"].dtype) for name in ("tilt", "shift")}


def _keeps(shape):
    rng = np.random.default_rng(9)
    return [None, rng.random(shape[:-1]) < 0.5, np.zeros(shape[:-1], bool)]


def _assert_close(got, want, dtype):
    bound = {"float32": 2e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        w = np.asarray(w).astype(np.float64)
        np.testing.assert_allclose(g.astype(np.float64), w, rtol=0, atol=bound * (1 + np.abs(w).max()), err_msg=str(i))


cpu = functools.partial(_Run, _kernels, False, np.copy)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_cpu(shape, axis, dtype):
    given = _given(shape, axis, dtype)
    # A z near a kink would be on either side of it.
    activation = "silu" if dtype != "float64" else "relu6"
    want = oracle.backward(
        given["dy"],
        given["x"],
        given["scale"],
        given["offset"],
        given["mean"],
        given["variance"],
        residual=given["residual"],
        axis=axis,
        epsilon=2**-10,
        training=False,
        activation=activation,
    )
    vector = functools.partial(oracle.vector_like, x=given["x"], axis=axis)
    xc = given["x"].astype(np.float64) - vector(given["mean"].astype(np.float64))
    for keep in _keeps(shape):
        got = cpu().gradient(given, axis, activation, True, keep)
        kept = 1 if keep is None else keep[..., None]
        dx = want.x + kept * (xc * vector(given["tilt"]) + vector(given["shift"]))
        _assert_close(got, [want.scale, want.offset, want.mean, want.variance, dx, want.residual], dtype)


@pytest.mark.parametrize(("shape", "axis"), [((3000, 128), -1), ((8, 6, 100, 99), 1)], ids=str)
def test_cpu_threads_change_nothing(shape, axis):
    given = _given(shape, axis, "float32")
    for keep in _keeps(shape)[:2]:
        results = [
            cpu(threads=n).moments(given["x"], axis, keep, given["scale"])
            + cpu(threads=n).gradient(given, axis, "relu", True, keep)
            for n in (1, 2, 5)
        ]
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(got, want)


def assert_cuda_agrees(simt, shape, axis, dtype, device):
    given = _given(shape, axis, dtype)
    for i, keep in enumerate(_keeps(shape)):
        simt.configure(device, seed=i, offset=i % 2 if keep is None or shape[-1] % 8 else 0)
        cuda = functools.partial(_Run, simt.machine, True, simt.place)
        _assert_close(
            cuda().moments(given["x"], axis, keep, given["scale"]),
            cpu().moments(given["x"], axis, keep, given["scale"]),
            "float64" if dtype == "float64" else "float32",
        )
        activation, residual = [("silu", True), ("leaky_relu", False), (None, False)][i]
        _assert_close(
            cuda().gradient(given, axis, activation, residual, keep),
            cpu().gradient(given, axis, activation, residual, keep),
            dtype,
        )


@pytest.mark.parametrize("device", ["three", "small"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_cuda_by_simt(simt, shape, axis, dtype, device):
    assert_cuda_agrees(simt, shape, axis, dtype, device)
