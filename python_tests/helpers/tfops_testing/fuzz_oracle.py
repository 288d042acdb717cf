"""What an op has to return for a valid call of fuzz_cases, and how far from it rounding may lead.

A channel is compared unless a value in it is not finite, or so large that float32 may overflow on the way: then nothing
is asked of it, but of all the others still.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from . import kernel_cases, oracle
from .fuzz_cases import INPUTS, Array, Call, attribute_value, mask_row, slope_below, too_small


class Expected(NamedTuple):
    value: Array
    bound: Array


def _act(call: Call, z: Array) -> Array:
    return oracle.activate(call.activation or None, z)


def _near_a_kink(call: Call, z: Array, error: Array) -> Array:
    near = np.zeros(z.shape, bool)
    kinks = (0.0,) if call.activation in kernel_cases.PIECEWISE_LINEAR else kernel_cases.JUMPS.get(call.activation, ())
    for kink in (*kinks, 6.0) if call.activation == "relu6" else kinks:
        near |= np.abs(z - kink) <= 4 * error
    return near


class Oracle:
    """Everything that the ops of a call compute, in wide arithmetic."""

    def __init__(self, call: Call):
        self.call = call
        self.wide = np.longdouble if call.dtype == "float64" else np.float64
        self.eps = kernel_cases.ROUNDING[call.param]
        # What flushing denormals to zero may cost, after a few multiplications.
        self.tiny = 1e-200 if call.dtype == "float64" else 1e-18
        self.x = self._wide(call.inputs["x"])
        self.axis = call.attributes["axis"]
        self.others = tuple(i for i in range(self.x.ndim) if i != self.axis % self.x.ndim)
        self.channels = self.x.shape[self.axis]
        self.count = math.prod(self.x.shape[i] for i in self.others)
        self.wild = np.zeros(self.channels, bool)
        self.largest = 1e12
        self.epsilon = self.wide(attribute_value(call, "epsilon"))
        self.factor = self.wide(attribute_value(call, "exponential_avg_factor"))

    def _wide(self, array: Array) -> Array:
        return np.asarray(array).astype(self.wide)

    def v(self, vector: Array) -> Array:
        return oracle.vector_like(vector, self.x, self.axis)

    def watch(self, *arrays: Array) -> None:
        """Channels where one of these is too large, or no number, are wild."""
        for array in arrays:
            bad = ~(np.abs(array) < self.largest)
            if array.ndim == 1:
                self.wild |= bad
            else:
                self.wild |= bad.any(self.others)

    def vector(self, name: str) -> Array:
        vector = self._wide(self.call.inputs[name])
        self.watch(vector)
        return vector

    def residual(self) -> Array:
        given = self.call.inputs["residual"]
        residual = self._wide(given[0]) if given else np.zeros_like(self.x)
        self.watch(residual)
        return residual

    def statistics(self, keep: Array | None = None) -> None:
        """Of the elements that count: mean, variance, and the errors allowed."""
        kept = np.ones(self.x.shape, bool) if keep is None else np.broadcast_to(keep[..., None], self.x.shape)
        # What does not count may be anything.
        x = np.where(kept, self.x, 0)
        self.watch(x)
        self.n = kept.sum(self.others)
        n = np.maximum(self.n, 1)
        self.mean = x.sum(self.others) / n
        self.variance = np.where(kept, np.square(x - self.v(self.mean)), 0).sum(self.others) / n
        largest = np.abs(x).max(self.others, initial=0)
        self.mean_error = 16 * self.eps * (largest + np.sqrt(self.variance)) + self.tiny
        self.variance_error = 64 * self.eps * self.variance + self.mean_error**2 + self.tiny
        if self.call.dtype == "float64":  # means are rounded to the data's own type, each time that two are merged
            self.variance_error += 16 * self.eps * largest * np.sqrt(self.variance)
        with np.errstate(all="ignore"):  # of constant data with an epsilon of 0
            self.inv_std = 1 / np.sqrt(self.variance + self.epsilon)
            self.inv_std_error = self.inv_std * (16 * self.eps + self.variance_error / (self.variance + self.epsilon))
        self.watch(self.inv_std)

    def given(self, mean: str, spread: str) -> None:
        self.mean, spread_values = self.vector(mean), self.vector(spread)
        self.inv_std = 1 / np.sqrt(spread_values + self.epsilon) if spread == "variance" else spread_values
        self.watch(self.inv_std)
        self.mean_error = self.tiny * np.ones_like(self.mean)
        self.inv_std_error = 16 * self.eps * np.abs(self.inv_std)

    def normalize(self) -> None:
        """z and its error."""
        self.scale, self.offset = self.vector("scale"), self.vector("offset")
        residual = self.residual()
        self.slope = self.scale * self.inv_std
        self.xc = self.x - self.v(self.mean)
        self.z = self.xc * self.v(self.slope) + self.v(self.offset) + residual
        self.magnitude = np.abs(self.x) + np.abs(self.v(self.mean))
        terms = self.magnitude * np.abs(self.v(self.slope)) + np.abs(self.v(self.offset)) + np.abs(residual)
        self.watch(terms, self.z, self.magnitude)
        self.z_error = 16 * self.eps * terms + self.tiny
        self.z_error += self.v(np.abs(self.slope) * self.mean_error)
        self.z_error += self.magnitude * self.v(np.abs(self.scale) * self.inv_std_error)

    # ------------------------------------------------------------------------------------------------------------------

    def near_kinks(self) -> Array:
        """Elements of a gradient op where the activation's slope is a matter of rounding."""
        self._gradient_inputs()
        if self.call.needs_mask or self.call.in_place:
            return np.zeros(self.x.shape, bool)
        return _near_a_kink(self.call, self.z, self.z_error)

    def _gradient_inputs(self) -> None:
        training = self.call.op == "TrainingGrad"
        self.given(*(("saved_mean", "saved_inv_std") if training else ("mean", "variance")))
        if self.call.in_place:
            self.invert()
        else:
            self.normalize()

    def invert(self) -> None:
        """z and x - mean from y, where that is given in the place of x."""
        y, least = self.x, kernel_cases.ROUNDING[self.call.dtype] - 1
        self.scale, self.offset = self.vector("scale"), self.vector("offset")
        self.slope = self.scale * self.inv_std
        below = self.wide(slope_below(self.call))
        self.z, self.act_slope = np.where(y < 0, y / below, y), np.where(y > 0, 1, below)
        if self.call.activation.startswith("elu"):
            self.z = np.where(y > 0, y, np.log1p(np.clip(y / below, least, 0)))
            self.act_slope = np.where(y > 0, 1, below + y)
        self.xc = (self.z - self.v(self.offset)) / self.v(self.slope)
        self.magnitude = (np.abs(self.z) + np.abs(self.v(self.offset))) / np.abs(self.v(self.slope))
        self.z_error = 16 * self.eps * np.abs(self.z) + self.tiny
        self.wild |= too_small(self.call)  # where gradients are NaN
        self.watch(y, self.magnitude)

    def _slope(self) -> Array:
        if self.call.in_place:
            return self.act_slope
        if not (self.call.needs_mask and self.x.size):
            return oracle.slope_of(self.call.activation or None, self.z)
        rows, row = mask_row(self.x.shape, self.axis)
        bits = np.unpackbits(self.call.inputs["mask"].reshape(rows, -1), axis=1, bitorder="little")[:, :row]
        off = oracle.slope_of(self.call.activation, np.array(-1.0))
        return np.where(bits.reshape(self.x.shape), 1, self.wide(off))

    def results(self) -> dict[str, Expected]:
        with np.errstate(all="ignore"):
            return getattr(self, f"_{self.call.op}")()

    def _vector(self, value: Array, error: Array) -> Expected:
        return Expected(value, self.eps * np.abs(value) + error + self.tiny)

    def _data(self, value: Array, error: Array) -> Expected:
        rounding = kernel_cases.ROUNDING[self.call.dtype] * 1.01
        subnormal = 2.0**-24 if self.call.dtype == "float16" else 0
        return Expected(value, rounding * (np.abs(value) + error) + error + self.tiny + subnormal)

    def _y(self) -> Expected:
        error = 1.2 * self.z_error
        if self.call.activation in kernel_cases.SMOOTH:
            error = 2 * error + 64 * self.eps * (1 + np.abs(self.z))
        if self.call.activation == kernel_cases.BOUNDED_RELU:  # which jumps at its threshold
            error = error + _near_a_kink(self.call, self.z, self.z_error)
        return self._data(_act(self.call, self.z), error)

    def _Training(self) -> dict[str, Expected]:
        running = self.call.inputs["running"]
        nothing = np.zeros(self.channels, self.wide)  # as good as empty ones, where nothing of them is kept
        old = [self._wide(v) if v.size else nothing for v in running] or [nothing] * 2
        if not self.count:
            self.scale = self.vector("scale")
            flushed = np.full(self.channels, self.tiny)  # TensorFlow's threads take denormals for zeros
            return {
                "y": Expected(self.x, self.x),
                "mean": Expected(old[0], flushed),
                "variance": Expected(old[1], flushed),
            }
        self.statistics()
        self.normalize()
        self.watch(*old, self.variance)
        f, n = self.factor, self.count
        bessel = n / max(n - 1, 1) if self.call.attributes["unbiased"] else 1
        results = {"y": self._y()}
        for name, before, now, error in (
            ("mean", old[0], self.mean, self.mean_error),
            ("variance", old[1], self.variance * bessel, self.variance_error * bessel),
        ):
            terms = np.abs(before) + np.abs(now)
            results[name] = self._vector((1 - f) * before + f * now, error + 16 * self.eps * terms)
        results["saved_mean"] = self._vector(self.mean, self.mean_error)
        results["saved_inv_std"] = self._vector(self.inv_std, self.inv_std_error)
        return results

    def mask(self) -> tuple[Array, Array]:
        """Of Training: the bits, and which of them are sure."""
        sure = ~_near_a_kink(self.call, self.z, self.z_error) & self.v(~self.wild)
        return oracle.slope_of(self.call.activation, self.z) == 1, sure

    def _Inference(self) -> dict[str, Expected]:
        self.given("mean", "variance")
        self.normalize()
        return {"y": self._y()}

    def _Moments(self) -> dict[str, Expected]:
        keep = self.call.inputs["keep"]
        self.statistics(keep[0] if keep else None)
        return {
            "count": Expected(self.n.astype(self.wide), np.zeros(self.channels)),
            "mean": self._vector(self.mean, self.mean_error),
            "variance": self._vector(self.variance, self.variance_error),
        }

    def _sums(self) -> None:
        self._gradient_inputs()
        dy = self._wide(self.call.inputs["dy"])
        self.watch(dy)
        self.dz = dy * self._slope()
        # Smooth activations: the slope, of 1.76 at most, at a z that is off by its error, and is itself rounded.
        self.dz_size = np.abs(dy) * (2 if self.call.activation in kernel_cases.SMOOTH else 1.1)
        if self.call.in_place:
            self.dz_size = np.abs(dy) * np.maximum(2, np.abs(self.act_slope))
        self.dz_error = self.dz_size * self.eps * 4
        if self.call.activation in kernel_cases.SMOOTH:
            self.dz_error = self.dz_size * (self.z_error + 64 * self.eps * (1 + np.abs(self.z)))
        self.sum_dz, self.sum_dz_xc = self.dz.sum(self.others), (self.dz * self.xc).sum(self.others)
        self.sum_dz_error = (self.dz_error + 32 * self.eps * self.dz_size).sum(self.others)
        sizes = (self.dz_error + 32 * self.eps * self.dz_size) * self.magnitude
        self.sum_dz_xc_error = sizes.sum(self.others)
        self.sum_dz_xc_size = (self.dz_size * self.magnitude).sum(self.others)
        power = np.abs(self.slope * self.inv_std**2) * self.sum_dz_xc_size
        self.watch(self.inv_std**3, power, self.sum_dz_xc_size)

    def _vectors(self) -> dict[str, Expected]:
        inv, slope = np.abs(self.inv_std), np.abs(self.slope)
        loose = 64 * self.eps
        dvariance_size = slope * inv**2
        return {
            "doffset": self._vector(self.sum_dz, self.sum_dz_error),
            "dscale": self._vector(
                self.inv_std * self.sum_dz_xc, inv * (self.sum_dz_xc_error + loose * self.sum_dz_xc_size)
            ),
            "dmean": self._vector(-self.slope * self.sum_dz, slope * (self.sum_dz_error + loose * np.abs(self.sum_dz))),
            "dvariance": self._vector(
                -self.slope * self.inv_std**2 * self.sum_dz_xc / 2,
                dvariance_size * (self.sum_dz_xc_error + loose * self.sum_dz_xc_size),
            ),
        }

    def _dx_of_dz(self) -> tuple[Array, Array]:
        slope = np.abs(self.v(self.slope))
        return self.v(self.slope) * self.dz, slope * (self.dz_error + 64 * self.eps * self.dz_size)

    def _dresidual(self) -> dict[str, Expected]:
        if not (self.call.has_residual and self.call.activation):
            return {"dresidual": Expected(np.zeros(0), np.zeros(0))}
        return {"dresidual": self._data(self.dz, self.dz_error)}

    def _InferenceGrad(self) -> dict[str, Expected]:
        self._sums()
        return {"dx": self._data(*self._dx_of_dz())} | self._vectors() | self._dresidual()

    def _GradientMoments(self) -> dict[str, Expected]:
        self._sums()
        return self._vectors()

    def _GradientNormalize(self) -> dict[str, Expected]:
        self._sums()
        tilt, shift = self.vector("tilt"), self.vector("shift")
        keep = self.call.inputs["keep"]
        kept = keep[0][..., None] if keep else True
        dx, error = self._dx_of_dz()
        dx = dx + np.where(kept, self.xc * self.v(tilt) + self.v(shift), 0)
        size = self.magnitude * np.abs(self.v(tilt)) + np.abs(self.v(shift))
        self.watch(size)
        return {"dx": self._data(dx, error + 64 * self.eps * size)} | self._dresidual()

    def _TrainingGrad(self) -> dict[str, Expected]:
        self._sums()
        vectors = self._vectors()
        n = max(self.count, 1)
        zeros = np.zeros(self.channels, self.wide)
        dmean, dvariance = [self._wide(v) for v in self.call.inputs["drunning"]] or [zeros, zeros]
        self.watch(dmean, dvariance)
        divisor = max(n - 1, 1) if self.call.attributes["unbiased"] else n
        of_mean = self.slope * self.sum_dz / n
        tilt = self.slope * self.inv_std**2 * self.sum_dz_xc / n
        dx, error = self._dx_of_dz()
        dx = dx - self.v(of_mean) - self.xc * self.v(tilt)
        dx = dx + self.v(self.factor * dmean / n) + self.xc * self.v(self.factor * dvariance * 2 / divisor)
        slope, loose = np.abs(self.slope), 64 * self.eps
        error = error + self.v(slope * (self.sum_dz_error + loose * self.dz_size.sum(self.others)) / n)
        sums = self.sum_dz_xc_error + loose * self.sum_dz_xc_size
        error = error + self.magnitude * self.v(slope * self.inv_std**2 * sums / n)
        error = error + loose * self.v(np.abs(self.factor * dmean) / n)
        error = error + loose * self.magnitude * self.v(np.abs(self.factor * dvariance) * 2 / divisor)
        self.watch(error, dx)
        return {"dx": self._data(dx, error)} | {k: vectors[k] for k in ("dscale", "doffset")} | self._dresidual()

    # ------------------------------------------------------------------------------------------------------------------

    def compare(self, name: str, got: Array, expected: Expected, dtype: str) -> int:
        """Asserts that they agree. Returns how many elements that were."""
        value, bound = np.asarray(expected.value), np.asarray(expected.bound)
        assert got.shape == value.shape, f"{name} has shape {got.shape}, not {value.shape}"
        got = got.astype(self.wide)
        asked = np.ones(got.shape, bool)
        if got.size and not (name == "dresidual" and value.shape == (0,)):
            asked &= ~self.wild if got.ndim == 1 or name.startswith("saved") else self.v(~self.wild)
        # What the type cannot hold is an infinity.
        limit = {"float16": 65504.0, "float64": 1e300}.get(dtype, 3e38)
        with np.errstate(all="ignore"):
            asked &= np.abs(value) < 0.99 * limit
            wrong = asked & ~(np.abs(got - value) <= bound)
        if wrong.any():
            i = tuple(map(int, np.argwhere(wrong)[0]))
            raise AssertionError(f"{name}{list(i)} is {got[i]}, not {value[i]} (+- {bound[i]})")
        return int(asked.sum())


class _OfVirtualBatches(Oracle):
    """Each virtual batch by itself, and what they come to."""

    def __init__(self, call: Call):
        super().__init__(call)
        self.parts = [Oracle(_virtual_batch(call, k)) for k in range(max(call.virtual_batches, 1))]

    def near_kinks(self) -> Array:
        return np.concatenate([part.near_kinks() for part in self.parts])

    def mask(self) -> tuple[Array, Array]:
        bits, sure = zip(*(part.mask() for part in self.parts), strict=True)
        return np.concatenate(bits), np.concatenate(sure)

    def results(self) -> dict[str, Expected]:
        results = [part.results() for part in self.parts]
        self.wild = np.any([part.wild for part in self.parts], 0)
        none = not self.call.virtual_batches
        combined = {}
        for name in results[0]:
            values, bounds = (np.stack([getattr(r[name], field) for r in results]) for field in Expected._fields)
            if name in ("mean", "variance"):
                values, bounds = values.mean(0), bounds.mean(0) + 16 * self.eps * np.abs(values).mean(0)
            elif name in ("dscale", "doffset"):
                values, bounds = values.sum(0), bounds.sum(0) + 16 * self.eps * np.abs(values).sum(0)
            elif name in ("y", "dx") or (name == "dresidual" and values.ndim > 2):
                values, bounds = np.concatenate(list(values)), np.concatenate(list(bounds))
            elif name == "dresidual":
                values, bounds = values[0], bounds[0]
            elif none:
                continue
            combined[name] = Expected(values, bounds)
        return combined


def _virtual_batch(call: Call, k: int) -> Call:
    """The call for one virtual batch; for none, where there is none."""
    size, batches = call.virtual_batch_size, call.virtual_batches
    inputs: dict[str, Any] = {}
    for name, value in call.inputs.items():
        what = INPUTS[call.op][name].rstrip("*")
        part = {
            "data": lambda a: a[k * size : (k + 1) * size],
            "saved": lambda a: a[k] if batches else np.zeros(a.shape[1:], a.dtype),
            "mask": lambda a: np.split(a, batches)[k] if batches else a,
        }.get(what, lambda a: a)
        inputs[name] = [part(a) for a in value] if isinstance(value, list) else part(value)
    if "drunning" in inputs:
        inputs["drunning"] = [v.astype(np.longdouble) / max(batches, 1) for v in inputs["drunning"]]
    return dataclasses.replace(call, inputs=inputs, attributes={**call.attributes, "virtual_batch_size": 0})


def reckon(call: Call) -> Oracle:
    return (_OfVirtualBatches if call.virtual_batch_size > 0 else Oracle)(call)
