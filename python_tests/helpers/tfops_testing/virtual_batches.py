"""Virtual batches on plain arrays, compared with the oracle's results for each of them by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import tfops_kernels

from . import oracle
from .kernel_cases import ACTIVATIONS, DTYPES, PIECEWISE_LINEAR, Case, assert_close, inputs, mask_bits

EPSILON = 0.0009765625

# (shape, axis, virtual batch size): ragged channels, lengths and sizes, a row and all rows to a virtual batch, one
# channel, whose bits are a single row, virtual batches that begin at any address, and some that have many items.
SHAPES = [
    ((6, 5), -1, 1),
    ((12, 3), -1, 4),
    ((300, 7), -1, 50),
    ((64, 16), -1, 16),
    ((8, 9, 11, 24), -1, 2),
    ((66, 129), -1, 33),
    ((15, 1), -1, 5),
    ((9, 13, 1), -1, 3),
    ((6, 2049), -1, 3),
    ((4, 3, 5, 6, 8), -1, 2),
    ((6, 3, 7, 7), 1, 2),
    ((10, 24, 10, 10), 1, 5),
    ((6, 65, 1, 2), 1, 3),
    ((4, 1, 15, 15), 1, 1),
    ((8, 16, 8, 8), 1, 4),
    ((4, 7, 3, 4, 5), 1, 2),
    ((6, 5, 4, 8), 2, 3),
    ((4, 6, 64, 64), 1, 2),
]
LARGE = [((40, 60, 60, 24), -1, 20), ((16, 24, 50, 50), 1, 4), ((60000, 40), -1, 20000), ((300000, 1), -1, 100000)]


def cases(seed: int, shapes: Any = None) -> list[tuple[Case, int]]:
    """Two cases for each shape, with the virtual batch size of each."""
    rng = np.random.default_rng(seed)
    made = []
    for i, (shape, axis, size) in enumerate([each for each in shapes or SHAPES for _ in range(2)]):
        activation = ACTIVATIONS[rng.integers(len(ACTIVATIONS))] if i % 2 else ("relu", None, "relu6")[i // 2 % 3]
        case = Case(shape, axis, DTYPES[(i + i // 4) % 4], True, activation, bool(i % 3))
        factor, unbiased = float(rng.choice([1.0, 0.25])), bool(rng.integers(2))
        made.append((dataclasses.replace(case, exponential_avg_factor=factor, unbiased=unbiased), size))
    return made


def settings_of(case: Case) -> dict[str, Any]:
    return {
        "axis": case.axis,
        "epsilon": EPSILON,
        "training": True,
        "activation": case.activation,
        "exponential_avg_factor": case.exponential_avg_factor,
        "unbiased": case.unbiased,
    }


def check(
    case: Case,
    size: int,
    to_device: Callable[[np.ndarray], Any],
    to_host: Callable[[Any], np.ndarray],
    kernels: Any = tfops_kernels,
    **kwargs: Any,
) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Compares all that forward and backward return, and returns it, and what they were given."""
    arrays = inputs(case)
    device = {name: to_device(array) for name, array in arrays.items()}
    param = "float64" if case.dtype == "float64" else "float32"
    settings = settings_of(case)
    given = ["mean", "variance"] if case.exponential_avg_factor != 1 else []
    names = ["x", "scale", "offset", *given]
    residual = {"residual": device["residual"]} if case.residual else {}
    of_all = {**settings, "virtual_batch_size": size, **kwargs}
    forward = kernels.forward(*(device[name] for name in names), **of_all, **residual)
    parts = [slice(i, i + size) for i in range(0, case.shape[0], size)]
    want, channels = [], case.shape[case.axis]
    assert to_host(forward.saved_mean).shape == to_host(forward.saved_inv_std).shape == (len(parts), channels)
    mask = None if forward.mask is None else np.split(to_host(forward.mask), len(parts))
    z = []
    for k, part in enumerate(parts):
        own = {name: a[part] if a.shape == case.shape else a for name, a in arrays.items()}
        more = {"residual": own["residual"]} if case.residual else {}
        got, w = to_host(forward.y)[part], oracle.forward(*(own[name] for name in names), **settings, **more)
        want.append(w)
        inv_std = 1 / np.sqrt(w.batch_variance + EPSILON)
        slope = np.abs(own["scale"].astype(np.float64)) * inv_std
        wide = [np.abs(oracle.vector_like(v, w.z, case.axis)) for v in (w.batch_mean, slope, own["offset"])]
        terms = (np.abs(own["x"].astype(np.float64)) + 2 * wide[0]) * wide[1] + wide[2]
        terms = terms + np.abs(own["residual"].astype(np.float64)) if case.residual else terms
        assert_close(f"y of {k}", got, w.y, case.dtype, terms)
        spread = np.abs(w.batch_mean) + np.sqrt(w.batch_variance)
        assert_close(f"saved_mean of {k}", to_host(forward.saved_mean)[k], w.batch_mean, param, spread)
        assert_close(f"saved_inv_std of {k}", to_host(forward.saved_inv_std)[k], inv_std, param, inv_std)
        # Which side of its kink an element is on is a matter of rounding, where it is that close.
        near = (np.abs(w.z) < 1e-4) | (np.abs(w.z - 6) < 1e-4)
        if mask is not None:
            is_on = (w.z > 0) & ((w.z < 6) | (case.activation != "relu6"))
            wrong = (mask_bits(mask[k], own["x"].shape, case.axis) != is_on) & ~near
            assert not wrong.any(), f"{wrong.sum()} bits of the mask of {k} are wrong"
        if case.activation in PIECEWISE_LINEAR:
            arrays["dy"][part][near] = 0
        z.append(w.z)
    rest = [np.mean([each.batch_mean for each in want], 0), np.mean([np.abs(each.mean) for each in want], 0)]
    scale = sum(np.abs(v) for v in rest) + np.sqrt(np.mean([each.batch_variance for each in want], 0))
    assert_close("mean", to_host(forward.mean), np.mean([each.mean for each in want], 0), param, scale)
    variance = np.mean([each.variance for each in want], 0)
    assert_close("variance", to_host(forward.variance), variance, param, variance)

    device["dy"] = to_device(arrays["dy"])
    of_statistics = {name: device[name] for name in ("dmean", "dvariance") if given}
    backward = kernels.backward(
        *(device[name] for name in ("dy", "x", "scale", "offset")),
        forward.saved_mean,
        forward.saved_inv_std,
        **of_all,
        **residual,
        **of_statistics,
        mask=forward.mask,
    )
    sums: dict[str, Any] = {"scale": 0, "offset": 0, "of_scale": 0, "of_offset": 0}
    for k, part in enumerate(parts):
        own = {name: a[part] if a.shape == case.shape else a for name, a in arrays.items()}
        more = {"residual": own["residual"]} if case.residual else {}
        more |= {name: own[name].astype(np.longdouble) / len(parts) for name in of_statistics}
        w = oracle.backward(own["dy"], *(own[name] for name in names), **settings, **more, z=z[k])
        others = tuple(i for i in range(w.x.ndim) if i != case.axis % w.x.ndim)
        inv_std = 1 / np.sqrt(want[k].batch_variance + EPSILON)
        slope, dy = np.abs(own["scale"]) * inv_std, np.abs(own["dy"].astype(np.float64)) * 2
        x = np.abs(own["x"].astype(np.float64)) + np.abs(oracle.vector_like(want[k].batch_mean, dy, case.axis))
        sum_dz, sum_dz_xc, n = dy.sum(others), (dy * x).sum(others), dy.size // channels
        sums["scale"] += w.scale
        sums["offset"] += w.offset
        sums["of_scale"] += sum_dz_xc * inv_std
        sums["of_offset"] += sum_dz
        terms = slope * (6 + sum_dz / n + inv_std**2 * np.sqrt(want[k].batch_variance) * sum_dz_xc / n * 4) + 8
        got = to_host(backward.x)[part]
        assert_close(f"dx of {k}", got, w.x, case.dtype, oracle.vector_like(terms, w.x, case.axis))
        if case.residual:
            assert_close(f"dresidual of {k}", to_host(backward.residual)[part], w.residual, case.dtype, 6.0)
    assert_close("dscale", to_host(backward.scale), sums["scale"], param, sums["of_scale"])
    assert_close("doffset", to_host(backward.offset), sums["offset"], param, sums["of_offset"])
    return forward, backward, arrays
