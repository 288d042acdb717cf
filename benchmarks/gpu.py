"""The CUDA kernels against cuDNN and PyTorch's own, on a GPU: `python benchmarks/gpu.py`.

Needs PyTorch with CUDA, and no TensorFlow. Where tfops_kernels is not installed, builds it first, for this GPU. Checks
every cell's result against float64 before it times it. Without a GPU, `--predict` prints what counted bytes and a
stated bandwidth say: a prediction, and labelled so.

A cell's time is that of one call on the GPU, launches included and Python left out: a CUDA graph of calls over buffers
that are rotated so that no call finds its data in L2, replayed many times, median of the events around each replay.
Peers run likewise: cuDNN and PyTorch's native kernels, on channels-last and contiguous memory for 4-D and 5-D data,
followed by PyTorch's own add and relu where tfops has them fused. The best of them counts.

A launch that CUDA refuses, for which the streaming tier does the work, is told of, and the exit status is 1.

Columns: microseconds, GB/s on the least bytes that the cell needs, that as a fraction of a device-to-device copy,
the best peer's time, and its ratio to tfops' (> 1: tfops is faster). Of a prediction: the tier, the waves of its
blocks, and the estimate by which the policy took it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from problems import NETWORKS, PASSES, VARIANTS, Cell, cells

ROOT = Path(__file__).resolve().parent.parent


def import_kernels() -> ModuleType:
    """tfops_kernels, built for this machine's GPU if it is not installed."""
    try:
        return importlib.import_module("tfops_kernels")
    except ImportError:
        print("gpu.py: building tfops_kernels", file=sys.stderr)
    target = str(ROOT / "build" / "benchmark")
    settings = ["TFOPS_TENSORFLOW=OFF", "TFOPS_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=native"]
    options = [word for setting in settings for word in ("-C", f"cmake.define.{setting}")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", target]
    subprocess.run([*pip, *options, str(ROOT)], check=True)
    sys.path.insert(0, target)
    return importlib.import_module("tfops_kernels")


tfops_kernels = import_kernels()
_kernels = tfops_kernels._kernels

EPSILON = 1e-3
MOMENTUM = 0.01
LAUNCH_SECONDS = 2.5e-6  # what one launch inside a graph costs, for predictions
COPY_BYTES_PER_SECOND = 4.3e12  # an H200's device-to-device copy, read + written, for predictions


def to_layout(cell: Cell) -> tuple[tuple[int, ...], int]:
    """The shape of the cell's data, and the axis of their channels."""
    if cell.layout == "NHWC":
        return cell.shape, len(cell.shape) - 1
    return (cell.shape[0], cell.shape[-1], *cell.shape[1:-1]), 1


# ----------------------------------------------------------------------------------------------------------------------
# What is timed: functions of a buffer set's index, that allocate nothing of tfops' own between calls.


class Tensors:
    """One set of a cell's inputs and outputs."""

    def __init__(self, torch: Any, cell: Cell):
        shape, axis = to_layout(cell)
        kind = getattr(torch, cell.dtype)
        channels = shape[axis]
        self.axis = axis
        self.x, self.dy, self.residual = (torch.randn(shape, device="cuda").to(kind) for _ in range(3))
        self.scale, self.offset = torch.rand(channels, device="cuda") + 0.5, torch.randn(channels, device="cuda")
        self.mean, self.variance = torch.randn(channels, device="cuda"), torch.rand(channels, device="cuda") + 0.5


def tfops_call(torch: Any, cell: Cell, t: Tensors) -> tuple[Callable[[], None], dict[str, Any]]:
    """A call of the kernels with everything allocated, and its results by name."""
    add = cell.variant == "add_relu"
    training = cell.what != "inference"
    problem = _kernels.Problem(
        shape=list(t.x.shape),
        axis=t.axis,
        dtype=getattr(_kernels.DataType, cell.dtype),
        activation="" if cell.variant == "plain" else "relu",
        has_residual=add,
        training=training,
        epsilon=EPSILON,
        exponential_avg_factor=MOMENTUM if training else 1.0,
        unbiased=True,
    )
    out: dict[str, Any] = {"y": torch.empty_like(t.x)}
    for name in ("mean_out", "variance_out", "saved_mean", "saved_inv_std"):
        out[name] = torch.empty_like(t.scale)
    out["mask"] = torch.empty(problem.mask_bytes, dtype=torch.uint8, device="cuda")
    forward = _kernels.ForwardArrays()
    for name in ("x", "scale", "offset", "mean", "variance"):
        setattr(forward, name, getattr(t, name).data_ptr())
    forward.residual = t.residual.data_ptr() if add else 0
    for name, tensor in out.items():
        setattr(forward, name, tensor.data_ptr())
    workspace = torch.empty(_kernels.cuda_forward_workspace_bytes(problem) + 16, dtype=torch.uint8, device="cuda")

    def run_forward() -> None:
        _kernels.cuda_forward(problem, forward, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)

    if cell.what != "backward":
        return run_forward, {**out, "workspace": workspace}
    run_forward()
    out |= {"dx": torch.empty_like(t.x), "dscale": torch.empty_like(t.scale), "doffset": torch.empty_like(t.scale)}
    out["dresidual"] = torch.empty_like(t.x) if add else None
    backward = _kernels.BackwardArrays()
    for name in ("dy", "x", "scale", "offset"):
        setattr(backward, name, getattr(t, name).data_ptr())
    backward.mean, backward.spread = out["saved_mean"].data_ptr(), out["saved_inv_std"].data_ptr()
    backward.mask = out["mask"].data_ptr()
    for name in ("dx", "dscale", "doffset"):
        setattr(backward, name, out[name].data_ptr())
    backward.dresidual = out["dresidual"].data_ptr() if add else 0
    space = torch.empty(_kernels.cuda_backward_workspace_bytes(problem) + 16, dtype=torch.uint8, device="cuda")

    def run_backward() -> None:
        _kernels.cuda_backward(problem, backward, space.data_ptr(), torch.cuda.current_stream().cuda_stream)

    return run_backward, {**out, "workspace": workspace, "space": space}


def peer_calls(torch: Any, cell: Cell, t: Tensors) -> dict[str, Callable[[], Any]]:
    """The same by PyTorch: cuDNN and native kernels, channels-last and contiguous memory."""
    aten = torch.ops.aten
    first = t.x if t.axis == 1 else t.x.movedim(-1, 1)  # channels second, as PyTorch wants it; the memory stays
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory = {"contiguous": torch.contiguous_format}
    if first.dim() in formats:
        memory["channels_last"] = formats[first.dim()]
    calls = {}
    for format_name, memory_format in memory.items():

        def place(tensor: Any, memory_format: Any = memory_format) -> Any:
            tensor = tensor if t.axis == 1 else tensor.movedim(-1, 1)
            return tensor.contiguous(memory_format=memory_format)

        x, dy, residual = place(t.x), place(t.dy), place(t.residual)
        for kind in ("cudnn", "native"):
            if kind == "cudnn" and cell.what != "inference" and first.dim() == 2:
                continue  # PyTorch does not give it 2-D data
            calls[f"{kind}, {format_name}"] = _peer_call(torch, aten, cell, t, kind, x, dy, residual)
    return calls


def _peer_call(torch: Any, aten: Any, cell: Cell, t: Tensors, kind: str, x: Any, dy: Any, residual: Any) -> Callable:
    mean, variance = t.mean.clone(), t.variance.clone()
    training = cell.what != "inference"

    def normalize() -> tuple:
        if kind == "cudnn":
            return aten.cudnn_batch_norm(x, t.scale, t.offset, mean, variance, training, MOMENTUM, EPSILON)
        return aten.native_batch_norm(x, t.scale, t.offset, mean, variance, training, MOMENTUM, EPSILON)

    def forward() -> Any:
        y, *saved = normalize()
        if cell.variant == "add_relu":
            y.add_(residual)
        return (y if cell.variant == "plain" else y.relu_()), saved

    if cell.what != "backward":
        return forward
    y, saved = forward()

    def backward() -> Any:
        dz = dy if cell.variant == "plain" else aten.threshold_backward(dy, y, 0)
        if kind == "cudnn":
            return aten.cudnn_batch_norm_backward(
                x, dz, t.scale, mean, variance, saved[0], saved[1], EPSILON, saved[2]
            ), dz
        return aten.native_batch_norm_backward(
            dz, x, t.scale, mean, variance, saved[0], saved[1], True, EPSILON, [True] * 3
        ), dz

    return backward


# ----------------------------------------------------------------------------------------------------------------------
# Checking and timing


def check(torch: Any, cell: Cell, t: Tensors, call: Callable[[], None], out: dict[str, Any]) -> float:
    """The largest error of y or dx against float64, in units of what rounding allows: may be up to 1."""
    call()
    x, dy, residual = (tensor.double() for tensor in (t.x, t.dy, t.residual))
    others = [i for i in range(x.dim()) if i != t.axis]
    view = [-1 if i == t.axis else 1 for i in range(x.dim())]
    training = cell.what != "inference"
    mean = x.mean(others) if training else t.mean.double()
    variance = x.var(others, unbiased=False) if training else t.variance.double()
    inv_std = (variance + EPSILON).rsqrt()
    slope = t.scale.double() * inv_std
    xc = x - mean.view(view)
    z = xc * slope.view(view) + t.offset.double().view(view)
    if cell.variant == "add_relu":
        z += residual
    if cell.what == "backward":
        dz = dy if cell.variant == "plain" else torch.where(z > 0, dy, 0.0)
        n = x.numel() // x.shape[t.axis]
        sum_dz, sum_dz_xc = dz.sum(others), (dz * xc).sum(others)
        want = dz * slope.view(view) - (slope * sum_dz / n).view(view)
        want -= xc * (slope * inv_std**2 * sum_dz_xc / n).view(view)
        got = out["dx"]
        safe = z.abs() > 1e-4 if cell.variant != "plain" else torch.ones_like(z, dtype=torch.bool)
    else:
        want, got, safe = (z if cell.variant == "plain" else z.relu()), out["y"], torch.ones_like(z, dtype=torch.bool)
    eps = torch.finfo(getattr(torch, cell.dtype)).eps
    bound = eps * want.abs() + 64 * torch.finfo(torch.float32).eps * (1 + slope.abs().max() * 8)
    return float(torch.where(safe, (got.double() - want).abs() / bound, 0.0).max())


def seconds_a_call(torch: Any, calls: Sequence[Callable[[], Any]], budget: float) -> float:
    """The median time of one of `calls`, which are captured in a row, replayed for about `budget` seconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    keep = []
    with torch.cuda.graph(graph):
        for call in calls:
            keep.append(call())
    graph.replay()
    torch.cuda.synchronize()
    times = []
    end = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return statistics.median(times)


def measure(torch: Any, cell: Cell, l2_bytes: int, budget: float) -> dict[str, Any]:
    """A cell's row."""
    # Enough sets that a call's data are gone from L2 when its turn comes again.
    sets = min(max(2, math.ceil(3 * l2_bytes / max(cell.least_bytes, 1))), 64)
    tensors = [Tensors(torch, cell) for _ in range(sets)]
    ours = [tfops_call(torch, cell, t) for t in tensors]
    error = check(torch, cell, tensors[0], *ours[0])
    row = {**cell._asdict(), "error": error, "seconds": seconds_a_call(torch, [call for call, _ in ours], budget)}
    del ours
    peers: dict[str, float] = {}
    every = [peer_calls(torch, cell, t) for t in tensors]
    for name in every[0]:
        try:
            peers[name] = seconds_a_call(torch, [calls[name] for calls in every], budget)
        except RuntimeError as problem:
            peers[name] = math.inf
            print(f"{name} cannot run {cell}: {str(problem).splitlines()[0]}", file=sys.stderr)
    row["peers"] = peers
    return row


def copy_rate(torch: Any) -> float:
    """Bytes read and written a second by a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / seconds_a_call(torch, [lambda: target.copy_(source)], 0.2)


# ----------------------------------------------------------------------------------------------------------------------
# Output


def predict(cell: Cell) -> dict[str, Any]:
    """A cell's row without a GPU: the bytes of its tier's passes at the copy's rate, and its launches."""
    shape, axis = to_layout(cell)
    add = cell.variant == "add_relu"
    plan = tfops_kernels.cuda_plan(
        shape,
        axis=axis,
        dtype=cell.dtype,
        backward=cell.what == "backward",
        residual=add,
        training=cell.what != "inference",
        activation=None if cell.variant == "plain" else "relu",
    )
    moved = cell.least_bytes
    if plan.tier == "streaming" and cell.what != "inference":
        moved += cell.tensor_bytes * (2 if cell.what == "backward" else 1)
    seconds = plan.launches * LAUNCH_SECONDS + moved / COPY_BYTES_PER_SECOND
    return {
        **cell._asdict(),
        "tier": plan.tier,
        "launches": plan.launches,
        "waves": plan.waves,
        "policy_seconds": plan.nanoseconds / 1e9,
        "moved_bytes": moved,
        "seconds": seconds,
    }


def finish(row: dict[str, Any], cell: Cell, rate: float) -> dict[str, Any]:
    """Adds the derived columns."""
    row["least_bytes"] = cell.least_bytes
    row["bytes_per_second"] = cell.least_bytes / row["seconds"]
    row["of_copy"] = row["bytes_per_second"] / rate
    if row.get("peers"):
        row["best_peer"] = min(row["peers"], key=row["peers"].get)
        row["ratio"] = row["peers"][row["best_peer"]] / row["seconds"]
    return row


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown, a line for each cell."""
    lines = [f"## {title}", ""]
    names = [
        "network",
        "shape",
        "layout",
        "dtype",
        "variant",
        "pass",
        "us",
        "GB/s",
        "of copy",
        "best peer",
        "us",
        "ratio",
    ]
    predicted = "tier" in rows[0]
    if predicted:
        names = [*names[:9], "tier", "waves", "policy us"]
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = [row["network"], "x".join(map(str, row["shape"])), row["layout"], row["dtype"], row["variant"]]
        values += [row["what"], f"{row['seconds'] * 1e6:.1f}", f"{row['bytes_per_second'] / 1e9:.0f}"]
        values.append(f"{row['of_copy']:.2f}")
        if predicted:
            values += [row["tier"], str(row["waves"]), f"{row['policy_seconds'] * 1e6:.1f}"]
        else:
            best = row["peers"][row["best_peer"]]
            values += [row["best_peer"], f"{best * 1e6:.1f}", f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join(values) + " |")
    if not predicted:
        ratios = [row["ratio"] for row in rows]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        lines += ["", f"Geometric mean of the ratios {mean:.2f}, least {min(ratios):.2f}, "]
        lines[-1] += f"{sum(r < 1 for r in ratios)} of {len(ratios)} below 1."
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, values in (
        ("--network", list(NETWORKS)),
        ("--dtype", ["float32", "float16", "bfloat16"]),
        ("--layout", ["NHWC", "NCHW"]),
        ("--variant", list(VARIANTS)),
        ("--pass", list(PASSES)),
    ):
        parser.add_argument(flag, nargs="+", choices=values, default=values, help="default: all")
    parser.add_argument("--seconds", type=float, default=200, help="to spend on timing all cells (default: 200)")
    parser.add_argument("--out", type=Path, help="write FILE.json and FILE.md", metavar="FILE")
    parser.add_argument("--predict", action="store_true", help="no GPU: what counted bytes say")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    todo = cells(arguments.network, arguments.dtype, arguments.layout, arguments.variant, getattr(arguments, "pass"))
    info = tfops_kernels.build_info()
    date = datetime.date.today().isoformat()
    if arguments.predict:
        rate = COPY_BYTES_PER_SECOND
        rows = [finish(predict(cell), cell, rate) for cell in todo]
        title = (
            f"PREDICTION, not measured: an H200 that copies {rate / 1e12:.1f} TB/s, {LAUNCH_SECONDS * 1e6} us a launch"
        )
        report = {"prediction": True, "date": date, "copy_bytes_per_second": rate, "build": info, "rows": rows}
    else:
        import torch

        if not torch.cuda.is_available() or info["cuda_problem"]:
            print(
                f"gpu.py: no GPU: {info['cuda_problem'] or 'PyTorch sees none'} (--predict needs none)", file=sys.stderr
            )
            return 2
        rate = copy_rate(torch)
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        budget = max(arguments.seconds / len(todo) / 5, 2e-3)  # of ours, and of up to four peers
        rows = []
        for i, cell in enumerate(todo):
            rows.append(finish(measure(torch, cell, l2_bytes, budget), cell, rate))
            if i % 50 == 0:
                print(f"{i} of {len(todo)}", file=sys.stderr, flush=True)
        gpu = torch.cuda.get_device_name(0)
        title = f"{gpu}, driver for CUDA {info['cuda_driver']}, PyTorch {torch.__version__}, {date}"
        title += f"; copy {rate / 1e12:.2f} TB/s"
        report = {
            "gpu": gpu,
            "date": date,
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "copy_bytes_per_second": rate,
            "build": info,
            "launches": tfops_kernels.cuda_launches(),
            "rows": rows,
        }
    text = table(rows, title)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
        arguments.out.with_suffix(".md").write_text(text)
    wrong = [row for row in rows if not row.get("error", 0) <= 1]
    for row in wrong:
        print(f"gpu.py: wrong result: {row}", file=sys.stderr)
    refusals = [] if arguments.predict else tfops_kernels.cuda_launches()["refusals"]
    for refusal in refusals:
        print(f"gpu.py: CUDA refused a launch: {refusal}", file=sys.stderr)
    return 1 if wrong or refusals else 0


if __name__ == "__main__":
    sys.exit(main())
