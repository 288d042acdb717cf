"""What each step does in its process."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from problems import Cell
from tfops_kernels import _policy

from . import backends, calibrate, clocks, sanitizers, tests
from .calls import Tensors, check, make_call, make_problem
from .cells import cell_of, name_of, rest, telling
from .records import EXIT_FAILED, FAILED, NOT_RUN, OK, Records, first_line, run_items

TIMING = 0.04  # seconds of replays for each timing


class Context:
    """What a step's process knows: where results go, when to end, and how it was asked to run."""

    def __init__(self, folder: Path, seconds: float, dry_run: bool):
        self.folder, self.dry_run = folder, dry_run
        self.records = Records(folder)
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    @functools.cached_property
    def backend(self) -> Any:
        return backends.open_backend(self.dry_run)

    @property
    def raw(self) -> Any:
        """The kernels' module, which needs no PyTorch."""
        import tfops_kernels

        return self.backend.raw if self.dry_run else tfops_kernels._kernels

    def run(self, step: str, items: Any, on_gpu: bool = True) -> int:
        return run_items(self.records, step, items, self.end, self.backend.is_sound if on_gpu else lambda: True)


# ----------------------------------------------------------------------------------------------------------------------


def facts(context: Context) -> int:
    def machine() -> dict[str, Any]:
        import tfops_kernels

        versions = {name: _version(name) for name in ("numpy", "torch", "jax", "triton", "pytest")}
        return {"python": platform.python_version(), "versions": versions, "build": tfops_kernels.build_info()}

    def driver() -> dict[str, Any]:
        if context.dry_run:
            return {"nvidia_smi": {}}
        try:
            return {"nvidia_smi": clocks.query(clocks.AT_REST)}
        except (OSError, subprocess.SubprocessError, IndexError) as problem:
            return {"status": NOT_RUN, "error": first_line(problem)}

    def device() -> dict[str, Any]:
        names = ("compute_capability", "multiprocessors", "shared_bytes_per_block")
        found = context.raw.CudaDevice()
        every = (*names, "l2_bytes", "largest_cluster", "cooperative")
        return {"device": {name: getattr(found, name) for name in every}}

    def occupancy(dtype: str, backward: bool) -> dict[str, Any]:
        raw = context.raw
        found = raw.cuda_occupancy(getattr(raw.DataType, dtype), backward, raw.CudaDevice())
        return {"occupancy": found}

    items = [("machine", machine), ("driver", driver), ("device", device)]
    for dtype in ("float32", "bfloat16"):
        for backward in (False, True):
            name = f"occupancy {dtype} {'backward' if backward else 'forward'}"
            items.append((name, functools.partial(occupancy, dtype, backward)))
    items.append(("arrays", lambda: context.backend.facts()))  # last, for it needs PyTorch
    return context.run("facts", items, on_gpu=False)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "unknown"


# ----------------------------------------------------------------------------------------------------------------------


def measure(backend: Any, cell: Cell, plan: Any, sets: list[Tensors], force: bool) -> dict[str, Any]:
    """Checks and times a plan of a cell. The result says what ran, how far off it was and how long it took."""
    raw = backend.raw
    cluster = plan.blocks_per_slab if plan.tier == "cluster" else 0
    with _policy.settings(raw, tier=plan.tier if force else "", cluster=cluster if force else 0):
        calls = [make_call(backend, cell, t) for t in sets]
        raw.reset_cuda_launches()
        errors = check(backend, cell, sets[0], *calls[0])
        seconds = backend.seconds([call for call, _ in calls], TIMING)
        launches = raw.cuda_launches()
    ran = [tier for tier, count in launches["calls"].items() if count]
    result = {
        "cell": name_of(cell),
        "tier": plan.tier,
        "cluster": cluster,
        "index": plan.index,
        "reckoned": plan.nanoseconds / 1e9,
        "blocks": plan.blocks,
        "waves": plan.waves,
        "seconds": seconds,
        "error_sizes": {name: round(min(error, 1e9), 3) for name, error in errors.items()},
    }
    if launches["refusals"]:
        return {"status": FAILED, "error": f"a launch was refused: {launches['refusals'][0]}", **result}
    if not seconds > 0:
        return {"status": FAILED, "error": f"the time of a call must be > 0, but it is {seconds}", **result}
    if ran != [plan.tier]:
        return {"status": FAILED, "error": f"{plan.tier} was to run, and {', '.join(ran) or 'nothing'} ran", **result}
    wrong = {name: error for name, error in errors.items() if not error <= 1}
    if wrong:
        return {"status": FAILED, "error": f"wrong results, in units of what rounding allows: {wrong}", **result}
    return {"status": OK, **result}


def plans_of(raw: Any, cell: Cell) -> list[Any]:
    return raw.cuda_plans(make_problem(raw, cell), cell.what == "backward", True, raw.CudaDevice())


def make_sets(backend: Any, cell: Cell) -> list[Tensors]:
    return [Tensors(backend, cell) for _ in range(backend.sets(cell.least_bytes))]


def raising(problem: Exception) -> Callable[[], dict[str, Any]]:
    """What an item does that could not be made: the item fails, and those after it are made."""

    def run() -> dict[str, Any]:
        raise problem

    return run


def plan_items(
    context: Context, cells: list[Cell], every: bool, **about: Any
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Each plan of the cells, or the policy's choice alone. A cell's tensors are made when its first plan runs."""

    def run(cell: Cell, plan: Any, sets: list[Tensors]) -> dict[str, Any]:
        try:
            sets[:] = sets or make_sets(context.backend, cell)
            return {**about, **measure(context.backend, cell, plan, sets, every)}
        except context.backend.exhausted:
            return {"status": NOT_RUN, "error": "the GPU has too little memory"}

    for cell in cells:
        sets: list[Tensors] = []
        try:
            plans = plans_of(context.backend.raw, cell)[: None if every else 1]
        except Exception as problem:
            yield name_of(cell), raising(problem)
            continue
        for plan in plans:
            cluster = plan.blocks_per_slab if plan.tier == "cluster" else ""
            name = f"{name_of(cell)} {plan.tier}{cluster}" if every else name_of(cell)
            yield name, functools.partial(run, cell, plan, sets)
        sets.clear()


def bench(context: Context) -> int:
    def items() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "copy", lambda: clocks.copy_rate(context.backend, context.dry_run)
        yield from plan_items(context, telling(context.dry_run), every=True)

    return context.run("bench", items())


def others(context: Context) -> int:
    """The other cells. Fitted constants that choose no worse hold for them, and each result says which did."""
    fit = context.records.ended("calibrate").get("fit", {})
    constants = "built in"
    if "tuning" in fit and fit["regret_after"] <= fit["regret_before"]:
        context.backend.raw.set_policy_settings(tuning=fit["tuning"])
        constants = "fitted"
    return context.run("rest", plan_items(context, rest(context.dry_run), every=False, constants=constants))


# ----------------------------------------------------------------------------------------------------------------------


def measured_plans(raw: Any, records: Records) -> list[calibrate.Measured]:
    found = []
    for r in records.ended("bench").values():
        if r["status"] == OK and "index" in r:
            cell = cell_of(r["cell"])
            plan = (cell.what == "backward", r["index"], r["tier"], r["seconds"])
            found.append(calibrate.Measured(r["cell"], make_problem(raw, cell), *plan))
    return found


def fit_policy(context: Context) -> int:
    raw = context.raw

    def run() -> dict[str, Any]:
        plans = measured_plans(raw, context.records)
        if len(plans) < 2:
            raise ValueError(f"{len(plans)} plans were measured: too few to fit constants to")
        device, start = raw.CudaDevice(), raw.policy_settings()["tuning"]
        seconds = [m.seconds for m in plans]
        reckon = functools.partial(calibrate.reckon, raw, device, plans)
        found = calibrate.fit(reckon, np.array(seconds), start)
        file = context.folder / "tuning.json"
        file.write_text(json.dumps(found.tuning, indent=1) + "\n")
        return {
            "plans": len(plans),
            "before": start,
            "tuning": found.tuning,
            "error_before": found.before,
            "error_after": found.after,
            "regret_before": calibrate.regret(plans, reckon(start)),
            "regret_after": calibrate.regret(plans, reckon(found.tuning)),
        }

    return context.run("calibrate", [("fit", run)], on_gpu=False)


def recheck(context: Context) -> int:
    """Cells that take another plan with the new constants than with the old ones: both, measured again."""
    raw, file = context.backend.raw, context.folder / "tuning.json"
    if not file.exists():
        problem = "there are no new constants"
        context.records.write(step="recheck", item="constants", event="end", status=NOT_RUN, error=problem)
        return 0
    old, new = raw.policy_settings()["tuning"], json.loads(file.read_text())

    def items() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for cell in telling(context.dry_run):
            chosen = []
            try:
                for tuning in (old, new):
                    raw.set_policy_settings(tuning=tuning)
                    chosen.append(plans_of(raw, cell)[0])
            except Exception as problem:
                yield name_of(cell), raising(problem)
                continue
            if chosen[0].index != chosen[1].index:
                yield name_of(cell), functools.partial(compare, cell, chosen)

    def compare(cell: Cell, chosen: list[Any]) -> dict[str, Any]:
        sets = make_sets(context.backend, cell)
        results = []
        for tuning, plan in zip((old, new), chosen, strict=True):
            raw.set_policy_settings(tuning=tuning)
            results.append(measure(context.backend, cell, plan, sets, force=False))
        failed = [result for result in results if result["status"] != OK]
        return failed[0] if failed else {"status": OK, "old": results[0], "new": results[1]}

    return context.run("recheck", items())


# ----------------------------------------------------------------------------------------------------------------------


def peers(context: Context) -> int:
    from . import peers

    return peers.run(context, compiled=False)


def compiled(context: Context) -> int:
    from . import peers

    return peers.run(context, compiled=True)


RUN: dict[str, Callable[[Context], int]] = {
    "facts": facts,
    "tests": tests.kernels,
    "sanitize": sanitizers.run,
    "bench": bench,
    "calibrate": fit_policy,
    "recheck": recheck,
    "rest": others,
    "peers": peers,
    "compile": compiled,
    "jax": tests.jax,
}


def run(name: str, context: Context) -> int:
    """Runs a step in this process; returns its exit status. What it raises outside of its items is a result, too."""
    try:
        return RUN[name](context)
    except Exception as problem:
        traceback.print_exc()
        context.records.write(step=name, item="the step", event="end", status=FAILED, error=first_line(problem))
        return EXIT_FAILED
