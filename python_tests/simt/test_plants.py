"""What csrc/simt must find, it finds: faults planted in small kernels (csrc/simt/plants.cu)."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from tfops_testing import kernel_cases
from tfops_testing.paths import HELPERS
from tfops_testing.simt import Simt, memory, sanitizer_environment

FLOATS, THREADS, WARP = 512, 128, 32
INPUT = np.arange(FLOATS, dtype=np.float32)


def _reversed_in(run: int) -> np.ndarray:
    return INPUT.reshape(-1, run)[:, ::-1].ravel()


# What each kernel makes of INPUT without its fault, and what is said about it with the fault: a pattern of the message,
# of AddressSanitizer's report, or nothing, where only the result is wrong.
BLOCK, GRID = _reversed_in(THREADS), _reversed_in(FLOATS)
WRONG_RESULT = {
    "ReverseBlock": BLOCK,  # no barrier between write and read
    "ReverseTwice": INPUT,  # none between read and the next write
    "ReverseGrid": GRID,
    "ClusterRace": GRID,
    "LastBlock": GRID,  # a counter that is not atomic
}
MESSAGE = {
    "DivergentBarrier": (BLOCK, r"deadlock(?s:.*)threads 0-95: at __syncthreads, .*plants.cu:\d+\n.*96-127: returned"),
    "TwoBarriers": (BLOCK, r"different barriers(?s:.*)threads 1-127 in steps of 2: at __syncthreads, .*plants.cu"),
    "ReverseWarp": (_reversed_in(WARP), r"deadlock(?s:.*)threads 32-36, 38-63: at __shfl_xor_sync, .*plants.cu:\d+"),
    "ReverseHalfWarps": (_reversed_in(WARP // 2), r"from lane \d+, which the mask lacks\n  block .*, thread .*"),
    "GridDeadlock": (GRID, r"deadlock(?s:.*)at GridBarrier, .*plants.cu:\d+\n  block \(2, 0, 0\)\n.*: returned"),
    "ReverseCluster": (GRID, r"RemoteShared\(\) of a block that has ended"),
    "Misaligned": (GRID, r"a misaligned access of 8 bytes, 4 beyond(?s:.*)thread \(64, 0, 0\)"),
}
ASAN = {
    "SharedOverrun": (BLOCK, r"heap-buffer-overflow(?s:.*)WRITE of size 4(?s:.*)SharedOverrun.*plants.cu:\d+"),
    "DynamicOverrun": (BLOCK, r"heap-buffer-overflow(?s:.*)WRITE of size 4(?s:.*)DynamicOverrun.*plants.cu:\d+"),
    "GlobalOverrun": (GRID, r"heap-buffer-overflow(?s:.*)WRITE of size 4(?s:.*)GlobalOverrun.*plants.cu:\d+"),
}


def _run(simt: Simt, name: str, planted: bool, seed: int = 1) -> np.ndarray:
    simt.configure("three", seed)
    source, result = simt.place(INPUT), memory(INPUT.shape, INPUT.dtype)
    simt.machine.run_plant(name, planted, source.ctypes.data, result.ctypes.data)
    return result


@pytest.mark.parametrize("name", WRONG_RESULT)
def test_missing_barriers_change_results(simt, name):
    for seed in range(10):
        np.testing.assert_array_equal(_run(simt, name, False, seed), WRONG_RESULT[name])
    wrong = [_run(simt, name, True, seed) for seed in range(10)]
    # Blocks that happen to run one after another do not lose an update.
    least = 3 if name == "LastBlock" else 10
    assert sum((result != WRONG_RESULT[name]).any() for result in wrong) >= least
    assert name == "LastBlock" or len({result.tobytes() for result in wrong}) == 10


@pytest.mark.parametrize("name", MESSAGE)
def test_faults_are_reported_with_their_place(simt, name):
    want, message = MESSAGE[name]
    np.testing.assert_array_equal(_run(simt, name, False), want)
    with pytest.raises(RuntimeError, match=f"in {name}, .*{message}"):
        _run(simt, name, True)
    # The next launch has nothing left of that.
    np.testing.assert_array_equal(_run(simt, name, False), want)


def _asan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, *arguments]
    environment = sanitizer_environment() | {"PYTHONPATH": str(HELPERS)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("name", ASAN)
def test_accesses_out_of_bounds_are_reported(simt, name):
    want, report = ASAN[name]
    np.testing.assert_array_equal(_run(simt, name, False), want)
    run = _asan("plant", name)
    assert run.returncode != 0
    assert re.search(report, run.stderr), run.stderr


def test_nothing_is_out_of_bounds(simt):
    """The plants without their faults, and a part of the cases, under AddressSanitizer."""
    run = _asan("sound")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "sound\n"


def _sound(simt: Simt) -> None:
    for name in (*WRONG_RESULT, *MESSAGE, *ASAN):
        _run(simt, name, planted=False)
    cases = kernel_cases.random_cases(seed=5, count=2)
    for shape, axis in [((64, 64), -1), ((4, 6, 8, 8), 1)]:
        cases += kernel_cases.combinations(shape, axis)[::3]  # 3 has no factor in common with any of the choices
    for i, case in enumerate(cases):
        simt.configure(("three", "small", "one", "h200", "small_old")[i % 5], seed=i, offset=i // 5 % 2)
        kernel_cases.check(case, simt.place, np.asarray, kernels=simt)
    print("sound")


if __name__ == "__main__":
    module = Simt("asan")
    if sys.argv[1] == "plant":
        _run(module, sys.argv[2], planted=True)
    else:
        _sound(module)
