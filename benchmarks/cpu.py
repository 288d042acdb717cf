"""The CPU kernels against what else there is, on one machine and in one run: `python benchmarks/cpu.py --out FILE`.

Peers: TensorFlow's fused op with oneDNN and without, Keras' layer in tf.function and compiled by XLA, PyTorch (left out
where it is not installed); all with the same number of threads. What exactly is timed stands in cpu_peers.py, how in
cpu_worker.py; the problems in problems.py.

For each problem all peers get the same numbers, and their results must agree with tfops' before anything is timed.
Where one does not, float64 tells whose error it is (cpu_exact.py): one that rounds in between is timed all the same.
Then come rounds, each with every peer in another order: after a call that is not counted, a few that are. A time is the
median over all rounds, 5 or more of them (3 for a peer that takes ten times as long as tfops). Before each problem a
streaming copy of arrays much larger than the caches is timed, and what it takes to read them.

FILE.json has a line for each problem with medians, quartiles and counts; it is written as they come, and `--resume`
goes on where a run was cut off, and measures again what other programs disturbed. FILE.md has the same as a table after
a summary, FILE.svg and FILE.png a plot.

`--overhead` and `--scaling` answer two other questions: what a call costs where there is nothing to compute, and how
time and memory grow with size (cpu_modes.py).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cpu_modes
import cpu_report
import tfops_kernels
from cpu_exact import exact
from cpu_worker import ENVIRONMENT, Prepared
from problems import BYTES, CPU_NETWORKS, PASSES, VARIANTS, Cell, cells

ALL_PASSES = (*PASSES, "forward_backward")
LEAST_ROUNDS, MOST_ROUNDS = 5, 25
SLOW, SLOW_ROUNDS = 10, 3  # a peer so many times slower than tfops gets so many rounds
VISIT_SECONDS = 12e-3  # a round's calls of one peer
LONG_SECONDS = 20e-3  # longer calls need none before them to find the cache as it will be
PAUSE_SECONDS = 2e-3  # between processes, for the threads of one to fall asleep
# What results may differ by, relative to the largest; and the share of elements that may differ by more, for where
# z is almost 0 roundings decide what ReLU lets through.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
OUTLIERS = 0.01
VECTOR_TOLERANCE = 0.02  # of sums over such elements, in the mean
ROUGH = 0.1  # in the mean: no rounding, but something else


class Process:
    """A process of cpu_peers.py."""

    def __init__(self, kind: str, threads: int):
        self.kind = kind
        script = Path(__file__).with_name("cpu_peers.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), kind, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **ENVIRONMENT[kind]},
        )
        self.pid = self._process.pid
        self.versions: dict[str, str] = {}

    def ready(self) -> str | None:
        """Waits until it has its framework. Returns why not, if it has none."""
        self.versions, missing = self._receive()
        return missing

    def begin(self, method: str, *arguments: Any) -> None:
        pickle.dump((method, arguments), self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> tuple[Any, str | None]:
        try:
            return pickle.load(self._process.stdout)
        except EOFError:
            raise RuntimeError(f"the {self.kind} process died: exit status {self._process.wait()}") from None

    def finish(self) -> Any:
        """The result of what was begun."""
        result, error = self._receive()
        if error:
            raise RuntimeError(f"{self.kind}: {error}")
        return result

    def ask(self, method: str, *arguments: Any) -> Any:
        self.begin(method, *arguments)
        return self.finish()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def start_processes(threads: int) -> tuple[list[Process], Process]:
    """Those of all frameworks that are installed, and that of the streaming copy."""
    processes = [Process(kind, threads) for kind in ENVIRONMENT]
    frameworks = []
    for process in processes:
        if missing := process.ready():
            print(f"cpu.py: without {process.kind}: {missing}", file=sys.stderr)
            process.close()
        elif process.kind != "copy":
            frameworks.append(process)
    return frameworks, processes[-1]


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distances, relative to the largest element."""
    return np.abs(got - want) / np.abs(want).max()


def is_near(cell: Cell, name: str, error: np.ndarray) -> bool:
    if name in ("dscale", "doffset") and cell.variant != "plain":
        return error.mean() <= VECTOR_TOLERANCE
    return np.mean(error <= TOLERANCE[cell.dtype]) >= 1 - OUTLIERS  # NaN is not near anything


def disagreement(cell: Cell, ours: Prepared, theirs: Prepared) -> tuple[str, bool] | None:
    """How far a peer's results and tfops' are from float64 where they disagree, and whether that ends it.

    A peer that rounds to 16 bits in between, where tfops is one op, is off by more than tfops, and timed all the same.
    """
    for name, want in ours.results.items():
        got = theirs.results.get(name)
        if got is None:
            continue
        if got.shape != want.shape:
            return f"{name} has {got.size} elements in place of {want.size}", True
        if not is_near(cell, name, relative(got, want)):
            truth = exact(cell)[name]
            off, ours_off = relative(got, truth), relative(want, truth)
            right = is_near(cell, name, ours_off) and off.mean() <= ROUGH
            text = f"{name} is off by {off.mean():.1e} (mean) and {off.max():.1e} (most) against float64"
            return f"{text}, tfops' by {ours_off.mean():.1e} and {ours_off.max():.1e}", not right
    return None


def cpu_seconds(pids: Sequence[int]) -> tuple[float, float]:
    """CPU time so far: of the whole machine, with what its host took, and of these processes."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ours += int(fields[11]) + int(fields[12])
    return (user + nice + system + irq + softirq + steal) / tick, ours / tick


def rounds(prepared: dict[str, tuple[Process, Prepared]], budget: float) -> dict[str, list[float]]:
    """Seconds of each peer's steps, over rounds that take `budget` seconds, more if these are too few."""
    ours = prepared["tfops"][1]
    samples: dict[str, list[float]] = {peer: [] for peer in prepared}
    order, last = list(prepared), None
    end = time.perf_counter() + budget
    for i in range(MOST_ROUNDS):
        if i >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        random.shuffle(order)
        for peer in order:
            process, call = prepared[peer]
            slow = call.seconds / call.steps > SLOW * ours.seconds / ours.steps
            if slow and i >= SLOW_ROUNDS:
                continue
            if last not in (None, process):
                time.sleep(PAUSE_SECONDS)
            last = process
            calls = min(max(round(VISIT_SECONDS / call.seconds), 1), 10)
            samples[peer] += process.ask("time", peer, call.what, calls, call.seconds < LONG_SECONDS)
    return samples


def measure(processes: list[Process], copy: Process, problem: list[Cell], budget: float) -> tuple[dict[str, Any], list]:
    """A problem's row, and what is wrong with its results. `budget`: seconds for each cell's rounds."""
    begin = time.perf_counter()
    cell = problem[0]
    passes = [cell.what for cell in problem]
    for process in processes:
        process.begin("prepare", cell, passes)
    prepared: dict[str, dict[str, tuple[Process, Prepared]]] = {what: {} for what in passes}
    absent: dict[str, str] = {}
    for process in processes:
        calls, reasons = process.finish()
        absent |= reasons
        for call in calls:
            prepared[call.what][call.peer] = (process, call)
    wrong = []
    for what, peers in prepared.items():
        for peer, (_, call) in list(peers.items()):
            if found := disagreement(cell._replace(what=what), peers["tfops"][1], call):
                text, is_wrong = found
                line = f"{cell._replace(what=what)}: {peer}: {text}"
                if is_wrong:
                    wrong.append(line)
                    del peers[peer]
                else:
                    print(f"cpu.py: less accurate: {line}", file=sys.stderr, flush=True)
    row: dict[str, Any] = {**cell._asdict(), "shape": list(cell.shape), "absent": absent, "passes": {}}
    del row["what"]
    row["copy_bytes_per_second"] = statistics.median(copy.ask("copies", 3))
    row["read_bytes_per_second"] = statistics.median(copy.ask("reads", 3))
    row["seconds_to_prepare"] = round(time.perf_counter() - begin, 2)
    pids = [os.getpid(), *(process.pid for process in processes)]
    start, (machine_before, ours_before) = time.perf_counter(), cpu_seconds(pids)
    for what, peers in prepared.items():
        row["passes"][what] = {"peers": {peer: summary(times) for peer, times in rounds(peers, budget).items()}}
    machine_after, ours_after = cpu_seconds(pids)
    others = machine_after - machine_before - (ours_after - ours_before)
    row["others"] = round(max(others, 0) / (time.perf_counter() - start), 3)
    row["seconds"] = round(time.perf_counter() - begin, 2)
    return row, wrong


def summary(times: list[float]) -> dict[str, Any]:
    """The median, the quartiles and the number of times; microseconds, to 4 digits."""
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
    return {"us": [float(f"{value * 1e6:.4g}") for value in (low, median, high)], "n": len(times)}


# ----------------------------------------------------------------------------------------------------------------------
# Output


def last_level_cache() -> int:
    """Bytes of the last-level cache that a core sees, but no more than 16 MiB for each core that this process has.

    A virtual machine sees all of its host's. The kernels reckon with as much (csrc/batch_norm/cpu/jobs.cc).
    """
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
    bytes_seen = max(sizes) or max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), os.sysconf("SC_LEVEL2_CACHE_SIZE"))
    return min(bytes_seen, (os.cpu_count() or 1) * 16 << 20)


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine(threads: int) -> dict[str, Any]:
    info = tfops_kernels.build_info()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "last_level_cache_bytes": last_level_cache(),
        "instruction_set": info["cpu_instruction_set"],
        "tfops": info["version"],
        "python": platform.python_version(),
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """A line for each row, and the file is whole at any time."""
    head = json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in report["rows"])
    text = f'{head.rstrip().removesuffix("}").rstrip()},\n "rows": [\n{rows}\n]}}\n'
    new = path.with_suffix(".json.new")
    new.write_text(text)
    new.replace(path)


def key(row: dict[str, Any]) -> tuple:
    return (row["network"], tuple(row["shape"]), row["layout"], row["dtype"], row["variant"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, values in (
        ("--network", list(CPU_NETWORKS)),
        ("--dtype", list(BYTES)),
        ("--layout", ["NHWC", "NCHW"]),
        ("--variant", list(VARIANTS)),
        ("--pass", list(ALL_PASSES)),
    ):
        parser.add_argument(flag, nargs="+", choices=values, default=values, help="default: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--seconds", type=float, default=1500, help="to spend on rounds in all (default: 1500)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json, FILE.md, FILE.svg and FILE.png")
    parser.add_argument("--resume", action="store_true", help="keep the rows that FILE.json has")
    parser.add_argument("--overhead", action="store_true", help="what a call of a small problem costs")
    parser.add_argument("--scaling", action="store_true", help="time and memory from 10^4 to 10^9 elements")
    parser.add_argument("--most", type=float, default=1e9, help="--scaling: elements at most (default: 1e9)")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.out:
        parser.error("--resume needs --out")
    return arguments


def compare(arguments: argparse.Namespace) -> int:
    """All problems, all peers."""
    every = cells(
        *(arguments.network, arguments.dtype, arguments.layout, arguments.variant, getattr(arguments, "pass")),
        shapes=CPU_NETWORKS,
    )
    problems = [list(group) for _, group in itertools.groupby(every, key=lambda cell: cell[:-1])]
    json_file = arguments.out and arguments.out.with_suffix(".json")
    old = json.loads(json_file.read_text()) if arguments.resume and json_file.exists() else None
    if old:
        old["rows"] = [row for row in old["rows"] if row["others"] <= cpu_report.DISTURBED]
        done = {key(row) for row in old["rows"]}
        problems = [problem for problem in problems if key(problem[0]._asdict()) not in done]
        if not problems:
            return finish(old, arguments.out)
    processes, copy = start_processes(arguments.threads)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **machine(arguments.threads),
        "versions": {name: value for process in processes for name, value in process.versions.items()},
        "copy_bytes_per_second": None,
        "rows": [],
    }
    if old:
        for name in ("cpu", "threads", "versions"):
            if old[name] != report[name]:
                print(f"cpu.py: {json_file} has {name} {old[name]}, not {report[name]}", file=sys.stderr)
                return 2
        report["rows"] = old["rows"]
    left, begin, wrong = arguments.seconds, time.perf_counter(), []
    for i, problem in enumerate(problems):
        row, wrong_here = measure(processes, copy, problem, left / (len(problems) - i) / len(problem))
        left = max(left - (row["seconds"] - row["seconds_to_prepare"]), 0)
        report["rows"].append(row)
        for line in wrong_here:
            print(f"cpu.py: wrong result: {line}", file=sys.stderr, flush=True)
        wrong += wrong_here
        cpu_report.derive(report)
        if json_file:
            write_json(json_file, report)
        if (i + 1) % 10 == 0:
            minutes = (time.perf_counter() - begin) / 60
            print(f"{i + 1} of {len(problems)} problems, {minutes:.1f} minutes", file=sys.stderr, flush=True)
    for process in [*processes, copy]:
        process.close()
    finish(report, arguments.out)
    return 1 if wrong else 0


def finish(report: dict[str, Any], out: Path | None) -> int:
    """Prints the report, and writes all but its JSON."""
    text = cpu_report.text(report)
    print(text)
    if out:
        out.with_suffix(".md").write_text(text)
        if problem := cpu_report.plot(report, out):
            print(f"cpu.py: {problem}", file=sys.stderr)
    return 0


def other_modes(arguments: argparse.Namespace) -> int:
    """--overhead or --scaling."""
    report = {"date": datetime.date.today().isoformat(), **machine(arguments.threads)}
    if arguments.overhead:
        report["rows"] = cpu_modes.overhead(arguments.threads)
        table = cpu_modes.overhead_table(report["rows"])
    else:
        report["rows"] = cpu_modes.scaling(Process, arguments.dtype[0], arguments.most, arguments.threads)
        table = cpu_modes.scaling_table(report["rows"])
    text = f"## {cpu_report.heading(report)}\n\n{table}"
    print(text)
    if arguments.out:
        write_json(arguments.out.with_suffix(".json"), report)
        arguments.out.with_suffix(".md").write_text(text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return other_modes(arguments) if arguments.overhead or arguments.scaling else compare(arguments)


if __name__ == "__main__":
    sys.exit(main())
