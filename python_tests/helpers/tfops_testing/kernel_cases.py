"""Problems for the kernels on plain arrays, and their comparison with the oracle: the same for CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import tfops_kernels

from . import oracle

NAMES = tuple(name or None for name in tfops_kernels._kernels.ACTIVATIONS)
BOUNDED_RELU = "relu(max_value=2.5, negative_slope=0.125, threshold=0.5)"
PARAMETRIZED = ("leaky_relu(negative_slope=0.01)", "elu(alpha=0.5)", BOUNDED_RELU)
ACTIVATIONS = (*NAMES, *PARAMETRIZED)
PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu", "leaky_relu(negative_slope=0.01)")
SMOOTH = tuple(name for name in ACTIVATIONS if name not in (None, *PIECEWISE_LINEAR))
COMMON = (
    None,
    *PIECEWISE_LINEAR[:3],
    "silu",
)  # which loops of the CPU kernels know; the other smooth ones share theirs
JUMPS = {"elu(alpha=0.5)": (0.0,), BOUNDED_RELU: (0.5, 2.5)}  # of the slope, or of the function itself
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Half an ulp of the data type: what rounding a result to it costs, relative to the result.
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}

# (shape, axis): ragged channels and lengths; ranks 2 to 5; few and many rows, channels and pixels.
SHAPES = [
    ((5, 1), -1),
    ((300, 3), -1),
    ((37, 7), -1),
    ((2, 9, 11, 24), -1),
    ((64, 16), -1),
    ((1030, 65), -1),
    ((33, 129), -1),
    ((3, 2049), -1),
    ((260, 300), -1),
    ((4, 3, 5, 6, 8), -1),
    ((100000, 1), -1),
    ((4000, 40), -1),
    ((2, 3, 7, 7), 1),
    ((5, 24, 10, 10), 1),
    ((3, 65, 1, 2), 1),
    ((1, 2, 200, 201), 1),
    ((2, 1, 150, 150), 1),
    ((2, 7, 3, 4, 5), 1),
    ((4, 2049, 3), 1),
    ((6, 5, 4), 0),
    ((1, 5), -1),
    ((2, 19), -1),
    ((8, 48, 33, 31), 1),
]


@dataclass
class Case:
    shape: tuple[int, ...]
    axis: int
    dtype: str
    training: bool = True
    activation: str | None = None
    residual: bool = False
    exponential_avg_factor: float = 1.0
    unbiased: bool = True

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), f"axis{self.axis}", self.dtype]
        parts += ["training" if self.training else "inference", self.activation or "linear"]
        return "-".join(parts + ["residual"] * self.residual)


def random_cases(seed: int, count: int) -> list[Case]:
    """Combinations of everything, `count` of them for each shape."""
    rng = np.random.default_rng(seed)
    cases = []
    for shape, axis in SHAPES:
        for i in range(count):
            cases.append(
                Case(
                    shape,
                    axis,
                    DTYPES[i % 4],
                    training=bool(rng.integers(4)),
                    activation=ACTIVATIONS[rng.integers(len(ACTIVATIONS))],
                    residual=bool(rng.integers(2)),
                    exponential_avg_factor=float(rng.choice([1.0, 0.25])),
                    unbiased=bool(rng.integers(2)),
                )
            )
    return cases


def combinations(shape: tuple[int, ...], axis: int) -> list[Case]:
    """Every dtype, mode and residual at one shape, with activations of every kind."""
    return [
        Case(shape, axis, dtype, training, activation, residual)
        for dtype in DTYPES
        for training in (True, False)
        for activation in (*COMMON, "gelu")
        for residual in (False, True)
    ]


def smooth(shape: tuple[int, ...], axis: int) -> list[Case]:
    """Every smooth activation, in every dtype and mode, with a residual in half of the cases."""
    modes = [(dtype, training) for dtype in DTYPES for training in (True, False)]
    return [
        Case(shape, axis, dtype, training, activation, bool((i + j) % 2))
        for i, activation in enumerate(SMOOTH)
        for j, (dtype, training) in enumerate(modes)
    ]


def make_problem(kernels: Any, case: Case, **others: Any) -> Any:
    """The case as the module `_kernels`, or csrc/simt's, has it. `others`: what a case does not have."""
    return kernels.Problem(
        shape=list(case.shape),
        axis=case.axis,
        dtype=getattr(kernels.DataType, case.dtype),
        activation=case.activation or "",
        has_residual=case.residual,
        training=case.training,
        epsilon=1e-3,
        exponential_avg_factor=case.exponential_avg_factor,
        unbiased=case.unbiased,
        **others,
    )


def numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def inputs(case: Case, seed: int = 0, mean_over_std: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype, param = numpy_dtype(case.dtype), np.float64 if case.dtype == "float64" else np.float32
    channels = case.shape[case.axis]

    def data(center: float = 0.0) -> np.ndarray:
        return (rng.standard_normal(case.shape) + center).astype(dtype)

    def vector(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, channels).astype(param)

    return {
        "x": data(mean_over_std),
        "scale": vector(0.5, 2) * rng.choice([-1, 1], channels).astype(param),
        "offset": vector(-1, 3),
        "mean": vector(0, 2),
        "variance": vector(0.5, 2),
        "residual": data(),
        "dy": data(),
        "dmean": vector(-1, 1),
        "dvariance": vector(-1, 1),
    }


def assert_close(name: str, got: Any, want: np.ndarray, dtype: str, scale: float | np.ndarray = 1.0) -> None:
    """|got - want| <= rounding of the result to dtype + 16 eps x scale, eps of the type of all arithmetic."""
    got = np.asarray(got).astype(np.float64)
    want, scale = want.astype(np.float64), np.asarray(scale, np.float64)
    compute = ROUNDING["float64" if dtype == "float64" else "float32"]
    bound = ROUNDING[dtype] * 1.01 * np.abs(want) + 32 * compute * scale
    # Smaller halves are subnormal, and lose bits.
    bound = bound + (2**-25 if dtype == "float16" else 0)
    excess = np.abs(got - want) - bound
    assert got.shape == want.shape, f"{name}: shape {got.shape}, not {want.shape}"
    if want.size == 0:
        return
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
    assert not np.isnan(excess).any(), f"{name}: NaN at {worst}"
    assert excess[worst] <= 0, f"{name}{list(map(int, worst))} is {got[worst]}, not {want[worst]} (+- {bound[worst]})"


def mask_bits(mask: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """A mask's bits, as bools of the shape of x. Asserts that those past the ends of rows are zero."""
    inner = int(np.prod(shape[axis % len(shape) + 1 :]))
    run = int(np.prod(shape)) if shape[axis] == 1 else inner if inner > 1 else shape[axis]
    rows = int(np.prod(shape)) // run
    bits = np.unpackbits(mask.reshape(rows, (run + 7) // 8), axis=1, bitorder="little")
    assert not bits[:, run:].any(), "the mask has bits past the end of a row"
    return bits[:, :run].astype(bool).reshape(shape)


def check(
    case: Case,
    to_device: Callable[[np.ndarray], Any],
    to_host: Callable[[Any], np.ndarray],
    kernels: Any = tfops_kernels,
    **kwargs: Any,
) -> None:
    """Runs forward and backward of a case, and compares every result with the oracle's."""
    arrays = inputs(case)
    device = {name: to_device(array) for name, array in arrays.items()}
    param = "float64" if case.dtype == "float64" else "float32"
    settings = {
        "axis": case.axis,
        "epsilon": 0.0009765625,
        "training": case.training,
        "activation": case.activation,
        "exponential_avg_factor": case.exponential_avg_factor,
        "unbiased": case.unbiased,
    }
    names = ["x", "scale", "offset"]
    given = not case.training or case.exponential_avg_factor != 1
    if given:
        names += ["mean", "variance"]
    residual = {"residual": arrays["residual"]} if case.residual else {}
    got = kernels.forward(
        *(device[name] for name in names),
        **settings,
        **({"residual": device["residual"]} if case.residual else {}),
        **kwargs,
    )
    want = oracle.forward(*(arrays[name] for name in names), **settings, **residual)
    inv_std = 1 / np.sqrt(want.batch_variance + settings["epsilon"])
    slope = np.abs(arrays["scale"].astype(np.float64)) * inv_std

    def vector(v: np.ndarray) -> np.ndarray:
        return oracle.vector_like(v, want.z, case.axis)

    # Each term of z brings its own rounding error, whatever their sum.
    xc = np.abs(arrays["x"].astype(np.float64) - vector(want.batch_mean))
    terms = (xc + np.abs(vector(want.batch_mean))) * vector(slope) + np.abs(vector(arrays["offset"]))
    if case.residual:
        terms = terms + np.abs(arrays["residual"].astype(np.float64))
    y = to_host(got.y)
    for jump in JUMPS.get(case.activation or "", ()):  # on which side of it an element is, is a matter of rounding
        near = np.abs(want.z - jump) < 1e-4
        want.y[near] = y.astype(want.y.dtype)[near]
        arrays["dy"] = np.where(near, 0, arrays["dy"]).astype(arrays["dy"].dtype)
        device["dy"] = to_device(arrays["dy"])
    assert_close("y", y, want.y, case.dtype, terms)
    if case.training:
        spread = np.abs(want.batch_mean) + np.sqrt(want.batch_variance)
        assert_close("mean", to_host(got.mean), want.mean, param, spread + np.abs(want.mean))
        assert_close("variance", to_host(got.variance), want.variance, param, want.batch_variance + want.variance)
        assert_close("saved_mean", to_host(got.saved_mean), want.batch_mean, param, spread)
        assert_close("saved_inv_std", to_host(got.saved_inv_std), inv_std, param, inv_std)

    if got.mask is not None and 0 not in case.shape:
        slope_is_one = (want.z > 0) & ((want.z < 6) | (case.activation != "relu6"))
        near = (np.abs(want.z) < 1e-4) | ((np.abs(want.z - 6) < 1e-4) & (case.activation == "relu6"))
        wrong = (mask_bits(to_host(got.mask), case.shape, case.axis) != slope_is_one) & ~near
        assert not wrong.any(), f"{wrong.sum()} bits of the mask are wrong, the first at {np.argwhere(wrong)[0]}"

    # Which side of its kink an element is on is a matter of rounding, where it is that close: take the kernel's word.
    z = want.z.copy()
    if case.activation in PIECEWISE_LINEAR:
        y = to_host(got.y).astype(np.float64)
        near = np.abs(z) < 1e-4
        z[near] = np.where(y[near] > 0, 1.0, -1.0)
        near = np.abs(z - 6) < 1e-4
        z[near & (case.activation == "relu6")] = 5.0
        dy = arrays["dy"].copy()
        dy[near & (case.activation == "relu6")] = 0
        arrays["dy"], device["dy"] = dy, to_device(dy)
    saved = (got.saved_mean, got.saved_inv_std) if case.training else (device["mean"], device["variance"])
    statistics = {"dmean": "dmean", "dvariance": "dvariance"} if case.training and given else {}
    gradient = kernels.backward(
        device["dy"],
        device["x"],
        device["scale"],
        device["offset"],
        *saved,
        **settings,
        **{name: device[key] for name, key in statistics.items()},
        **({"residual": device["residual"]} if case.residual else {}),
        mask=got.mask,
        **kwargs,
    )
    wanted = oracle.backward(
        arrays["dy"],
        *(arrays[name] for name in names),
        **settings,
        **{name: arrays[key] for name, key in statistics.items()},
        **residual,
        z=z,
    )
    # Sums round in proportion to what is summed, not to what comes out.
    absolute = oracle.backward(
        np.abs(arrays["dy"].astype(np.float64)),
        *(arrays[name] for name in names),
        **{**settings, "activation": None},
    )
    others = tuple(i for i in range(z.ndim) if i != case.axis % z.ndim)
    spread = np.sqrt(want.batch_variance)
    sum_dz = absolute.offset
    sum_dz_xc = (np.abs(arrays["dy"].astype(np.float64)) * xc).sum(others) + sum_dz * np.abs(want.batch_mean)
    assert_close("doffset", to_host(gradient.offset), wanted.offset, param, 2 * sum_dz)
    assert_close("dscale", to_host(gradient.scale), wanted.scale, param, sum_dz_xc * inv_std)
    if not case.training:
        assert_close("dmean", to_host(gradient.mean), wanted.mean, param, slope * sum_dz)
        assert_close("dvariance", to_host(gradient.variance), wanted.variance, param, slope * inv_std**2 * sum_dz_xc)
    n = max(z.size // z.shape[case.axis], 1)
    terms = slope * (6 + sum_dz / n + (inv_std**2 * spread) * sum_dz_xc / n * 4) + 8
    assert_close("dx", to_host(gradient.x), wanted.x, case.dtype, vector(terms))
    if case.residual:
        assert_close("dresidual", to_host(gradient.residual), wanted.residual, case.dtype, 6.0)
