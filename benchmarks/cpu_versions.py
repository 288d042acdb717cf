"""Two builds of the CPU kernels against each other: `python benchmarks/cpu_versions.py OLD NEW --out FILE.md`.

OLD and NEW are folders with a `tfops_kernels` in them: site-packages, or what a wheel unpacks to. Both are loaded into
this process and called in turns, in a random order, on the same arrays at the same addresses, by one thread. OLD is
loaded twice, as two libraries: what these differ by is what the machine's noise and the place of code in memory do.

For each cell of problems.py, FILE.md says how many times as long OLD takes as NEW, in the median over rounds, and
whether all results are the same to the bit; before these, the geometric means and the worst cells.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from problems import CPU_NETWORKS, PASSES, VARIANTS, Cell, cells

SECONDS = 0.25  # for the rounds of a cell
VISIT_SECONDS = 2e-3  # of calls to one version in a round
LEAST_ROUNDS = 5
LIBRARY = b"libtfops_kernels.so"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


def load(folder: Path, name: str, copies: Path) -> Any:
    """The kernels' Python module of that folder, as a module of that name.

    A process has one library of a name: so this copy's is given another, as long as the first.
    """
    number = str(len(list(copies.iterdir())))
    library = LIBRARY[:-4] + number.encode() + LIBRARY[-3:]
    target = copies / name
    target.mkdir()
    module = next((folder / "tfops_kernels").glob("_kernels.*.so"))
    for path, copy in ((module, module.name), (module.with_name(LIBRARY.decode()), library.decode())):
        (target / copy).write_bytes(path.read_bytes().replace(LIBRARY, library))
    spec = importlib.util.spec_from_file_location(f"{name}._kernels", target / module.name)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes, as TensorFlow's tensors do."""
    count = math.prod(shape)
    memory = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


class Arrays:
    """A cell's arrays, which all versions share."""

    def __init__(self, cell: Cell):
        self.cell = cell
        dtype = DTYPES[cell.dtype]
        param = np.float64 if cell.dtype == "float64" else np.float32
        rng = np.random.default_rng(0)
        noise = rng.standard_normal(1048573)
        add = cell.variant.startswith("add_")
        self.inputs: dict[str, np.ndarray] = {}
        for name in ("x", "dy", *(("residual",) if add else ())):
            self.inputs[name] = aligned((cell.elements,), dtype)
            self.inputs[name][:] = np.resize(np.roll(noise, len(self.inputs) * 1000), cell.elements).astype(dtype)
        for name in ("scale", "offset", "mean", "variance"):
            self.inputs[name] = rng.uniform(0.5, 2, cell.shape[-1]).astype(param)
        rows = cell.shape[0] * cell.shape[-1] if cell.layout == "NCHW" else cell.elements // cell.shape[-1]
        mask = aligned((rows * (cell.elements // rows // 8 + 1),), np.uint8)
        vectors = {name: np.zeros(cell.shape[-1], param) for name in
                   ("mean_out", "variance_out", "saved_mean", "saved_inv_std", "dscale", "doffset", "dmean_in",
                    "dvariance_in")}  # fmt: skip
        self.outputs = {"y": aligned((cell.elements,), dtype), "dx": aligned((cell.elements,), dtype), **vectors}
        if add:
            self.outputs |= {"dresidual": aligned((cell.elements,), dtype), "mask": mask}

    def address(self, name: str) -> int:
        return (self.inputs | self.outputs)[name].ctypes.data


def call_of(kernels: Any, cell: Cell, arrays: Arrays) -> Callable[[], None]:
    """What runs the cell's pass once."""
    shape = cell.shape if cell.layout == "NHWC" else (cell.shape[0], cell.shape[-1], *cell.shape[1:-1])
    add = cell.variant.startswith("add_")
    training = cell.what != "inference"
    problem = kernels.Problem(
        shape=list(shape),
        axis=-1 if cell.layout == "NHWC" else 1,
        dtype=getattr(kernels.DataType, cell.dtype),
        activation=cell.variant.removeprefix("add_").replace("plain", ""),
        has_residual=add,
        training=training,
        epsilon=1e-3,
        exponential_avg_factor=1.0 if training else 0.0,
        unbiased=True,
    )

    def fill(struct: Any, names: dict[str, str]) -> Any:
        for field, name in names.items():
            setattr(struct, field, arrays.address(name))
        return struct

    same = lambda *names: {name: name for name in names}  # noqa: E731
    forward = fill(kernels.ForwardArrays(), same("x", "scale", "offset", "y", *(("residual",) if add else ())))
    if not training:
        fill(forward, same("mean", "variance"))
        return lambda: kernels.cpu_forward(problem, forward, 1)
    fill(forward, same("mean_out", "variance_out", "saved_mean", "saved_inv_std"))
    bits = "mask" if hasattr(forward, "mask") else "activation_bits"
    has_bits = problem.needs_mask if hasattr(problem, "needs_mask") else problem.needs_activation_bits
    fill(forward, {bits: "mask"} if has_bits else {})
    if cell.what == "forward":
        return lambda: kernels.cpu_forward(problem, forward, 1)
    kernels.cpu_forward(problem, forward, 1)
    backward = fill(kernels.BackwardArrays(), same("dy", "x", "scale", "offset", "dx", "dscale", "doffset"))
    inv_std = "spread" if hasattr(backward, "spread") else "inv_std"
    fill(backward, {"mean": "saved_mean", inv_std: "saved_inv_std"})
    fill(backward, {"dresidual": "dresidual"} if add else {})
    fill(backward, {bits: "mask"} if has_bits else {})
    fill(backward, {"residual": "residual"} if problem.needs_residual else {})
    return lambda: kernels.cpu_backward(problem, backward, 1)


def results(run: Callable[[], None], arrays: Arrays) -> list[bytes]:
    """Hashes of all outputs after a run."""
    for output in arrays.outputs.values():
        output.view(np.uint8)[:] = 0
    run()
    return [hashlib.blake2b(output.view(np.uint8).data).digest() for output in arrays.outputs.values()]


def seconds(run: Callable[[], None], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def compare(runs: list[Callable[[], None]]) -> list[float]:
    """Medians of seconds a call, measured in turns."""
    first = max(seconds(run, 1) for run in runs)
    calls = max(round(VISIT_SECONDS / first), 1)
    rounds = max(round(SECONDS / (len(runs) * (calls + 1) * first)), LEAST_ROUNDS)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for k in random.sample(range(len(runs)), len(runs)):
            runs[k]()  # the cache and the branch predictor as they will be
            times[k].append(seconds(runs[k], calls))
    return [statistics.median(t) for t in times]


def measure(versions: list[Any], todo: list[Cell]) -> Iterator[tuple[Cell, float, float, bool]]:
    """Each cell, with the times of OLD by its copy's, of both by NEW's, and whether results are the same."""
    arrays = None
    for number, cell in enumerate(todo):
        if not arrays or cell._replace(what="") != arrays.cell._replace(what=""):
            arrays = Arrays(cell)
        runs = [call_of(kernels, cell, arrays) for kernels in versions]
        same = results(runs[0], arrays) == results(runs[2], arrays)
        old, again, new = compare(runs)
        yield cell, old / again, statistics.geometric_mean([old, again]) / new, same
        print(f"{number + 1} of {len(todo)}: {label(cell)}", file=sys.stderr, flush=True)


def geometric_means(rows: list[tuple[Cell, float, float, bool]]) -> Iterator[str]:
    yield "| cells | number | OLD / NEW | from | to | OLD / OLD | from | to |"
    yield "|---|---|---|---|---|---|---|---|"
    groups = {"all": rows}
    for key in ("what", "dtype", "layout", "variant"):
        for value in dict.fromkeys(getattr(row[0], key) for row in rows):
            groups[value] = [row for row in rows if getattr(row[0], key) == value]
    for name, group in groups.items():
        noise, ratios = ([row[k] for row in group] for k in (1, 2))
        numbers = [f"{f(values):.3f}" for values in (ratios, noise) for f in (statistics.geometric_mean, min, max)]
        yield f"| {name} | {len(group)} | {' | '.join(numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", default="", help="a regular expression: only the cells that it is found in")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="such as silu, or add_leaky_relu")
    args = parser.parse_args()
    shapes = [*CPU_NETWORKS], ["float32", "bfloat16", "float16", "float64"], ["NHWC", "NCHW"], args.variants
    todo = [c for c in cells(*shapes, list(PASSES), CPU_NETWORKS) if re.search(args.cells, label(c))]
    with tempfile.TemporaryDirectory() as folder:
        versions = [load(path, name, Path(folder)) for path, name in
                    ((args.old, "old"), (args.old, "again"), (args.new, "new"))]  # fmt: skip
        rows = list(measure(versions, todo))
        title = f"## {versions[2].instruction_set()}, one thread, OLD twice and NEW in turns"
    different = [label(cell) for cell, _, _, same in rows if not same]
    lines = [title, "", *geometric_means(rows), "", f"Results differ in {len(different)} of {len(rows)} cells."]
    lines += ["", *(f"- {name}" for name in different[:20]), ""]
    lines += ["| cell | OLD / NEW | OLD / OLD |", "|---|---|---|"]
    lines += [f"| {label(c)} | {ratio:.3f} | {noise:.3f} |" for c, noise, ratio, _ in sorted(rows, key=lambda r: r[2])]
    args.out.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines[:40]))


def label(cell: Cell) -> str:
    return f"{cell.network} {'x'.join(map(str, cell.shape))} {cell.layout} {cell.dtype} {cell.variant} {cell.what}"


if __name__ == "__main__":
    main()
