"""The comparisons: reverse and forward mode against difference quotients, and narrow types against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tfops.gradcheck._differences import Probe, Quotients, element, locate, quotients, settle, units
from tfops.gradcheck._problem import EPS, Problem, rounded
from tfops.gradcheck._report import Row

_STEPS = {"float64": 2.0**-17, "float32": 2.0**-8, "float16": 2.0**-4, "bfloat16": 2.0**-3}
RTOL = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_DIRECTIONS = 2
_MISSING = "there is no gradient (None), which means 0: is it cut off, as by tf.stop_gradient?"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `check` that concern single comparisons."""

    eps: float | None
    rtol: Mapping[str, float]
    atol: float | None
    samples: int
    kinks: float
    rng: np.random.Generator
    mode: str

    def steps(self, dtype: str) -> list[float]:
        """Of difference quotients, from the largest to the smallest."""
        largest = _STEPS[dtype] if self.eps is None else self.eps
        return [largest / 4**i for i in range(4 if dtype == "float64" else 2)]

    def tolerance(self, dtype: str, largest: float, overall: float) -> float:
        """What rounding may cost where an input's largest derivative, and the largest by any input, are these."""
        relative = self.rtol[dtype]
        return relative * largest + (relative / 10 if self.atol is None else self.atol) * overall


def draw(shape: Sequence[int], rng: np.random.Generator) -> npt.NDArray[Any]:
    """Random numbers of either sign, from 1/2 to 2: none of them hides what it is multiplied with."""
    return np.asarray(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape))


def draw_weights(problems: Sequence[Problem], rng: np.random.Generator) -> list[npt.NDArray[Any]]:
    """Those of a random sum of all outputs, as the narrowest type holds them."""
    shapes = [y.shape for y in problems[0].outputs.values()]
    return [rounded(draw(shape, rng), dtype) for shape, dtype in zip(shapes, problems[-1].output_dtypes, strict=True)]


class _Line(NamedTuple):
    """What is measured along a probe, and what TensorFlow has there."""

    probe: Probe
    place: int | None  # of the element, None for a direction
    first: Quotients
    expected: npt.NDArray[Any]


def gradients(
    kind: str, problems: Sequence[Problem], weights: Sequence[npt.NDArray[Any]], settings: Settings
) -> list[Row]:
    """Reverse mode by each leaf.

    Args:
        kind: What to call it.
        problems: One that is compared with difference quotients, and others that are compared with that one.
        weights: Those of the outputs in the sum that is differentiated.
        settings: The options.
    """
    try:
        found = [problem.gradients(weights) for problem in problems]
    except Exception as error:
        return _refused(kind, problems, settings, error, ok=False)
    reference = problems[0]
    own = [_filled(each, value) for each, value in zip(found[0], reference.values, strict=True)]
    lines = [_lines(reference, index, gradient, weights, settings) for index, gradient in enumerate(own)]
    overall = max(_largest(gradient, each) for gradient, each in zip(own, lines, strict=True))
    rows = []
    for index, gradient in enumerate(own):
        row, right, kinked = _leaf(kind, reference, index, gradient, lines[index], overall, settings)
        rows.append(_noted(row, found[0][index] is None))
        for problem, others in zip(problems[1:], found[1:], strict=True):
            got = _filled(others[index], right)
            tolerance = settings.tolerance(problem.dtype, _maximum(right), overall) + np.zeros(right.size)
            name_of = partial(_element, problem.names[index], right.shape)
            each, _ = _row(kind, problem, index, got, right, tolerance, kinked, name_of, settings)
            rows.append(_noted(each, others[index] is None))
    return rows


def _lines(
    problem: Problem, index: int, gradient: npt.NDArray[Any], weights: Sequence[npt.NDArray[Any]], settings: Settings
) -> list[_Line]:
    """Every element of a small leaf; of a large one a sample, and random directions."""
    size, rng = gradient.size, settings.rng
    every = size <= settings.samples
    places = range(size) if every else sorted(rng.choice(size, settings.samples, replace=False).tolist())
    probes: list[tuple[Probe, int | None]] = [(element(problem, index, place, weights), place) for place in places]
    for _ in range(0 if every else _DIRECTIONS):
        direction = draw(gradient.shape, rng) * units(problem.values[index])
        probes.append((Probe(index, direction, 1.0, weights), None))
    step = settings.steps(problem.dtype)[0]
    lines = []
    for probe, place in probes:
        expected = np.vdot(gradient, probe.direction) if place is None else gradient.flat[place]
        lines.append(_Line(probe, place, quotients(problem, probe, step), np.array([expected])))
    return lines


def _largest(gradient: npt.NDArray[Any], lines: Sequence[_Line]) -> float:
    """The largest derivative by a single element."""
    return max(_maximum(gradient), _maximum([line.first.central[0] for line in lines if line.place is not None]))


def _leaf(
    kind: str,
    problem: Problem,
    index: int,
    gradient: npt.NDArray[Any],
    lines: Sequence[_Line],
    overall: float,
    settings: Settings,
) -> tuple[Row, npt.NDArray[Any], npt.NDArray[Any]]:
    """The row of a leaf, its right gradient as far as that is known, and which elements are at a kink."""
    steps = settings.steps(problem.dtype)
    largest = _largest(gradient, lines)
    finite = np.where(np.isfinite(gradient), gradient, 0)
    got = np.array([line.expected[0] for line in lines])
    right, tolerance, kinked = np.zeros_like(got), np.zeros_like(got), np.zeros(got.shape, bool)
    for i, line in enumerate(lines):
        norm = float(np.linalg.norm(finite * line.probe.direction))
        scale = largest if line.place is not None else max(norm, _maximum(line.first.central))
        allowed = settings.tolerance(problem.dtype, scale, overall)
        central, noise, at_kink = settle(problem, line.probe, line.first, line.expected, allowed, steps)
        right[i], tolerance[i], kinked[i] = central[0], allowed + noise[0], at_kink[0]

    places = [line.place for line in lines]

    def name_of(i: int) -> str:
        place = places[i]
        return "a random direction" if place is None else _element(problem.names[index], gradient.shape, place)

    row, worst = _row(kind, problem, index, got, right, tolerance, kinked, name_of, settings, gradient)
    known, at_kinks = gradient.copy(), np.zeros(gradient.shape, bool)
    for i, place in enumerate(places):
        if place is not None:
            at_kinks.flat[place] = kinked[i]
            if _distances(got[i], right[i]) > tolerance[i] and not kinked[i]:
                known.flat[place] = right[i]
    if not row.ok and places[worst] is None and math.isfinite(row.error):
        place = locate(problem, lines[worst].probe, gradient, steps[0])
        single = quotients(problem, element(problem, index, place, lines[worst].probe.weights), steps[0])
        known.flat[place] = single.central[0]
        name = _element(problem.names[index], gradient.shape, place)
        row = dataclasses.replace(
            row, place=name, analytic=float(gradient.flat[place]), numerical=float(single.central[0])
        )
    return row, known, at_kinks


def tangents(problems: Sequence[Problem], settings: Settings, required: bool) -> list[Row]:
    """Forward mode along a random direction of each leaf, every element of the outputs.

    Args:
        problems: As for `gradients`.
        settings: The options.
        required: Whether it is an error that there is none.
    """
    kind, reference = "forward mode", problems[0]
    steps = settings.steps(reference.dtype)
    probes = []
    for index, value in enumerate(reference.values):
        direction = rounded(draw(value.shape, settings.rng) * units(value), problems[-1].dtypes[index])
        probes.append(Probe(index, direction, 1.0, None))
    try:
        found = [[_joined(each, each.tangents(probe.leaf, probe.direction)) for each in problems] for probe in probes]
    except Exception as error:
        return _refused(kind, problems, settings, error, ok=not required)
    firsts = [quotients(reference, probe, steps[0]) for probe in probes]
    scales = [max(_maximum(own[0]), _maximum(first.central)) for own, first in zip(found, firsts, strict=True)]
    rows = []
    for index, (probe, first, own) in enumerate(zip(probes, firsts, found, strict=True)):
        allowed = settings.tolerance(reference.dtype, scales[index], max(scales))
        right, noise, kinked = settle(reference, probe, first, own[0], allowed, steps)
        for problem, got in zip(problems, own, strict=True):
            tolerance = settings.tolerance(problem.dtype, scales[index], max(scales)) + noise
            name_of = partial(_output, problem)
            rows.append(_row(kind, problem, index, got, right, tolerance, kinked, name_of, settings)[0])
    return rows


def _row(
    kind: str,
    problem: Problem,
    index: int,
    got: npt.NDArray[Any],
    right: npt.NDArray[Any],
    tolerance: npt.NDArray[Any],
    kinked: npt.NDArray[Any],
    name_of: Callable[[int], str],
    settings: Settings,
    gradient: npt.NDArray[Any] | None = None,
) -> tuple[Row, int]:
    """The row of a comparison, and which of its elements is the worst.

    Args:
        name_of: An element's name.
        gradient: All that is to be finite, if that is more than `got`.
    """
    got, right, left_out = got.ravel(), right.ravel(), int(kinked.sum())
    errors = np.where(kinked.ravel(), 0.0, _distances(got, right))
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = int(np.argmax(np.where(errors > 0, errors / tolerance, 0.0)))
    notes = []
    ok = bool(errors[worst] <= tolerance[worst])
    whole = got if gradient is None else gradient
    if not_finite := whole.size - int(np.isfinite(whole).sum()):
        notes.append(f"not finite in {not_finite} of {whole.size} elements")
        ok = False
    elif not math.isfinite(errors[worst]):
        notes.append("the function is not finite beside the point")
    if left_out:
        notes.append(f"{left_out} of {got.size} within eps of a kink, left out")
        if left_out > settings.kinks * got.size:
            notes.append(f"more than {settings.kinks:.0%}")
            ok = False
    row = Row(
        kind,
        problem.names[index],
        settings.mode,
        problem.dtypes[index],
        float(errors[worst]),
        float(tolerance[worst]),
        _maximum(right),
        name_of(worst),
        float(got[worst]),
        float(right[worst]),
        got.size - left_out,
        left_out,
        ", ".join(notes),
        ok,
    )
    return row, worst


def _noted(row: Row, is_missing: bool) -> Row:
    if not is_missing:
        return row
    note = "None, which means 0" if row.ok else _MISSING
    return dataclasses.replace(row, note=", ".join(filter(None, [row.note, note])))


def _refused(kind: str, problems: Sequence[Problem], settings: Settings, error: Exception, ok: bool) -> list[Row]:
    """A row for each problem of a function that has no such derivative."""
    reason = f"not supported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return [Row(kind, mode=settings.mode, dtype=problem.dtype, note=reason, ok=ok) for problem in problems]


def _joined(problem: Problem, tangents: Sequence[npt.NDArray[Any] | None]) -> npt.NDArray[Any]:
    """The elements of all outputs."""
    outputs = problem.outputs.values()
    return np.concatenate([_filled(each, y).ravel() for each, y in zip(tangents, outputs, strict=True)])


def _output(problem: Problem, place: int) -> str:
    """The name of one of them."""
    for name, y in problem.outputs.items():
        if place < y.size:
            return _element(name, y.shape, place)
        place -= y.size
    raise IndexError(place)


def _element(name: str, shape: Sequence[int], place: int) -> str:
    return f"{name}[{', '.join(str(i) for i in np.unravel_index(place, shape))}]" if len(shape) else name


def _filled(gradient: npt.NDArray[Any] | None, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.zeros_like(like) if gradient is None else gradient


def _maximum(values: Sequence[float] | npt.NDArray[Any]) -> float:
    """The largest magnitude of those that are finite; 0 if there are none."""
    array = np.abs(np.asarray(values, np.float64))
    return float(np.max(array[np.isfinite(array)], initial=0.0))


def _distances(got: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """|got - right|, infinite where either is not a number."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(got) & np.isfinite(right), np.abs(got - right), math.inf)


def values(problem: Problem, settings: Settings) -> list[Row]:
    """A row for each output that is not the same twice, or is not finite."""
    rows = []
    for (name, y), again in zip(problem.outputs.items(), problem.run(), strict=True):
        finite = np.isfinite(y)
        row = Row("output", name, settings.mode, problem.dtype, ok=False)
        if not finite.all():
            place = int(np.argmin(finite))
            count = f"not finite in {y.size - finite.sum()} of {y.size} elements"
            note = f"{count}, the first is {_element(name, y.shape, place)}: {y.flat[place]}"
            rows.append(dataclasses.replace(row, note=note))
        elif not is_near(y, again, 32 * EPS[problem.dtype]):
            difference = f"twice the same call, and the values differ by {_maximum(np.abs(y - again)):.1e}"
            rows.append(dataclasses.replace(row, note=f"the function is not deterministic: {difference}"))
    return rows


def is_near(y: npt.NDArray[Any], other: npt.NDArray[Any], tolerance: float) -> bool:
    """Whether two outputs are equal, relative to their largest element."""
    return y.shape == other.shape and bool(np.all(np.abs(y - other) <= tolerance * _maximum(np.abs(y))))
