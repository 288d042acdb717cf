"""Every value of float16 and of bfloat16 through the kernels, and errors in units in the last place of these types.

`python -m tfops_testing.sixteen_bits` prints how many results are rounded right, as docs/numerics.md has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tfops_kernels

from . import kernel_cases, oracle
from .kernel_cases import numpy_dtype
from .oracle import Array

# Units in the last place: half of one for rounding, and what float32 adds, whose eps is 2^-13 of float16's. Where terms
# cancel, as in slopes near 0, that is relative to the terms, which are of the size of 1.
BOUND = 0.52
CANCELLED = 4 * 2.0**-24
# What is lost below float32's smallest normal number, where exponentials and their reciprocals vanish or overflow.
_LOST = 2.0**-119
_BITS = {"float16": (11, -24), "bfloat16": (8, -133)}  # of the significand; the exponent of the smallest number


def every_finite(dtype: str) -> np.ndarray:
    """All of them, the even ones first, so that neighbours are in different vectors."""
    values = np.arange(2**16, dtype=np.uint16).reshape(-1, 2).T.ravel().view(numpy_dtype(dtype))
    with np.errstate(invalid="ignore"):  # of signaling NaNs
        return values[np.isfinite(values.astype(np.float64))]


def spacing(values: np.ndarray, dtype: str) -> np.ndarray:
    """How far apart numbers of the type are where these are."""
    digits, least = _BITS[dtype]
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent - digits, least))


def ulps(got: np.ndarray, want: np.ndarray, dtype: str) -> np.ndarray:
    """Errors of results, in units in the last place of what is right. An overflow is right where rounding has it."""
    got = got.astype(np.float64)
    with np.errstate(over="ignore"):
        overflows = np.isinf(want.astype(numpy_dtype(dtype)).astype(np.float64)) & (got == np.copysign(np.inf, want))
    error = np.maximum(np.abs(np.where(overflows, want, got) - want) - _LOST, 0)
    return error / spacing(want, dtype)


def run(x: Array, activation: str | None, kernels: Any = tfops_kernels, place: Any = np.asarray) -> tuple[Array, Array]:
    """y and the slope of values as two channels in inference, where z is x: the mean is 0, and the variance 1."""
    vectors = [place(np.full(2, value, np.float32)) for value in (1, 0, 0, 1)]
    settings: dict[str, Any] = {"axis": -1, "epsilon": 0.0, "training": False, "activation": activation}
    x, ones = place(x.reshape(-1, 2)), place(np.ones_like(x).reshape(-1, 2))
    y = kernels.forward(x, *vectors, **settings).y
    dx = kernels.backward(ones, x, *vectors, **settings).x
    return np.ravel(y), np.ravel(dx)


def main() -> None:
    """Prints the table in docs/numerics.md."""
    print("| activation | y: rounded right | worst, ulp | slope: rounded right | worst, ulp |")
    print("|---|---|---|---|---|")
    for activation in kernel_cases.ACTIVATIONS:
        cells = []
        of_type = []
        for dtype in ("float16", "bfloat16"):
            x = every_finite(dtype)
            z = x.astype(np.float64)
            for got, want in zip(run(x, activation), (oracle.activate, oracle.slope_of), strict=True):
                with np.errstate(over="ignore"):
                    errors = ulps(got, want(activation, z), dtype)
                of_type.append((np.mean(errors <= 0.5), errors.max()))
        for y_or_slope in (0, 1):
            pair = of_type[y_or_slope::2]
            cells.append(", ".join(f"{100 * right:.2f} %" for right, _ in pair))
            cells.append(", ".join(f"{worst:.3f}" for _, worst in pair))
        print(f"| {activation or 'none'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
