"""cpu.py's other two questions.

`--overhead`: what a call costs where there is next to nothing to compute, beside TensorFlow's fused op, with oneDNN and
without (a process each, the two ops interleaved in it). Eager: the op alone (tf.raw_ops and its like), the public
function, the function under a tape. Graph: 100 ops in a row, a hundredth of the call.

`--scaling`: nanoseconds an element of tfops' ops as in cpu_peers.py, and peak memory. The latter in a new process for
each size, by tfops_kernels on arrays that exist and have been touched: the high-water mark of the resident set during
one call, less the resident set before it. That is what a call takes beside its inputs and outputs: workspace, threads'
stacks. The kernel keeps these numbers only to some hundred KiB.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cpu_peers import FusedPeer, TensorFlowWorker, TfopsPeer
from cpu_report import NOISE, geometric_mean, markdown_table
from cpu_worker import ENVIRONMENT, EPSILON, MOMENTUM, memory_shape
from problems import PASSES, Cell

SMALL = [(8, 7, 7, 16), (32, 128), (16, 14, 14, 32), (64, 512)]
OPS_IN_A_ROW = 100
ROUNDS = 40
# C = 64, and about 10^4, 10^5, ... elements.
SIZES = [(2, 9, 9, 64), (4, 20, 20, 64), (8, 44, 44, 64), (32, 70, 70, 64), (32, 221, 221, 64), (320, 221, 221, 64)]

Row = dict[str, Any]


def _in_new_process(kind: str, *arguments: Any) -> Any:
    """What this file's function `kind`, called with the arguments by a process of its own, returns."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **ENVIRONMENT.get(kind, {})}
    command = [sys.executable, __file__, kind, json.dumps(arguments)]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Overhead


def _interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Microseconds of each call: median of rounds, each of which makes about a millisecond of each call."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = min(max(round(1e-3 / (time.perf_counter() - start)), 1), 50)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - start) / counts[name] * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def overhead_in_process(threads: int, rounds: int, shapes: Sequence[Sequence[int]]) -> list[Row]:
    """Microseconds of tfops and of TensorFlow's fused op, as it is in this process."""
    import tensorflow as tf

    import tfops

    worker = TensorFlowWorker(threads)
    rows = []
    for shape in map(tuple, shapes):
        # TensorFlow's op has no 2-D data, and gets them as it wants them.
        spatial = shape if len(shape) == 4 else (shape[0], 1, 1, shape[1])
        cell, fused_cell = (Cell("small", s, "NHWC", "float32", "plain", "forward") for s in (shape, spatial))
        tensors, fused_tensors = worker.tensors(cell), worker.tensors(fused_cell)
        peers = {"tfops": (TfopsPeer(cell), tensors), "tensorflow": (FusedPeer(fused_cell), fused_tensors)}
        functions = {"tfops": tfops.fused_batch_norm, "tensorflow": tf.compat.v1.nn.fused_batch_norm}

        def function(name: str, training: bool, functions: dict = functions, peers: dict = peers) -> tuple:
            t = peers[name][1]
            factor = {"exponential_avg_factor": MOMENTUM} if training else {}
            arguments = (t.x, t.scale, t.offset, t.mean, t.variance)
            return functions[name](*arguments, epsilon=EPSILON, is_training=training, **factor)

        def both(name: str, function: Callable = function, peers: dict = peers) -> tuple:
            t = peers[name][1]
            sources = [t.x, t.scale, t.offset]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                y, *_ = function(name, True)
            return tape.gradient(y, sources, t.dy)

        timed: list[tuple[str, str, dict[str, Callable[[], Any]]]] = []
        for what in PASSES:
            steps, graphs = {}, {}
            for name, (peer, t) in peers.items():
                saved = peer.saved(peer.forward(t)) if what == "backward" else ()
                steps[name] = partial(getattr(peer, what), t, saved)
                graphs[name] = worker.graph(peer, what, OPS_IN_A_ROW, t, saved)
            timed += [("eager, op", what, steps), (f"graph of {OPS_IN_A_ROW}", what, graphs)]
        for what, training in (("forward", True), ("inference", False)):
            timed.append(("eager, function", what, {name: partial(function, name, training) for name in peers}))
        timed.append(("eager, function", "forward_backward", {name: partial(both, name) for name in peers}))
        for call, what, calls in timed:
            each = OPS_IN_A_ROW if call.startswith("graph") else 1
            times = {name: value / each for name, value in _interleaved(calls, rounds).items()}
            rows.append({"shape": list(shape), "call": call, "what": what, **times})
    return rows


def overhead(threads: int, rounds: int = ROUNDS, shapes: Sequence[Sequence[int]] = SMALL) -> list[Row]:
    """Rows with microseconds and ratios against TensorFlow's op with oneDNN ("on") and without ("off")."""
    runs = {"on": "tensorflow", "off": "tensorflow-eigen"}
    runs = {name: _in_new_process(kind, threads, rounds, shapes) for name, kind in runs.items()}
    rows = []
    for on, off in zip(runs["on"], runs["off"], strict=True):
        row = {name: on[name] for name in ("shape", "call", "what")}
        for name, run in (("on", on), ("off", off)):
            row[name] = {peer: round(run[peer], 2) for peer in ("tfops", "tensorflow")}
            row[name]["ratio"] = round(run["tensorflow"] / run["tfops"], 3)
        rows.append(row)
    return rows


def overhead_table(rows: list[Row]) -> str:
    names = ["shape", "call", "pass", "tfops, us", "TensorFlow, us", "ratio", "oneDNN off: tfops, us", "TensorFlow, us"]
    body = []
    for row in sorted(rows, key=lambda row: row["call"]):
        line = ["x".join(map(str, row["shape"])), row["call"], row["what"].replace("_", " + ")]
        for run in (row["on"], row["off"]):
            line += [f"{run['tfops']:.1f}", f"{run['tensorflow']:.1f}", f"{run['ratio']:.2f}"]
        body.append(line)
    lines = markdown_table([*names, "ratio"], body)
    for name in ("on", "off"):
        ratios = [row[name]["ratio"] for row in rows]
        lines.append(
            f"oneDNN {name}: geometric mean of the ratios {geometric_mean(ratios):.2f}, least {min(ratios):.2f}, "
            f"{sum(ratio < NOISE for ratio in ratios)} of {len(ratios)} below {NOISE} (aim: none).\n"
        )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Scaling


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def peak_memory(shape: list[int], layout: str, dtype: str, threads: int) -> dict[str, int]:
    """Bytes that a call of each pass takes beside its arrays."""
    from tfops_kernels import _kernels

    def arrays(shape: tuple[int, ...], axis: int) -> tuple[dict[str, Any], dict[str, Callable[[], None]]]:
        channels, elements = shape[axis], int(np.prod(shape))
        kind = {"float32": np.float32, "float64": np.float64}.get(dtype, np.uint16)
        data = {name: np.ones(elements, kind) for name in ("x", "dy", "y", "dx")}
        param = np.float64 if dtype == "float64" else np.float32
        names = ("scale", "offset", "mean", "variance", "mean_out", "variance_out", "saved_mean", "saved_inv_std")
        data |= {name: np.ones(channels, param) for name in (*names, "dscale", "doffset")}
        forward, backward = _kernels.ForwardArrays(), _kernels.BackwardArrays()
        for name in ("x", "y", *names):
            setattr(forward, name, data[name].ctypes.data)
        for name in ("x", "dy", "dx", "scale", "offset", "dscale", "doffset"):
            setattr(backward, name, data[name].ctypes.data)
        backward.mean, backward.inv_std = data["saved_mean"].ctypes.data, data["saved_inv_std"].ctypes.data
        training, inference = (
            _kernels.Problem(
                shape=list(shape),
                axis=axis,
                dtype=getattr(_kernels.DataType, dtype),
                activation="",
                has_residual=False,
                training=training,
                epsilon=EPSILON,
                exponential_avg_factor=1.0,
                unbiased=True,
            )
            for training in (True, False)
        )
        return data, {
            "forward": partial(_kernels.cpu_forward, training, forward, threads),
            "backward": partial(_kernels.cpu_backward, training, backward, threads),
            "inference": partial(_kernels.cpu_forward, inference, forward, threads),
        }

    full, axis = memory_shape(Cell("", tuple(shape), layout, dtype, "plain", "forward"))
    small = tuple(size if i == axis else min(size, 2) for i, size in enumerate(full))
    keep, calls = arrays(small, axis)
    for call in calls.values():
        call()  # the code is in memory from here on
    keep, calls = arrays(full, axis)
    extra = {}
    for what, call in calls.items():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the resident set again
        before = _status("VmRSS")
        call()
        extra[what] = max(_status("VmHWM") - before, 0)
    del keep
    return extra


def scaling(make_process: Callable[[str, int], Any], dtype: str, most: float, threads: int) -> list[Row]:
    """A row for each layout and size: nanoseconds an element, and bytes beside the arrays."""
    rows = []
    process = make_process("tensorflow", threads)
    process.ready()
    for layout in ("NHWC", "NCHW"):
        for shape in SIZES:
            cell = Cell("scaling", shape, layout, dtype, "plain", "forward")
            if cell.elements > 1.1 * most:
                continue
            prepared, _ = process.ask("prepare", cell, list(PASSES), "tfops")
            row: Row = {"layout": layout, "shape": list(shape), "elements": cell.elements, "dtype": dtype, "ns": {}}
            for call in prepared:
                count = min(max(round(0.5 / call.seconds), 7), 100)
                seconds = statistics.median(process.ask("time", "tfops", call.what, count, True))
                row["ns"][call.what] = float(f"{seconds / cell.elements * 1e9:.4g}")
            rows.append(row)
    process.close()  # before memory is measured: there is no room for the largest tensors twice
    for row in rows:
        row["extra_bytes"] = _in_new_process("memory", row["shape"], row["layout"], dtype, threads)
    return rows


def scaling_table(rows: list[Row]) -> str:
    names = ["layout", "shape", "elements", *(f"{what}, ns an element" for what in PASSES)]
    names += [f"{what}, MiB beside the arrays" for what in PASSES]
    body = []
    for row in rows:
        line = [row["layout"], "x".join(map(str, row["shape"])), f"{row['elements']:.3g}"]
        line += [f"{row['ns'][what]:.4f}" for what in PASSES]
        body.append([*line, *(f"{row['extra_bytes'][what] / 2**20:.2f}" for what in PASSES)])
    return f"{rows[0]['dtype']}\n\n" + "\n".join(markdown_table(names, body))


if __name__ == "__main__":
    modes = {
        "tensorflow": overhead_in_process,
        "tensorflow-eigen": overhead_in_process,
        "memory": peak_memory,
    }
    print(json.dumps(modes[sys.argv[1]](*json.loads(sys.argv[2]))))
