"""Difference quotients of a problem along straight lines, and what tells a kink from a wrong derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tfops.gradcheck._problem import EPS, Problem, rounded

# A quotient's rounding error, in units of what rounding each output once costs: functions have several operations.
_ROUNDING = 8
# Where a function is smooth, a quarter of the step makes a quarter of the gap between one-sided quotients.
_SMOOTH = 0.35


class Probe(NamedTuple):
    """A line through the point of a problem, and what is looked at along it.

    Attributes:
        leaf: The number of the leaf that varies.
        direction: In which it does.
        unit: What a step is multiplied with, a power of two.
        weights: Those of a weighted sum of all outputs; None for each output by itself.
    """

    leaf: int
    direction: npt.NDArray[Any]
    unit: float
    weights: Sequence[npt.NDArray[Any]] | None


class Quotients(NamedTuple):
    """Derivatives along a probe, as vectors: of one component, or of as many as all outputs have elements.

    Attributes:
        central: (f(+h) - f(-h)) / 2h
        gap: How far the quotients of both sides, (f(+h) - f(0)) / h and (f(0) - f(-h)) / h, are apart.
        noise: How much of the central one may be rounding.
    """

    central: npt.NDArray[Any]
    gap: npt.NDArray[Any]
    noise: npt.NDArray[Any]


def units(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What a step is to be multiplied with: powers of two, about |value|, but at least 1."""
    magnitude = np.where(np.isfinite(value), np.maximum(np.abs(value), 1), 1)
    return np.asarray(np.exp2(np.rint(np.log2(magnitude))))


def element(problem: Problem, index: int, place: int, weights: Sequence[npt.NDArray[Any]] | None) -> Probe:
    """The probe of a single element, which has number `place` in its leaf."""
    direction = np.zeros_like(problem.values[index])
    direction.flat[place] = 1
    return Probe(index, direction, float(units(problem.values[index].flat[place])), weights)


def quotients(problem: Problem, probe: Probe, step: float) -> Quotients:
    """Difference quotients with this step."""
    value, direction = problem.values[probe.leaf], probe.direction
    dtype = problem.dtypes[probe.leaf]
    sides = [rounded(value + each * probe.unit * direction, dtype) for each in (step, -step)]
    forth, back = (float(np.vdot(side - value, direction) / np.vdot(direction, direction)) for side in sides)
    above, below = (problem.run(probe.leaf, side) for side in sides)
    base = list(problem.outputs.values())
    # Outputs are subtracted before they are summed: those that do not depend on the element cancel exactly.
    with np.errstate(invalid="ignore", over="ignore"):
        central = _sum([(a - b) / (forth - back) for a, b in zip(above, below, strict=True)], probe.weights)
        right = _sum([(a - y) / forth for a, y in zip(above, base, strict=True)], probe.weights)
        left = _sum([(b - y) / back for b, y in zip(below, base, strict=True)], probe.weights)
        moved = [np.where(a == b, 0, y) for a, b, y in zip(above, below, base, strict=True)]
        noise = _ROUNDING * EPS[problem.dtype] / (forth - back) * _size(moved, probe.weights)
        return Quotients(central, np.abs(right - left), noise)


def _sum(arrays: Sequence[npt.NDArray[Any]], weights: Sequence[npt.NDArray[Any]] | None) -> npt.NDArray[Any]:
    if weights is None:
        return np.concatenate([np.ravel(each) for each in arrays])
    return np.array([sum(np.sum(w * each) for w, each in zip(weights, arrays, strict=True))])


def _size(arrays: Sequence[npt.NDArray[Any]], weights: Sequence[npt.NDArray[Any]] | None) -> npt.NDArray[Any]:
    """The magnitude of rounding errors in `_sum`, relative to that of a number 1: they are independent."""
    squares = _sum([np.square(each) for each in arrays], weights and [np.square(w) for w in weights])
    return np.asarray(np.sqrt(squares))


def settle(
    problem: Problem, probe: Probe, first: Quotients, expected: npt.NDArray[Any], allowed: float, steps: Sequence[float]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Takes smaller steps where a quotient is not what is expected: a kink may have been within the step.

    Args:
        problem: What is differentiated.
        probe: Along which line.
        first: The quotients with the first step.
        expected: The derivatives, each of which is right or wrong.
        allowed: How far quotients may be apart from them, beside their noise.
        steps: From the largest to the smallest, each a quarter of the one before.

    Returns:
        quotients: The first one that is as expected, else the one of the first step.
        noise: Theirs.
        kinked: Where neither is so because the function has a kink, or a jump, within the smallest steps.
    """
    central, noise, last = first.central.copy(), first.noise.copy(), first
    unsettled = ~(np.abs(central - expected) <= allowed + noise)  # NaN is not
    kinked = np.zeros_like(unsettled)
    for step in steps[1:]:
        if not unsettled.any():
            break
        new = quotients(problem, probe, step)
        settled = unsettled & (np.abs(new.central - expected) <= allowed + new.noise)
        better = settled | (unsettled & ~np.isfinite(central))
        central[better], noise[better] = new.central[better], new.noise[better]
        unsettled &= ~settled
        at_point = (new.gap > allowed + new.noise) & (new.gap > _SMOOTH * last.gap)
        beside = np.abs(new.central - last.central) > allowed + new.noise + last.noise
        kinked = unsettled & (at_point | beside)
        last = new
    return central, noise, kinked


def locate(problem: Problem, probe: Probe, gradient: npt.NDArray[Any], step: float) -> int:
    """The place of an element whose derivative is wrong, where that along a direction is: by halving."""
    places = np.flatnonzero(probe.direction)

    def error(part: npt.NDArray[Any]) -> float:
        direction = np.zeros_like(probe.direction)
        direction.flat[part] = probe.direction.flat[part]
        central = quotients(problem, probe._replace(direction=direction), step).central
        return float(np.vdot(gradient, direction) - central[0])

    total = error(places)
    while len(places) > 1:
        half, rest = np.array_split(places, 2)
        of_half = error(half)
        places, total = (half, of_half) if abs(of_half) >= abs(total - of_half) else (rest, total - of_half)
    return int(places[0])
