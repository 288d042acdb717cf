"""Random calls of every op, most of them valid and the others not, and what has to come of each.

A case follows from a seed and a number. What is wrong with it is found by the rules of the README, and what is right is
reckoned in float64 (long double for float64 data) by the formulas of csrc/batch_norm/batch_norm.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import kernel_cases, oracle

Array = np.ndarray

# Inputs by kind: data (x's shape), vector ([C]), saved (a vector for each virtual batch), mask, and lists of them that
# an attribute counts.
_GRADIENT = {"dy": "data", "x": "data", "scale": "vector", "offset": "vector"}
_STATISTICS = {"mean": "vector", "variance": "vector"}
_RESIDUAL = {"residual": "data*"}
INPUTS = {
    "Training": {"x": "data", "scale": "vector", "offset": "vector", "running": "vector*"} | _RESIDUAL,
    "TrainingGrad": _GRADIENT
    | {"saved_mean": "saved", "saved_inv_std": "saved", "mask": "mask", "drunning": "vector*"}
    | _RESIDUAL,
    "Inference": {"x": "data", "scale": "vector", "offset": "vector"} | _STATISTICS | _RESIDUAL,
    "InferenceGrad": _GRADIENT | _STATISTICS | _RESIDUAL,
    "Moments": {"x": "data", "keep": "keep*"},
    "GradientMoments": _GRADIENT | _STATISTICS | _RESIDUAL,
    "GradientNormalize": _GRADIENT | _STATISTICS | {"tilt": "vector", "shift": "vector", "keep": "keep*"} | _RESIDUAL,
}
OUTPUTS = {
    "Training": ("y", "mean", "variance", "saved_mean", "saved_inv_std", "mask"),
    "TrainingGrad": ("dx", "dscale", "doffset", "dresidual"),
    "Inference": ("y",),
    "InferenceGrad": ("dx", "dscale", "doffset", "dmean", "dvariance", "dresidual"),
    "Moments": ("count", "mean", "variance"),
    "GradientMoments": ("dscale", "doffset", "dmean", "dvariance"),
    "GradientNormalize": ("dx", "dresidual"),
}
COUNTS = {"running": "num_running", "drunning": "num_running", "residual": "num_residuals", "keep": "num_keeps"}
INVERTIBLE = ("", "leaky_relu", "elu", *kernel_cases.PARAMETRIZED[:2])
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 64, 65, 129, 200)
HUGE = 2**40


@dataclass
class Call:
    op: str
    inputs: dict[str, Any]  # arrays, and lists of them
    attributes: dict[str, Any]
    faults: list[str] = field(default_factory=list)  # patterns; an error must match one of them

    def __str__(self) -> str:
        def text(value: Any) -> str:
            return f"[{', '.join(map(text, value))}]" if isinstance(value, list) else f"{value.dtype}{value.shape}"

        inputs = ", ".join(f"{name}={text(value)}" for name, value in self.inputs.items())
        return f"{self.op}({inputs}, {self.attributes}); wrong: {self.faults or 'nothing'}"

    @property
    def has_residual(self) -> bool:
        return self.attributes.get("has_residual", bool(self.inputs.get("residual")))

    @property
    def training(self) -> bool:
        return self.op in ("Training", "TrainingGrad")

    @property
    def activation(self) -> str:
        return self.attributes.get("activation", "")

    @property
    def dtype(self) -> str:
        return self.inputs["x"].dtype.name

    @property
    def param(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def in_place(self) -> bool:
        return self.attributes.get("in_place", False)

    @property
    def virtual_batch_size(self) -> int:
        return self.attributes.get("virtual_batch_size", 0)

    @property
    def virtual_batches(self) -> int:
        return len(self.inputs["x"]) // self.virtual_batch_size if self.virtual_batch_size else 1

    @property
    def needs_mask(self) -> bool:
        return self.training and self.has_residual and self.activation in kernel_cases.PIECEWISE_LINEAR


def mask_row(shape: tuple[int, ...], axis: int, virtual_batches: int = 1) -> tuple[int, int]:
    """Rows of the mask, and elements of a row."""
    elements = math.prod(shape)
    inner = math.prod(shape[axis % len(shape) + 1 :])
    row = elements // max(virtual_batches, 1) if shape[axis] == 1 else shape[axis] if inner == 1 else inner
    return (elements // row, row) if elements else (0, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


class _Draw:
    def __init__(self, seed: int, number: int):
        self.rng = np.random.default_rng([seed, number])

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def among(self, values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def shape(self) -> tuple[int, ...]:
        rank = int(self.rng.integers(9)) if self.chance(0.15) else int(self.rng.integers(2, 6))
        most = 100_000 if self.chance(0.01) else 2000
        shape: list[int] = []
        for _ in range(rank):
            size = 0 if self.chance(0.03) else int(self.among(SIZES))
            fits = size * math.prod(s or 1 for s in shape) <= most
            shape.append(size if fits else int(self.rng.integers(1, 4)))
        if rank and self.chance(0.02):
            shape[0], shape[-1] = HUGE, 0
            if self.chance(0.5):
                shape.reverse()
        elif rank and most > 2000:
            shape[0] = max(1, most // max(1, math.prod(shape[1:])))
        return tuple(shape)

    def data(self, shape: tuple[int, ...], dtype: Any, axis: int, kind: str) -> Array:
        values = self.rng.standard_normal(shape) if math.prod(shape) else np.zeros(shape)
        if kind == "far":
            values = values + 100
        elif kind == "zeros":
            values = np.where(values > 0, 0.0, -0.0)
        elif kind == "denormal":
            values = values * {"float16": 2.0**-20, "float64": 2.0**-1060}.get(np.dtype(dtype).name, 2.0**-135)
        with np.errstate(all="ignore"):
            array = np.asarray(values).astype(dtype)
            if kind == "spoiled" and array.ndim and array.size:
                channel = np.moveaxis(array, axis, 0)[self.rng.integers(array.shape[axis])]
                channel.flat[self.rng.integers(channel.size)] = self.among((np.nan, np.inf, -np.inf, 3e38, -6e4))
        return array

    def vector(self, channels: int, dtype: Any, name: str) -> Array:
        values = self.rng.standard_normal(channels)
        if name in ("variance", "saved_inv_std"):
            values = 0.2 + np.abs(values)
        if channels and self.chance(0.05):
            values[self.rng.integers(channels)] = self.among((np.nan, np.inf, 0.0, -0.0, -3.0, 1e-42, 3e38))
        with np.errstate(all="ignore"):
            return values.astype(dtype)


def draw(seed: int, number: int) -> Call:
    """The case of that number."""
    d = _Draw(seed, number)
    op = d.among(tuple(INPUTS))
    dtype = kernel_cases.numpy_dtype(d.among(kernel_cases.DTYPES))
    param = np.dtype("float64" if dtype == np.float64 else "float32")
    shape = d.shape()
    rank = len(shape)
    axis = int(d.rng.integers(-rank, rank)) if rank else -1
    channels = shape[axis] if rank else 1
    attributes: dict[str, Any] = {"axis": axis}
    if op == "Moments":
        attributes["U"] = param.name
    else:
        attributes["epsilon"] = d.among((1e-3, 1e-3, 1e-5, 1.0))
        attributes["activation"] = d.among(("", *kernel_cases.ACTIVATIONS[1:]))
    if op in ("Training", "TrainingGrad"):
        attributes["exponential_avg_factor"] = d.among((1.0, 0.25, 0.0))
        attributes["unbiased"] = d.chance(0.5)
        divisors = [n for n in range(1, 9) if rank and axis % rank and HUGE not in shape and shape[0] % n == 0]
        attributes["virtual_batch_size"] = d.among(divisors) if divisors and d.chance(0.3) else 0
    for name in {"epsilon", "exponential_avg_factor"} & attributes.keys():
        attributes[f"{name}_bits"] = int(np.float64(attributes[name]).view(np.int64)) if dtype == np.float64 else 0
    call = Call(op, {}, attributes)
    has_residual = d.chance(0.5)
    if call.training:
        attributes["in_place"] = d.chance(0.25)
        if attributes["in_place"] and d.chance(0.9):
            has_residual = False
            attributes["activation"] = d.among(INVERTIBLE)
            attributes["virtual_batch_size"] = 0
    if op in ("TrainingGrad", "InferenceGrad"):
        attributes["has_residual"] = has_residual
    must_run = attributes.get("exponential_avg_factor", 1) != 1 and op == "Training"
    lists = {
        "running": 2 * int(must_run or d.chance(0.5)),
        "drunning": 2 * int(d.chance(0.5)),
        "keep": int(d.chance(0.5)),
        "residual": int(has_residual),
    }
    if op in ("TrainingGrad", "InferenceGrad"):
        lists["residual"] = int(has_residual and call.activation != "" and not call.needs_mask)
    virtual_batches = shape[0] // call.virtual_batch_size if call.virtual_batch_size else 1
    # No vectors of terabytes: a length that does not fit is one more way to be wrong.
    length = channels if channels < HUGE else 3
    kind = d.among(("plain", "plain", "plain", "far", "zeros", "denormal", "spoiled"))

    def make(name: str, what: str) -> Array:
        if what == "vector":
            return d.vector(length, param, name)
        if what == "saved":
            batches = [d.vector(length, param, name) for _ in range(virtual_batches)]
            saved = np.reshape(batches, (virtual_batches, length)).astype(param)
            return saved if call.virtual_batch_size else saved[0]
        if what == "mask":
            rows, row = mask_row(shape, axis, virtual_batches) if call.needs_mask and rank else (0, 0)
            return d.rng.integers(0, 256, rows * ((row + 7) // 8), np.uint8)  # past the ends of rows too
        if what == "keep":
            return d.rng.random(shape[:-1]) < 0.5 if math.prod(shape[:-1]) < 1e7 else np.zeros((0,), bool)
        return d.data(shape, dtype, axis, kind if name == "x" or d.chance(0.3) else "plain")

    for name, what in INPUTS[op].items():
        if what.endswith("*"):
            call.inputs[name] = [make(name, what[:-1]) for _ in range(lists[name])]
        else:
            call.inputs[name] = make(name, what)
    for _ in range(int(d.among((0, 0, 0, 0, 0, 1, 1, 1, 2)))):
        _break(d, call)
    if op == "Moments" and HUGE in call.inputs["x"].shape:  # no machine has room for its channels: ops/test_memory.py
        attributes["axis"] = call.inputs["x"].shape.index(0)
    if HUGE in call.inputs["x"].shape and attributes.get("virtual_batch_size"):  # nor for their saved statistics
        attributes["virtual_batch_size"] = 0
    call.faults = find_faults(call)
    return call


def _misshapen(d: _Draw, array: Array) -> Array:
    shape = list(array.shape)
    how = d.among(("longer", "shorter", "scalar", "more", "flat", "empty", "swapped", "huge"))
    if how == "longer" and shape:
        i = int(d.rng.integers(len(shape)))
        shape[i] += 1
    elif how == "shorter" and shape:
        i = int(d.rng.integers(len(shape)))
        shape[i] = max(0, shape[i] - 1)
    elif how == "scalar":
        shape = []
    elif how == "more":
        shape = [1, *shape] if d.chance(0.5) else [*shape, 1]
    elif how == "flat":
        shape = [math.prod(shape)]
    elif how == "empty":
        shape = [0]
    elif how == "swapped":
        shape = shape[::-1]
    else:
        shape = [0, HUGE]
    return np.ones(shape, array.dtype) if math.prod(shape) <= 1e6 else array


def _break(d: _Draw, call: Call) -> None:
    """Makes something wrong, or at least another thing."""
    name = d.among(tuple(call.inputs))
    value = call.inputs[name]
    how = d.among(("shape", "shape", "shape", "dtype", "count", "attribute", "attribute"))
    if how == "shape":
        if isinstance(value, list):
            if value:
                value[-1] = _misshapen(d, value[-1])
        else:
            call.inputs[name] = _misshapen(d, value)
    elif how == "dtype" and name != "keep":
        wrong = d.among((np.float16, np.float32, np.float64, np.int32, np.uint8))
        with np.errstate(all="ignore"):
            if isinstance(value, list):
                call.inputs[name] = [v.astype(wrong) for v in value]
            else:
                call.inputs[name] = value.astype(wrong)
    elif how == "count" and isinstance(value, list):
        if value and d.chance(0.5):
            value.pop()
        else:
            like = value[-1] if value else call.inputs["scale" if "running" in name else "x"]
            value.append(np.zeros(like.shape, bool) if name == "keep" else like)
    elif how == "attribute":
        bad = {
            "axis": (-9, 8, 2**31, -(2**62)),
            "epsilon": (0.0, -0.0, -8.0, float("nan"), float("inf"), -1e-30, 1e300),
            "activation": ("gelu", "RELU", " ", "relu\0"),
            "virtual_batch_size": (-1, 0, 1, 2, 3, 7, 2**40, -(2**62)),
            "exponential_avg_factor": (-0.1, 1.5, float("nan"), float("inf"), 1 + 2.0**-20),
            "U": ("float32", "float64"),
            "has_residual": (False, True),
            "in_place": (False, True),
        }
        attribute = d.among([a for a in bad if a in call.attributes])
        call.attributes[attribute] = d.among(bad[attribute])
        if f"{attribute}_bits" in call.attributes:
            call.attributes[f"{attribute}_bits"] = 0


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong


_TENSORFLOW_TYPES = r"expected to be an? \w+ tensor|incompatible with expected|that do(es)? not match|attr 'T'|DataType"


# Messages name the vectors of these lists.
_ELEMENTS = {"running": "mean|variance", "drunning": "dmean|dvariance"}


def attribute_value(call: Call, name: str) -> float:
    """As the ops read it: the bits of a double go before a float32."""
    if bits := call.attributes.get(f"{name}_bits"):
        return float(np.int64(bits).view(np.float64))
    with np.errstate(all="ignore"):
        return float(np.float32(call.attributes.get(name, 1)))


def find_faults(call: Call) -> list[str]:
    """Patterns for everything that is wrong with a call, by the README's rules."""
    faults = []
    attributes, inputs = call.attributes, call.inputs
    x = inputs["x"]
    if x.ndim < 2:
        faults.append(r"\bx must have rank >= 2")
    axis = attributes["axis"]
    if not -x.ndim <= axis < x.ndim:
        faults.append(r"\baxis must be in")
    epsilon, factor = attribute_value(call, "epsilon"), attribute_value(call, "exponential_avg_factor")
    if not (np.isfinite(epsilon) and epsilon >= 0):
        faults.append(r"\bepsilon must be")
    if not 0 <= factor <= 1:
        faults.append(r"\bexponential_avg_factor must be")
    if call.activation not in ("", *kernel_cases.ACTIVATIONS[1:]):
        faults.append(r"\bactivation\b")

    if call.in_place and call.has_residual:
        faults.append(r"\bin_place must be")
    if call.in_place and call.virtual_batch_size:
        faults.append(r"\bin_place must be")
    if call.in_place and call.activation not in INVERTIBLE:
        faults.append(r"\bactivation must be one of")

    if call.dtype not in kernel_cases.DTYPES:
        faults.append(_TENSORFLOW_TYPES)
    lists = {name: v if isinstance(v, list) else [v] for name, v in inputs.items()}
    for name, what in INPUTS[call.op].items():
        wanted = {"data": call.dtype, "vector": call.param, "saved": call.param, "mask": "uint8", "keep": "bool"}[
            what.rstrip("*")
        ]
        if any(v.dtype.name != wanted for v in lists[name]):
            faults.append(_TENSORFLOW_TYPES + r"|scale, offset and statistics must be|attr 'U'")
    if call.virtual_batch_size < 0:
        faults.append(r"\bvirtual_batch_size must be")
    if attributes.get("U", call.param) != call.param:
        faults.append("statistics must be")

    for name, values in lists.items():
        count = len(values)
        if name in ("running", "drunning") and count not in (0, 2):
            faults.append("num_running must be")
        elif name == "keep" and count > 1:
            faults.append("num_keeps must be")
        elif name == "residual":
            wanted = count
            if "has_residual" in attributes:
                piecewise = call.activation in kernel_cases.PIECEWISE_LINEAR
                wanted = int(call.has_residual and call.activation != "" and not (call.training and piecewise))
            if count > 1 or count != wanted:
                faults.append("num_residuals must be")
    if x.ndim < 2 or not -x.ndim <= axis < x.ndim:
        return faults

    if call.op == "Training" and factor != 1 and not inputs["running"] and x.shape[axis]:
        faults.append(r"\bmean and variance must be given")
    has_mask = call.needs_mask and call.op == "TrainingGrad"
    size = max(call.virtual_batch_size, 0)
    if size and (axis % x.ndim == 0 or len(x) % size):
        faults.append(r"\bvirtual_batch_size must|\bsaved_\w+ must have")
        return faults
    batches = len(x) // size if size else 1
    rows, row = mask_row(x.shape, axis, batches) if has_mask else (0, 0)
    shapes = {
        "data": x.shape,
        "vector": (x.shape[axis],),
        "saved": (batches, x.shape[axis]) if size else (x.shape[axis],),
        "keep": x.shape[:-1],
        "mask": (rows * ((row + 7) // 8),),
    }
    for name, what in INPUTS[call.op].items():
        may_be_empty = name == "running" and factor == 1
        if any(v.shape != shapes[what.rstrip("*")] and not (may_be_empty and v.size == 0) for v in lists[name]):
            faults.append(rf"\b({_ELEMENTS.get(name, name)}) must have")
    if call.op == "Training" and call.in_place and not faults and too_small(call).any():
        faults.append("scale is too near 0 for in_place")
    return faults


def slope_below(call: Call) -> float:
    """The slope of an invertible activation at a z of 0, from below."""
    return float(oracle.slope_of(call.activation or None, np.zeros(())))


def too_small(call: Call) -> Array:
    """Whether each channel's scale is refused where y alone is kept."""
    unit = kernel_cases.ROUNDING[call.dtype]
    least = {"float16": 2.0**-14, "float64": 2.0**-1022}.get(call.dtype, 2.0**-126)
    least /= min(slope_below(call), 1)
    scale, offset = call.inputs["scale"], np.abs(call.inputs["offset"])
    with np.errstate(all="ignore"):
        return np.abs(scale) <= scale.dtype.type(4 * unit) * (offset + scale.dtype.type(least))
