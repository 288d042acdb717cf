"""Fits the policy's constants (PolicyTuning in csrc/batch_norm/cuda/tuning.h) to measured times.

The model is the policy's own: the kernels' module says what it reckons for a plan with other constants. So all that is
done here is to find constants for which that agrees with the times: least squares of the logarithms of their ratios,
each constant within bounds, and held near its present value where the times say nothing about it. Outliers count less
(Huber). NumPy alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .records import ROOT

RATIOS = ("cache_factor", "cache_share")  # in [0, 1]; the others are positive numbers
FACTOR = 6.0  # that a constant may change by
HUBER = 0.25  # a residual, as a logarithm, from which on it counts less than its square
HOLD = 0.02  # weight of a constant's own change, as a logarithm, against a time's

Tuning = dict[str, float]
Predict = Callable[[Tuning], np.ndarray]


class Fit(NamedTuple):
    """What was found: the constants, and the root mean square of the logarithms of predicted over measured times."""

    tuning: Tuning
    before: float
    after: float


def _bounds(name: str, value: float) -> tuple[float, float]:
    """Of the constant's logarithm."""
    low, high = max(value, 1e-2) / FACTOR, max(value, 1e-2) * FACTOR
    return np.log(low), np.log(min(high, 1.0) if name in RATIOS else high)


def fit(predict: Predict, seconds: np.ndarray, start: Tuning, iterations: int = 60) -> Fit:
    """Finds the constants. `predict` returns the times, in seconds, that constants make of what was measured."""
    names = list(start)
    origin = np.array([np.log(max(start[name], 1e-2)) for name in names])
    low, high = np.array([_bounds(name, start[name]) for name in names]).T
    measured = np.log(seconds)

    def residuals(p: np.ndarray) -> np.ndarray:
        tuning = dict(zip(names, np.exp(p).tolist(), strict=True))
        return np.log(predict(tuning)) - measured

    def cost(r: np.ndarray, p: np.ndarray) -> float:
        size = np.abs(r)
        huber = np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum()
        return float(huber + HOLD * ((p - origin) ** 2).sum() / 2)

    p = np.clip(origin, low, high)
    r = residuals(p)
    before = float(np.sqrt((r**2).mean()))
    best, damping, step = cost(r, p), 1e-2, 1e-3
    for _ in range(iterations):  # Levenberg and Marquardt
        # towards the inside, if a bound is near
        signs = np.where(p + step > high, -1, 1)
        steps = step * np.diag(signs)
        jacobian = np.array([(residuals(p + s) - r) / s.sum() for s in steps]).T
        weights = np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-12))
        normal = jacobian.T @ (weights[:, None] * jacobian) + HOLD * np.eye(len(p))
        gradient = jacobian.T @ (weights * r) + HOLD * (p - origin)
        # Constants that would leave their bounds stay there, and the others move.
        free = ~(((p <= low) & (gradient > 0)) | ((p >= high) & (gradient < 0)))
        improved = False
        while damping < 1e6 and not improved and free.any():
            damped = normal[np.ix_(free, free)] + damping * np.diag(np.diag(normal)[free])
            candidate = p.copy()
            candidate[free] -= np.linalg.solve(damped, gradient[free])
            candidate = np.clip(candidate, low, high)
            r_candidate = residuals(candidate)
            now = cost(r_candidate, candidate)
            improved = now < best - 1e-9 * best
            damping = damping / 4 if improved else damping * 4
            if improved:
                p, r, best = candidate, r_candidate, now
        if not improved:
            break
    # The model has corners (the slower of two things), at which slopes mislead: look along each constant by itself.
    for size in (0.3, 0.1, 0.03):
        for i in range(len(p)):
            for sign in (size, -size):
                candidate = p.copy()
                candidate[i] = np.clip(p[i] + sign, low[i], high[i])
                r_candidate = residuals(candidate)
                if (now := cost(r_candidate, candidate)) < best:
                    p, r, best = candidate, r_candidate, now
    tuning = {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(p), strict=True)}
    return Fit(tuning, before, float(np.sqrt((r**2).mean())))


class Measured(NamedTuple):
    """A plan's time: of which problem, in which direction, and which of the problem's plans."""

    cell: str
    problem: Any
    backward: bool
    index: int
    tier: str
    seconds: float


def reckon(raw: Any, device: Any, plans: list[Measured], tuning: Tuning) -> np.ndarray:
    """The policy's times of the plans, in seconds, with these constants."""
    times = [raw.cuda_plan_time(m.problem, m.backward, True, device, m.index, tuning) for m in plans]
    return np.array(times) / 1e9


def regret(plans: list[Measured], reckoned: np.ndarray) -> float:
    """How much slower the choices by reckoned times are than the fastest plans: the geometric mean, less 1."""
    ratios = []
    for cell in dict.fromkeys(m.cell for m in plans):
        of_cell = [i for i, m in enumerate(plans) if m.cell == cell]
        chosen = min(of_cell, key=lambda i: reckoned[i])
        ratios.append(plans[chosen].seconds / min(plans[i].seconds for i in of_cell))
    return float(np.exp(np.mean(np.log(ratios))) - 1) if ratios else 0.0


def as_source(tuning: Tuning) -> str:
    """PolicyTuning of csrc/batch_norm/cuda/tuning.h, with these constants in the place of its own."""
    text = (ROOT / "csrc" / "batch_norm" / "cuda" / "tuning.h").read_text()
    found = re.search(r"^struct PolicyTuning \{.*?^\};", text, re.MULTILINE | re.DOTALL)

    def constant(match: re.Match[str]) -> str:
        return f"double {match[1]} = {tuning[match[1]]:g};" if match[1] in tuning else match[0]

    return re.sub(r"\bdouble (\w+) = [\d.e+-]+;", constant, found[0] if found else "")
