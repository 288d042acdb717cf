"""How far batch normalization in training is from exact, for tfops and for what else there is.

    python benchmarks/accuracy.py                          # every type and case, on the CPU
    python benchmarks/accuracy.py --device gpu --dtype float32 --case ratio constant

Data are normal with |mean|/std from 1 to 10^6; all the same; with outliers; very small and very large; and 10^8
elements a channel. References are float64, and long double where the data are float64. What a type cannot tell apart
(16-bit types at large ratios) is replaced by data of two neighbouring values with that ratio. Errors of tfops are
compared with its bounds, which `errors` states: exceeding one is exit status 1. A last case, "fused", is about what
follows normalization (accuracy_fused.py).

Rows go into OUT.json, in the place of rows of the same device, type, layout, case and peer; OUT.md and OUT.svg (with
matplotlib) are made of all that are there.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import accuracy_fused
from accuracy_report import QUANTITIES, markdown, plot

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

EPSILON = 2.0**-10
DTYPES = ("float32", "float64", "bfloat16", "float16")
PEERS = ("tfops", "tf", "tf_jit", "keras", "keras_jit", "torch")
RATIOS = tuple(10.0**k for k in range(7))
OUT = Path(__file__).parent / "results" / "accuracy"
CHUNK = 1 << 20

Array = np.ndarray


def kind(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def eps(dtype: str) -> float:
    """That of the arithmetic."""
    return 2.0**-52 if dtype == "float64" else 2.0**-23


def rounding(dtype: str) -> float:
    """What storing a result in a type narrower than the arithmetic costs, relative to it."""
    return {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Data: [C, n], channel by channel.


class Problem(NamedTuple):
    x: Array
    dy: Array
    scale: Array
    offset: Array


class Case(NamedTuple):
    name: str
    make: Callable[[np.random.Generator, int, int, str], Array]
    ratio: float = 0.0  # |mean| / std, where that is what the case is about


def _normal(ratio: float) -> Callable[..., Array]:
    def make(rng: np.random.Generator, channels: int, n: int, dtype: str) -> Array:
        x = np.empty((channels, n), kind(dtype))
        resolution = float(ml_dtypes.finfo(kind(dtype)).eps) * ratio
        if resolution < 1:
            for row in x:
                for begin in range(0, n, CHUNK):
                    row[begin : begin + CHUNK] = rng.standard_normal(min(CHUNK, n - begin)) + ratio
            return x
        # Two neighbours, the upper one so rarely that the ratio comes out.
        base = np.array(40000, x.dtype)
        step = float(np.nextafter(base, np.array(np.inf, x.dtype)).astype(np.float64) - base.astype(np.float64))
        x[:] = base
        count = max(1, round(n * (float(base) / step / ratio) ** 2))
        for row in x:
            row[rng.choice(n, count, replace=False)] = float(base) + step
        return x

    return make


def _constant(rng: np.random.Generator, channels: int, n: int, dtype: str) -> Array:
    values = np.array([7.3, -1234.5, 1e-3, 60000.0])[np.arange(channels) % 4]
    return np.repeat(values.astype(kind(dtype))[:, None], n, axis=1)


def _outliers(rng: np.random.Generator, channels: int, n: int, dtype: str) -> Array:
    """One element in the first place, in the last, in the middle, or 10 anywhere, 10^4 deviations away."""
    x = rng.standard_normal((channels, n))
    for c, row in enumerate(x):
        row[([0], [n - 1], [n // 2], rng.choice(n, min(n, 10), replace=False))[c % 4]] = 1e4
    return x.astype(kind(dtype))


def _sized(size: float) -> Callable[..., Array]:
    def make(rng: np.random.Generator, channels: int, n: int, dtype: str) -> Array:
        return ((rng.standard_normal((channels, n)) + 1) * size).astype(kind(dtype))

    return make


CASES = (
    *(Case(f"ratio 1e{round(math.log10(ratio))}", _normal(ratio), ratio) for ratio in RATIOS),
    Case("constant", _constant),
    Case("outliers", _outliers),
    Case("small 1e-15", _sized(1e-15)),
    Case("large 1e15", _sized(1e15)),
    Case("many, ratio 1e0", _normal(1.0)),
    Case("many, ratio 1e3", _normal(1e3)),
)


def is_possible(case: Case, dtype: str, n: int) -> bool:
    if dtype == "float16" and ("1e15" in case.name or "1e-15" in case.name):
        return False
    # One element of n that differs by an ulp of 2^-p: no ratio is larger than about 2^p sqrt(n).
    return dtype in ("float32", "float64") or case.ratio <= 0.9 * math.sqrt(n) / float(ml_dtypes.finfo(kind(dtype)).eps)


def make_problem(case: Case, dtype: str, channels: int, n: int) -> Problem:
    rng = np.random.default_rng(0)
    param = np.float64 if dtype == "float64" else np.float32
    x = case.make(rng, channels, n, dtype)
    dy = np.empty_like(x)
    for row in dy:
        for begin in range(0, n, CHUNK):
            row[begin : begin + CHUNK] = rng.standard_normal(min(CHUNK, n - begin)) + 0.5
    scale, offset = (rng.uniform(low, 2, channels).astype(param) for low in (0.5, -2))
    return Problem(x, dy, scale, offset)


# ----------------------------------------------------------------------------------------------------------------------
# The reference, piece by piece, for 10^8 long doubles are too many at once.


class Statistics(NamedTuple):
    """[C] each."""

    n: int
    mean: Array
    variance: Array
    inv_std: Array
    sum_dz: Array
    sum_dz_xhat: Array
    sum_abs_dz: Array
    sum_abs_dz_xhat: Array


def _pieces(*arrays: Array) -> Iterator[tuple[slice, list[Array]]]:
    wide = np.longdouble if arrays[0].dtype == np.float64 else np.float64
    for begin in range(0, arrays[0].shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        yield part, [array[:, part].astype(wide) for array in arrays]


def _total(terms: Iterator[Array]) -> Array:
    return functools.reduce(np.add, (term.sum(1).astype(np.longdouble) for term in terms))


def statistics(problem: Problem) -> Statistics:
    x, dy, n = problem.x, problem.dy, problem.x.shape[1]
    rough = _total(x for _, (x,) in _pieces(x)) / n
    mean = rough + _total(x - rough[:, None] for _, (x,) in _pieces(x)) / n
    column = mean[:, None]
    variance = _total(np.square(x - column) for _, (x,) in _pieces(x)) / n
    inv_std = 1 / np.sqrt(variance + np.longdouble(EPSILON))
    sums = [
        _total(f(dy, (x - column) * inv_std[:, None]) for _, (x, dy) in _pieces(x, dy))
        for f in (lambda dy, _: dy, lambda dy, h: dy * h, lambda dy, _: abs(dy), lambda dy, h: abs(dy * h))
    ]
    return Statistics(n, mean, variance, inv_std, *sums)


class Result(NamedTuple):
    """What a peer returns: y and dx like Problem.x, the rest [C]; variance with n - 1 if `unbiased`."""

    y: Array
    mean: Array
    variance: Array
    dx: Array
    dscale: Array
    doffset: Array
    unbiased: bool = True


class Errors(NamedTuple):
    """By quantity, each without dimension."""

    largest: dict[str, float]
    bound: dict[str, float]  # of tfops, at the element with the largest error
    of_bound: dict[str, float]  # the largest error / bound


def errors(problem: Problem, s: Statistics, got: Result, dtype: str) -> Errors:
    """How far a result is from exact, and from the bounds of tfops.

    With xhat = (x - mean) / std, r = |mean| / std, std = sqrt(variance + epsilon), eps of the arithmetic's type:

        mean      <= eps (|mean| + std); 8 times that in float64
        variance  <= 84 eps variance, which is 1e-5 in float32; (84 + 8 r) eps variance in float64
        y         <= 8 eps (|scale| (1 + r + |xhat|) + |offset|)
        dx        <= 8 eps (1 + r) |scale| / std (|dy| + (1 + |xhat|) (mean of |dy| + mean of |dy xhat|))
        dscale    <= 8 eps (1 + r) sum of |dy| (1 + |xhat|)
        doffset   <= 8 eps sum of |dy|

    y and dx, and half an ulp where their type is narrower than the arithmetic's. In float64 mean and variance have
    more, for means are merged in the same type, not in a wider one.
    """
    e, half = eps(dtype), rounding(dtype)
    scale, offset = problem.scale.astype(np.longdouble), problem.offset.astype(np.longdouble)
    r = abs(s.mean) * s.inv_std
    merges, spread = (8, 84 + 8 * r) if dtype == "float64" else (1, 84)
    result = Errors({}, {}, {})

    def note(name: str, got: Array, want: Array, unit: Any, bound: Any) -> None:
        error = abs(got.astype(want.dtype) - want)
        error = np.where(np.isnan(error), np.inf, error)
        excess = np.where(error == 0, 0, error / np.maximum(bound, np.finfo(np.float64).tiny))
        result.of_bound[name] = max(result.of_bound.get(name, 0.0), float(excess.max()))
        error, bound = error / unit, np.broadcast_to(bound / unit, error.shape)
        if error.max() >= result.largest.get(name, 0.0):
            result.largest[name] = float(error.max())
            result.bound[name] = float(bound.flat[error.argmax()])

    n = s.n
    variance = s.variance * (n / max(n - 1, 1) if got.unbiased else 1)
    note("mean", got.mean, s.mean, 1 / s.inv_std, e * merges * (abs(s.mean) + 1 / s.inv_std))
    note("variance", got.variance, variance, np.where(variance > 0, variance, EPSILON), spread * e * variance)
    dz_terms = s.sum_abs_dz + s.sum_abs_dz_xhat
    note("dscale", got.dscale, s.sum_dz_xhat, dz_terms, 8 * e * (1 + r) * dz_terms)
    note("doffset", got.doffset, s.sum_dz, s.sum_abs_dz, 8 * e * s.sum_abs_dz)

    slope = scale * s.inv_std

    def column(v: Array) -> Array:
        return v.astype(np.longdouble if dtype == "float64" else np.float64)[:, None]

    y_unit, dx_unit = column(abs(scale) + abs(offset) + 1), column(abs(slope) * s.sum_abs_dz / n)
    for part, (x, dy) in _pieces(problem.x, problem.dy):
        xhat = (x - column(s.mean)) * column(s.inv_std)
        y = xhat * column(scale) + column(offset)
        dx = column(slope) * (dy - column(s.sum_dz / n) - xhat * column(s.sum_dz_xhat / n))
        y_bound = 8 * e * (column(abs(scale)) * (1 + column(r) + abs(xhat)) + column(abs(offset))) + half * abs(y)
        dx_bound = 8 * e * column((1 + r) * abs(slope)) * (abs(dy) + (1 + abs(xhat)) * column(dz_terms / n))
        dx_bound = dx_bound + half * abs(dx)
        if dtype == "float16":  # denormal halves
            y_bound, dx_bound = y_bound + 2.0**-25, dx_bound + 2.0**-25
        note("y", got.y[:, part], y, y_unit, y_bound)
        note("dx", got.dx[:, part], dx, dx_unit, dx_bound)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Tensors, and who normalizes them.


class Layout(NamedTuple):
    """[C, n] as a tensor of rank 4, and back."""

    name: str
    batch: int

    def shape(self, channels: int, n: int) -> tuple[int, ...]:
        height = math.isqrt(n // self.batch)
        while n // self.batch % height:
            height -= 1
        pixels = (height, n // self.batch // height)
        return (self.batch, *pixels, channels) if self.name == "NHWC" else (self.batch, channels, *pixels)

    def tensor(self, data: Array) -> Array:
        shape = self.shape(*data.shape)
        if self.name == "NHWC":
            return np.ascontiguousarray(data.T).reshape(shape)
        return np.ascontiguousarray(data.reshape(len(data), self.batch, -1).transpose(1, 0, 2)).reshape(shape)

    def data(self, tensor: Array) -> Array:
        if self.name == "NHWC":
            return tensor.reshape(-1, tensor.shape[-1]).T
        return tensor.reshape(*tensor.shape[:2], -1).transpose(1, 0, 2).reshape(tensor.shape[1], -1)


@functools.cache
def _tensorflow_step(peer: str, dtype: str, layout: str, channels: int) -> Callable[..., Any]:
    import keras
    import tensorflow as tf

    import tfops

    jit = peer.endswith("_jit")
    layer = None
    if peer.startswith("keras"):
        policy = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}.get(dtype, dtype)
        axis = -1 if layout == "NHWC" else 1
        layer = keras.layers.BatchNormalization(axis=axis, momentum=0.0, epsilon=EPSILON, dtype=policy)
        layer.build([None, None, None, channels] if layout == "NHWC" else [None, channels, None, None])

    @tf.function(autograph=False, jit_compile=jit)
    def step(x: Any, dy: Any, scale: Any, offset: Any) -> Any:
        sources = [x, scale, offset]
        if layer is not None:
            layer.gamma.assign(scale)
            layer.beta.assign(offset)
            sources = [x, layer.gamma.value, layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            if layer is not None:
                y = layer(x, training=True)
                mean, variance = layer.moving_mean.value, layer.moving_variance.value
            else:
                op = tfops.fused_batch_norm if peer == "tfops" else tf.compat.v1.nn.fused_batch_norm
                y, mean, variance = op(x, scale, offset, epsilon=EPSILON, data_format=layout)
        return (y, tf.identity(mean), tf.identity(variance), *tape.gradient(y, sources, dy))

    return step


def run_tensorflow(peer: str, problem: Problem, dtype: str, layout: Layout, device: str) -> Result:
    import tensorflow as tf

    with tf.device(f"/{device.upper()}:0"):
        step = _tensorflow_step(peer, dtype, layout.name, len(problem.scale))
        tensors = [tf.constant(layout.tensor(data)) for data in (problem.x, problem.dy)]
        results = [t.numpy() for t in step(*tensors, tf.constant(problem.scale), tf.constant(problem.offset))]
    y, mean, variance, dx, dscale, doffset = results
    unbiased = not peer.startswith("keras")
    return Result(layout.data(y), mean, variance, layout.data(dx), dscale, doffset, unbiased)


def run_torch(problem: Problem, layout: Layout, device: str) -> Result:
    import torch

    device = "cuda" if device == "gpu" else device

    def to_torch(data: Array) -> Any:
        array = layout.tensor(data)
        is_bfloat16 = array.dtype == ml_dtypes.bfloat16
        tensor = torch.from_numpy(array.view(np.int16) if is_bfloat16 else array)
        tensor = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
        return (tensor.permute(0, 3, 1, 2) if layout.name == "NHWC" else tensor).to(device)

    def from_torch(tensor: Any) -> Array:
        tensor = tensor.detach().cpu()
        tensor = tensor.permute(0, 2, 3, 1) if layout.name == "NHWC" else tensor
        tensor = tensor.contiguous()
        if tensor.dtype == torch.bfloat16:
            return layout.data(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return layout.data(tensor.numpy())

    x, scale, offset = to_torch(problem.x), *(torch.from_numpy(v).to(device) for v in problem[2:])
    for tensor in (x, scale, offset):
        tensor.requires_grad_()
    mean, variance = torch.zeros_like(scale.detach()), torch.ones_like(scale.detach())
    y = torch.nn.functional.batch_norm(x, mean, variance, scale, offset, training=True, momentum=1.0, eps=EPSILON)
    y.backward(to_torch(problem.dy))
    vectors = [v.cpu().numpy() for v in (mean, variance, scale.grad, offset.grad)]
    return Result(from_torch(y), *vectors[:2], from_torch(x.grad), *vectors[2:])


def absent(peer: str, dtype: str, layout: str, device: str) -> bool:
    if peer.startswith("tf_") or peer == "tf":
        return dtype == "float64" or (layout == "NCHW" and device == "cpu")
    return False


def run(peer: str, problem: Problem, dtype: str, layout: Layout, device: str) -> Result:
    if peer == "torch":
        return run_torch(problem, layout, device)
    return run_tensorflow(peer, problem, dtype, layout, device)


# ----------------------------------------------------------------------------------------------------------------------


def _short(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{values[name]:.3g}") for name in QUANTITIES}


def _ratio(reference: Statistics) -> float:
    return float(f"{float((abs(reference.mean) / np.sqrt(reference.variance)).max()):.3g}")


def study(options: argparse.Namespace, rows: dict[str, Any]) -> None:
    for dtype in options.dtype:
        for case in CASES:
            if not any(case.name.startswith(prefix) for prefix in options.case):
                continue
            many = case.name.startswith("many")
            channels, n = (1, options.many) if many else (4, options.elements)
            if not is_possible(case, dtype, n):
                continue
            problem = make_problem(case, dtype, channels, n)
            reference = statistics(problem)
            for layout in options.layout:
                if many and layout != "NHWC":
                    continue
                for peer in options.peer:
                    if absent(peer, dtype, layout, options.device):
                        continue
                    got = run(peer, problem, dtype, Layout(layout, 64 if n % 64 == 0 else 1), options.device)
                    found = errors(problem, reference, got, dtype)
                    del got
                    gc.collect()
                    key = f"{options.device} {dtype} {layout} {case.name} {peer}"
                    where = {
                        "device": options.device,
                        "dtype": dtype,
                        "layout": layout,
                        "case": case.name,
                        "peer": peer,
                    }
                    rows[key] = {
                        **where,
                        "case": case.name,
                        "peer": peer,
                        "ratio": _ratio(reference) if case.ratio else None,
                        "errors": _short(found.largest),
                        "bound": _short(found.bound),
                        "of_bound": _short(found.of_bound),
                    }
                    print(key, rows[key]["errors"], file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=["NHWC", "NCHW"], default=["NHWC", "NCHW"])
    parser.add_argument("--case", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--elements", type=int, default=1 << 18, help="a channel")
    parser.add_argument("--many", type=int, default=10**8, help="elements a channel where they are many")
    parser.add_argument("--out", type=Path, default=OUT, help="without suffix")
    options = parser.parse_args(arguments)

    path = options.out.with_suffix(".json")
    rows = json.loads(path.read_text()) if path.exists() else {}
    study(options, rows)
    if any("fused".startswith(prefix) for prefix in options.case):
        accuracy_fused.study(options.device, options.dtype, options.peer, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(rows[k])}" for k in sorted(rows)) + "\n}\n")
    options.out.with_suffix(".md").write_text(markdown(list(rows.values())))
    plot(list(rows.values()), options.out.with_suffix(".svg"))

    too_far = [key for key, row in rows.items() if row["peer"] == "tfops" and max(row["of_bound"].values()) > 1]
    for key in too_far:
        print(f"{key} exceeds a bound: {rows[key]['of_bound']}", file=sys.stderr)
    return 1 if too_far else 0


if __name__ == "__main__":
    sys.exit(main())
