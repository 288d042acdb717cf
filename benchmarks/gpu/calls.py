"""Calls of the kernels for a cell, and the check of their results against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from problems import Cell
from tfops_kernels import _policy

from .cells import to_layout

EPSILON = 1e-3
MOMENTUM = 0.01
ROUNDING = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23}  # an ulp of 1


class Tensors:
    """One set of a cell's inputs."""

    def __init__(self, backend: Any, cell: Cell):
        shape, self.axis = to_layout(cell)
        channels = shape[self.axis]
        self.x = backend.normal(shape, cell.dtype)
        self.dy = backend.normal(shape, cell.dtype) if cell.what == "backward" else None
        self.residual = backend.normal(shape, cell.dtype) if cell.variant == "add_relu" else None
        self.scale, self.offset = backend.uniform(channels), backend.uniform(channels, -0.5)
        self.mean, self.variance = backend.uniform(channels, -0.5), backend.uniform(channels)


def make_problem(raw: Any, cell: Cell) -> Any:
    shape, axis = to_layout(cell)
    training = cell.what != "inference"
    return raw.Problem(
        shape=list(shape),
        axis=axis,
        dtype=getattr(raw.DataType, cell.dtype),
        activation="" if cell.variant == "plain" else "relu",
        has_residual=cell.variant == "add_relu",
        training=training,
        epsilon=EPSILON,
        exponential_avg_factor=MOMENTUM if training else 1.0,
        unbiased=True,
    )


def make_call(backend: Any, cell: Cell, t: Tensors) -> tuple[Callable[[], None], dict[str, Any]]:
    """A call of the kernels with everything allocated, and its results by name."""
    raw = backend.raw
    problem = make_problem(raw, cell)
    channels = t.scale.shape
    add = cell.variant == "add_relu"
    out: dict[str, Any] = {"y": backend.empty(t.x.shape, cell.dtype)}
    for name in ("mean_out", "variance_out", "saved_mean", "saved_inv_std"):
        out[name] = backend.empty(channels, "float32")
    if problem.needs_activation_bits:
        out["activation_bits"] = backend.empty((problem.activation_bits_bytes,), "uint8")
    forward = raw.ForwardArrays()
    for name in ("x", "scale", "offset", "mean", "variance"):
        setattr(forward, name, backend.address(getattr(t, name)))
    if add:
        forward.residual = backend.address(t.residual)
    for name, array in out.items():
        setattr(forward, name, backend.address(array))

    def make_forward() -> Callable[[], None]:
        workspace = backend.empty((raw.cuda_forward_workspace_bytes(problem) + 16,), "uint8")
        return lambda: raw.cuda_forward(problem, forward, backend.address(workspace), backend.stream())

    if cell.what != "backward":
        return make_forward(), out
    with _policy.settings(raw, tier=""):  # a tier that is forced is the backward pass'; forward may be without it
        make_forward()()
    out["dx"] = backend.empty(t.x.shape, cell.dtype)
    out["dscale"], out["doffset"] = backend.empty(channels, "float32"), backend.empty(channels, "float32")
    if add:
        out["dresidual"] = backend.empty(t.x.shape, cell.dtype)
    backward = raw.BackwardArrays()
    for name in ("dy", "x", "scale", "offset"):
        setattr(backward, name, backend.address(getattr(t, name)))
    backward.mean, backward.inv_std = backend.address(out["saved_mean"]), backend.address(out["saved_inv_std"])
    for name in ("activation_bits", "dx", "dscale", "doffset", "dresidual"):
        if name in out:
            setattr(backward, name, backend.address(out[name]))
    workspace = backend.empty((raw.cuda_backward_workspace_bytes(problem) + 16,), "uint8")

    def run_backward() -> None:
        raw.cuda_backward(problem, backward, backend.address(workspace), backend.stream())

    return run_backward, out


def check(backend: Any, cell: Cell, t: Tensors, call: Callable[[], None], out: dict[str, Any]) -> dict[str, float]:
    """The largest error of each result against float64, in units of what rounding allows: up to 1 is right."""
    call()
    x = backend.wide(t.x)
    others = tuple(i for i in range(len(x.shape)) if i != t.axis)
    n = 1
    for i in others:
        n *= x.shape[i]

    def view(v: Any) -> Any:
        return v.reshape([-1 if i == t.axis else 1 for i in range(len(x.shape))])

    single = ROUNDING["float32"]
    errors: dict[str, float] = {}

    def compare(name: str, want: Any, terms: Any, dtype: str, where: Any = None) -> None:
        """`terms`: the size of what was added up, which rounds."""
        bound = ROUNDING[dtype] * abs(want) + 32 * single * terms
        off = abs(backend.wide(out[name]) - want) / bound
        if where is not None:
            off = off * where
        largest = float(off.max())
        errors[name] = largest if largest == largest else float("inf")  # NaN, too, is wrong

    training = cell.what != "inference"
    mean, variance = backend.wide(t.mean), backend.wide(t.variance)
    if training:
        running_mean, running_variance = mean, variance
        mean = x.sum(others) / n
        squares = ((x - view(mean)) ** 2).sum(others)
        variance = squares / n
        spread = abs(mean) + variance**0.5
        compare("saved_mean", mean, spread, "float32")
        compare("saved_inv_std", (variance + EPSILON) ** -0.5, (variance + EPSILON) ** -0.5, "float32")
        new_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        compare("mean_out", new_mean, spread + abs(running_mean), "float32")
        new_variance = (1 - MOMENTUM) * running_variance + MOMENTUM * squares / max(n - 1, 1)
        compare("variance_out", new_variance, variance + running_variance, "float32")
    inv_std = (variance + EPSILON) ** -0.5
    slope = backend.wide(t.scale) * inv_std
    xc = x - view(mean)
    z = xc * view(slope) + view(backend.wide(t.offset))
    if t.residual is not None:
        z = z + backend.wide(t.residual)
    on = (z > 0) if cell.variant != "plain" else (z == z)
    terms = (abs(xc) + view(abs(mean))) * view(slope) + abs(z) + 2
    compare("y", z * on, terms, cell.dtype)
    if cell.what != "backward":
        return errors
    # Which side of the kink an element is on is a matter of rounding, where it is that close.
    safe = None if cell.variant == "plain" else abs(z) > 1e-4
    dz = backend.wide(t.dy) * on
    sum_dz, sum_dz_xc = dz.sum(others), (dz * xc).sum(others)
    dx = (dz - view(sum_dz / n) - xc * view(inv_std**2 * sum_dz_xc / n)) * view(slope)
    compare("dx", dx, (abs(dz) + 2 + abs(xc) * view(inv_std)) * view(slope), cell.dtype, safe)
    # A few elements near the kink may have gone the other way.
    doubt = 0 if safe is None else (abs(backend.wide(t.dy)) * (abs(z) <= 1e-4)).sum(others) / (32 * single)
    absolute = abs(dz).sum(others)
    compare("doffset", sum_dz, absolute + doubt, "float32")
    terms = (abs(dz * xc).sum(others) + absolute * abs(mean)) * inv_std + 8 * doubt
    compare("dscale", sum_dz_xc * inv_std, terms, "float32")
    if "dresidual" in out:
        compare("dresidual", dz, abs(dz) + 1e-3, cell.dtype, safe)
    return errors
