"""All that a machine with a GPU can show of the CUDA kernels, in one command and a few minutes.

    python benchmarks/gpu_proof.py --wheel tfops-*.whl --out FOLDER --minutes 9 --calibrate

Needs Python, NumPy, ml_dtypes, pytest 8.2 and PyTorch 2.3 with CUDA, or later ones; no TensorFlow, and no network.
Without --wheel it takes the tfops_kernels that are installed, or builds them with the tools that are installed
(pybind11, scikit-build-core, CMake, ninja, nvcc).

Steps, each in a process of its own, with a time limit of its own: what machine it is; the kernels' tests, each tier
forced; NVIDIA's compute-sanitizer; the times of the most telling cells in every tier that fits; with --calibrate, the
policy's constants fitted to them; the other cells as long as time is left; the same by PyTorch, cuDNN and
torch.compile; XLA's handlers under JAX. A cell's time is that of one call on the GPU, launches included and Python left
out: a CUDA graph of calls over buffers that are taken in turns so that no call finds its data in L2, replayed many
times, median. Every result is compared with float64 before it is timed.

FOLDER/results.jsonl gets a line as soon as something is known, FOLDER/summary.md is made from it, and FOLDER/log.txt
has the steps' output. --resume goes on with what is missing; --summary only writes summary.md anew. --predict needs no
GPU: what counted bytes say. --dry-run needs none either: every step, with csrc/simt in the GPU's place and a few cells.

The exit status is 0 if nothing failed, 1 if something did, and 2 if there is nothing to run on, or no room for results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.predict import predict, table
from gpu.records import FAILED, OK, Records, first_line
from gpu.runner import BY_NAME, NO_TIME, STEPS, TIME_UP, USUAL, WHOLE, Runner, end_group, start
from gpu.summary import failures, summarize
from problems import NETWORKS, PASSES, VARIANTS, cells

ROOT = Path(__file__).resolve().parent.parent
WORTH_STARTING = 15  # seconds that have to be left for a step to be taken up again
BUILD = ("TFOPS_TENSORFLOW=OFF", "TFOPS_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=native")
MOST_OF_BUILD = 0.6  # of the time: a build that takes longer leaves too little for the steps


class NotRun(Exception):
    """Why there is nothing to run on."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the folder of results (default: gpu-proof)", default="gpu-proof")
    parser.add_argument("--wheel", type=Path, help="kernels to take: a wheel of make gpu-wheel, or any of tfops")
    parser.add_argument("--minutes", type=float, default=9, help="that all of it may take (default: 9)")
    parser.add_argument("--calibrate", action="store_true", help="fit the policy's constants to the times")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in the same folder")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: every step on the simulated one, a few cells")
    parser.add_argument("--summary", action="store_true", help="only write the summary of what is in the folder")
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), help="these steps alone")
    parser.add_argument("--predict", action="store_true", help="no GPU: print what counted bytes say")
    for flag, values in (
        ("--network", list(NETWORKS)),
        ("--dtype", ["float32", "float16", "bfloat16"]),
        ("--layout", ["NHWC", "NCHW"]),
        ("--variant", list(VARIANTS)),
        ("--pass", list(PASSES)),
    ):
        parser.add_argument(flag, nargs="+", choices=values, default=values, help="with --predict (default: all)")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # what a step's process is started with; so are the next
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-allocated", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.wheel and not arguments.wheel.is_file():
        parser.error(f"--wheel is {str(arguments.wheel)!r}, but there is no such file")
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be > 0, but it is {arguments.minutes}")
    return arguments


def install(wheel: Path | None, dry_run: bool, scratch: str, log: Path, seconds: float, resume: bool = False) -> str:
    """Where Python is to find tfops_kernels; "" if they are installed. A wheel is unpacked in `scratch`."""
    if wheel is None:
        if dry_run or importlib.util.find_spec("tfops_kernels"):
            return ""
        target = ROOT / "build" / "gpu" / "installed"
        if resume and (target / "tfops_kernels").is_dir():  # of the run that is gone on with
            return str(target)
        print("gpu_proof.py: building tfops_kernels", file=sys.stderr, flush=True)
        options = [word for setting in BUILD for word in ("-C", f"cmake.define.{setting}")]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--upgrade"]
        process = start([*pip, "--target", str(target), *options, str(ROOT)], log)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise NotRun(f"the build took more than {seconds:.0f} s ({log}): take a wheel along (--wheel)") from None
        finally:
            end_group(process)
        if status:
            raise NotRun(f"the build failed: {log} says why")
        return str(target)
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
    except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
        raise NotRun(f"--wheel: {wheel} is damaged: {problem}") from None
    except OSError as problem:
        raise NotRun(f"--wheel: {wheel} cannot be unpacked in {scratch}: {problem}") from None
    return scratch


def write_summary(folder: Path, brief: bool = False) -> int:
    """Makes summary.md from what is in the folder, and prints the short of it; returns the number of failures.

    The steps' results are in another file: an error here is told of, and ends nothing.
    """
    records = Records(folder)
    try:
        if brief:
            print(summarize(records, brief=True), flush=True)
        (folder / "summary.md").write_text(summarize(records))
    except Exception as problem:
        print(f"gpu_proof.py: the summary could not be written: {first_line(problem)}", file=sys.stderr, flush=True)
    return len(failures(records))


def what_is_missing(environment: dict[str, str]) -> str:
    """Why the kernels cannot run here; "" if they can."""
    command = [sys.executable, "-c", "import tfops_kernels; print(tfops_kernels.build_info()['cuda_problem'], end='')"]
    try:
        asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        return "the driver did not answer within two minutes"
    return asked.stdout if asked.returncode == 0 else asked.stderr.strip()


def run_all(arguments: argparse.Namespace, environment: dict[str, str], seconds: float) -> int:
    """Runs the steps in that time; returns the exit status."""
    folder = arguments.out
    command = [sys.executable, __file__, "--out", str(folder), *(["--dry-run"] if arguments.dry_run else [])]
    runner = Runner(folder, seconds, command, environment)
    records = runner.records
    date = datetime.datetime.now().isoformat(timespec="seconds")
    records.write(event="run", date=date, minutes=arguments.minutes, dry_run=arguments.dry_run)

    def stop(number: int, frame: Any) -> None:
        runner.stop()
        write_summary(folder)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    steps = [step for step in STEPS if arguments.calibrate or step.name not in ("calibrate", "recheck")]
    if arguments.only:
        steps = [BY_NAME[name] for name in arguments.only]
    ended = {}
    for name in (step.name for step in steps):
        events = records.events(name, "step")
        ended[name] = events[-1]["status"] if events else ""
    through, cut = (OK, FAILED), (TIME_UP, NO_TIME)
    for i, step in enumerate(steps):
        if ended[step.name] in through:
            continue
        ended[step.name] = runner.run(step, steps[i + 1 :])
        print(f"{step.name}: {ended[step.name]}, {runner.left():.0f} s left", flush=True)
        write_summary(folder)
    # Those that ran out of their own time, if there is some in the end; and last, the one that always finds more to do.
    for step in sorted(steps, key=lambda step: step.name == "rest"):
        if ended[step.name] in cut and runner.left() > WORTH_STARTING:
            ended[step.name] = runner.run(step._replace(limit=WHOLE))
            print(f"{step.name}, again: {ended[step.name]}, {runner.left():.0f} s left", flush=True)
    failed = write_summary(folder, brief=True)
    unusual = [how for how in ended.values() if how not in USUAL]
    print(f"{failed} failed: {folder / 'summary.md'}", flush=True)
    return 1 if failed or unusual else 0


def prepare_and_run(arguments: argparse.Namespace, begin: float) -> int:
    """All of it, the kernels' installation included; `begin`: since when the time counts."""
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.summary:
        return 1 if write_summary(folder) else 0
    results = Records(folder).path
    if results.stat().st_size and not arguments.resume:
        raise NotRun(f"{results} is there already: --resume goes on with it")
    seconds = arguments.minutes * 60
    with tempfile.TemporaryDirectory(prefix="tfops-wheel-") as scratch:
        given = (arguments.wheel, arguments.dry_run, scratch, folder / "log.txt", seconds * MOST_OF_BUILD)
        installed = install(*given, resume=arguments.resume)
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
        if installed:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [installed, environment.get("PYTHONPATH")]))
        if problem := "" if arguments.dry_run else what_is_missing(environment):
            raise NotRun(f"{problem} (--dry-run and --predict need no GPU)")
        return run_all(arguments, environment, seconds - (time.monotonic() - begin))


def main(argv: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    arguments = parse_arguments(argv)
    if arguments.predict:  # for an H200, whatever GPU is here and whatever it is told
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for name in ("TFOPS_TIER", "TFOPS_TUNING", "TFOPS_FREE_MULTIPROCESSORS"):
            os.environ.pop(name, None)
        chosen = (arguments.network, arguments.dtype, arguments.layout, arguments.variant, getattr(arguments, "pass"))
        print(table([predict(cell) for cell in cells(*chosen)]), end="")
        return 0
    if arguments.sanitized:
        from gpu import sanitized

        return sanitized.main(arguments.dry_run, arguments.as_allocated)
    arguments.out = arguments.out.resolve()
    if (arguments.resume or arguments.summary) and not arguments.out.is_dir():
        print(f"gpu_proof.py: --out: there is no folder {arguments.out}", file=sys.stderr)
        return 2
    if arguments.out.exists() and not arguments.out.is_dir():
        print(f"gpu_proof.py: --out must be a folder, but {arguments.out} is a file", file=sys.stderr)
        return 2
    if arguments.wheel and not zipfile.is_zipfile(arguments.wheel):
        print(f"gpu_proof.py: --wheel must be a wheel, but it is {arguments.wheel}", file=sys.stderr)
        return 2
    if arguments.step:
        from gpu import steps

        return steps.run(arguments.step, steps.Context(arguments.out, arguments.seconds, arguments.dry_run))
    try:
        return prepare_and_run(arguments, begin)
    except NotRun as problem:
        print(f"gpu_proof.py: {problem}", file=sys.stderr)
    except OSError as problem:  # the folder cannot be written, or the disk is full
        print(f"gpu_proof.py: cannot write results in {arguments.out}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
