"""Every plan that the policy lists for a problem, forced, and seen to have run: the same for a GPU and csrc/simt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from tfops_kernels import _policy

from . import in_place_cases, kernel_cases, virtual_batches
from .kernel_cases import Case

# Between them, problems on which each tier and each size of clusters fits a whole GPU.
SHAPES = [((4096, 64), -1), ((1500, 24), -1), ((136, 65), -1), ((16, 24, 20, 20), 1), ((2, 3, 40, 41), 1)]

# (shape, axis, virtual batch size): rows of vectors and others, and planes.
VIRTUAL_BATCHES = [((780, 64), -1, 390), ((408, 65), -1, 136), ((8, 6, 16, 16), 1, 2)]


def name_of(plan: Any) -> str:
    """The tier, and of clusters their size: "cluster 8"."""
    return f"cluster {plan.blocks_per_slab}" if plan.tier == "cluster" else plan.tier


def plans(module: Any, case: Case, aligned: bool, **others: Any) -> tuple[list[Any], list[Any]]:
    """The best of each name that fits the current GPU, for forward and backward."""
    problem = kernel_cases.make_problem(module, case, **others)
    forward, backward = (module.cuda_plans(problem, b, aligned, module.CudaDevice()) for b in (False, True))
    return forward, backward


def force(module: Any, plan: Any) -> AbstractContextManager[None]:
    """Has calls take the plan's tier, and clusters of its size, within the context."""
    return _policy.settings(module, tier=plan.tier, cluster=plan.blocks_per_slab if plan.tier == "cluster" else 0)


class Forced:
    """forward() and backward() of `kernels`, each by a plan. AssertionError if another tier runs, or CUDA refuses."""

    def __init__(self, kernels: Any, module: Any, forward: Any, backward: Any):
        self._kernels, self._module, self._plans = kernels, module, {"forward": forward, "backward": backward}

    def _call(self, direction: str, *arguments: Any, **named: Any) -> Any:
        plan = self._plans[direction]
        before = self._module.cuda_launches()
        with force(self._module, plan):
            result = getattr(self._kernels, direction)(*arguments, **named)
        after = self._module.cuda_launches()
        assert after["refusals"] == before["refusals"]
        ran = {tier: count - before["calls"][tier] for tier, count in after["calls"].items()}
        assert ran == {tier: int(tier == plan.tier) for tier in ran}, f"{direction} was to take {name_of(plan)}"
        return result

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self._call("forward", *arguments, **named)

    def backward(self, *arguments: Any, **named: Any) -> Any:
        return self._call("backward", *arguments, **named)


def cases(shape: tuple[int, ...], axis: int, dtype: str) -> Iterator[Case]:
    """With activations of each kind; with and without a residual, and so a mask."""
    for i, activation in enumerate((*kernel_cases.COMMON, "mish", kernel_cases.BOUNDED_RELU)):
        for residual in (False, True):
            factor = (1.0, 0.25)[i % 2]  # with the gradients of the running statistics, too
            yield Case(shape, axis, dtype, True, activation, residual, factor)


def check_every_plan(
    case: Case,
    kernels: Any,
    module: Any,
    to_device: Callable[[np.ndarray], Any],
    to_host: Callable[[Any], np.ndarray],
    aligned: bool = True,
    virtual_batch_size: int | None = None,
    in_place: bool = False,
) -> set[str]:
    """Compares the results of every plan with the oracle's. Returns the names of those that ran."""
    forward, backward = plans(module, case, aligned, virtual_batch_size=virtual_batch_size or 0, in_place=in_place)
    for pair in itertools.zip_longest(forward, backward):
        forced = Forced(kernels, module, pair[0] or forward[0], pair[1] or backward[0])
        if virtual_batch_size is not None:
            virtual_batches.check(case, virtual_batch_size, to_device, to_host, forced)
        elif in_place:
            in_place_cases.check(case, to_device, to_host, forced)
        else:
            kernel_cases.check(case, to_device, to_host, forced)
    return {name_of(plan) for plan in (*forward, *backward)}


def names_on(module: Any) -> set[str]:
    """All that there are on the current GPU, by what CUDA says of the kernels."""
    device = module.CudaDevice()
    occupancy = module.cuda_occupancy(module.DataType.float32, False, device)
    sizes = {size for size, count in occupancy["clusters"].items() if count}
    grid = {"grid"} if device.cooperative and device.multiprocessors > 1 else set()
    return {"one_block", "streaming", *grid, *(f"cluster {size}" for size in sizes)}
