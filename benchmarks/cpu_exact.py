"""What cpu_peers.py's steps come to in float64: who is to blame where two peers disagree."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from cpu_worker import EPSILON, RESULTS, memory_shape, numbers, sample_indices
from problems import Cell


def exact(cell: Cell) -> dict[str, np.ndarray]:
    """The results of the cell's pass, of the very numbers that the peers get, sampled as theirs are."""
    data = numbers(cell)
    shape, axis = memory_shape(cell)
    others = tuple(i for i in range(len(shape)) if i != axis)

    def tensor(name: str) -> np.ndarray:
        rounded = data[name].astype(ml_dtypes.bfloat16 if cell.dtype == "bfloat16" else cell.dtype)
        return np.resize(rounded.astype(np.float64), shape)

    def vector(values: np.ndarray) -> np.ndarray:
        return np.expand_dims(values.astype(np.float64), others)

    x = tensor("x")
    mean, variance = vector(data["mean"]), vector(data["variance"])
    if cell.what != "inference":
        mean, variance = x.mean(others, keepdims=True), x.var(others, keepdims=True)
    inv_std = 1 / np.sqrt(variance + EPSILON)
    xhat = (x - mean) * inv_std
    y = xhat * vector(data["scale"]) + vector(data["offset"])
    y += tensor("residual") if cell.variant == "add_relu" else 0
    dz = tensor("dy")
    if cell.variant != "plain":
        dz *= y > 0
        np.maximum(y, 0, out=y)
    dscale, doffset = (dz * xhat).sum(others, keepdims=True), dz.sum(others, keepdims=True)
    n = x.size // x.shape[axis]
    dx = vector(data["scale"]) * inv_std * (dz - (doffset + xhat * dscale) / n)
    found = {"y": y, "dx": dx, "dscale": dscale, "doffset": doffset, "dresidual": dz}
    return {name: found[name].ravel()[sample_indices(found[name].size)] for name in RESULTS[cell.what]}
