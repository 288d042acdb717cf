"""Each tier reads and writes the tensors as often as it promises, in whole sectors: counted by csrc/simt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tfops_testing import kernel_cases
from tfops_testing.kernel_cases import Case
from tfops_testing.simt import memory

ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def _counted(simt, case: Case, device: str) -> list[dict[str, Any]]:
    simt.configure(device)
    with simt.counted() as reports:
        kernel_cases.check(case, simt.place, np.asarray, kernels=simt)
    return reports


def _split(reports: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The forward launches and the backward ones."""
    backward = [i for i, report in enumerate(reports) if "dy" in report["traffic"]]
    return reports[: backward[0]], reports[backward[0] :]


def _passes(launches: list[dict[str, Any]], tensor: str, size: int) -> tuple[float, float]:
    """How often the launches read and write the tensor."""
    traffic = [launch["traffic"].get(tensor, {"loaded": 0, "stored": 0}) for launch in launches]
    return sum(t["loaded"] for t in traffic) / size, sum(t["stored"] for t in traffic) / size


def _efficiency(launches: list[dict[str, Any]], tensor: str) -> float:
    """Bytes asked for by bytes moved, of all accesses to the tensor."""
    traffic = [launch["traffic"][tensor] for launch in launches if tensor in launch["traffic"]]
    asked = sum(t["loaded"] + t["stored"] for t in traffic)
    return asked / sum(t["load_moved"] + t["store_moved"] for t in traffic)


def _reads(simt, case: Case) -> tuple[float, float]:
    """How often forward and backward are to read what they sum up, at most."""
    problem = kernel_cases.make_problem(simt.machine, case)
    plans = (simt.machine.cuda_plan(problem, backward, True, simt.machine.CudaDevice()) for backward in (False, True))
    forward, backward = (1 + plan.read_again for plan in plans)
    return forward, backward


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((512, 64), -1), ((4, 8, 32, 32), 1)], ids=str)
@pytest.mark.parametrize("tier", ["one_block", "cluster", "grid", "streaming"])
def test_training_reads_and_writes_as_often_as_promised(simt, force, tier, shape, axis, dtype):
    force(simt, tier=tier)
    size = int(np.prod(shape)) * ITEM[dtype]
    case = Case(shape, axis, dtype, True, "relu", residual=True)
    forward, backward = _split(_counted(simt, case, "three"))
    of_forward, of_backward = _reads(simt, case)
    if tier == "streaming":
        assert of_forward == of_backward == 2
    elif dtype in ("float16", "bfloat16"):
        assert of_forward == of_backward == 1  # small enough to be kept
    assert len(forward) == len(backward) == (3 if tier == "streaming" else 1)
    assert _passes(forward, "x", size) == (of_forward, 0)
    assert _passes(forward, "residual", size) == (1, 0)
    assert _passes(forward, "y", size) == (0, 1)
    assert _passes(backward, "x", size) == (of_backward, 0)
    assert _passes(backward, "dy", size) == (of_backward, 0)
    assert _passes(backward, "dx", size) == (0, 1)
    assert _passes(backward, "dresidual", size) == (0, 1)
    for launches, tensors in ((forward, ("x", "residual", "y")), (backward, ("x", "dy", "dx", "dresidual"))):
        for tensor in tensors:
            assert _efficiency(launches, tensor) > 0.95, tensor


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "forward_passes", "backward_passes"), [(4560, 2, 3.4), (9120, 2.2, 4.25)])
def test_what_a_grid_has_no_room_for_is_read_again(simt, force, rows, forward_passes, backward_passes, residual):
    """On 3 multiprocessors as much to each as an H200's have of 25.7 and 51.4 MB: x and y, or dy, x and dx."""
    force(simt, tier="grid")
    case = Case((rows, 64), -1, "float16", True, "relu", residual)
    forward, backward = _split(_counted(simt, case, "three"))
    size = rows * 64 * 2
    moved = sum(sum(_passes(forward, tensor, size)) for tensor in ("x", "y"))
    assert 2 <= moved <= forward_passes
    moved = sum(sum(_passes(backward, tensor, size)) for tensor in ("dy", "x", "dx"))
    assert 3 < moved <= backward_passes
    if residual:
        assert _passes(forward, "residual", size) == (1, 0)
        assert _passes(backward, "dresidual", size) == (0, 1)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((4096, 64), -1), ((4, 16, 64, 64), 1)], ids=str)
def test_inference_reads_and_writes_once(simt, shape, axis, dtype):
    size = int(np.prod(shape)) * ITEM[dtype]
    forward, _ = _split(_counted(simt, Case(shape, axis, dtype, False, "relu"), "h200"))
    assert _passes(forward, "x", size) == (1, 0)
    assert _passes(forward, "y", size) == (0, 1)
    assert _efficiency(forward, "x") > 0.95
    assert _efficiency(forward, "y") > 0.95


@pytest.mark.parametrize(("offset", "sectors"), [(0, 4), (1, 5), (8, 4)])
def test_counts_of_a_known_kernel_are_exact(simt, offset, sectors):
    """A kernel of 16 warps, each of which reads 32 neighbouring floats; beyond an aligned address, one sector more."""
    simt.configure("three")
    source = memory((512,), np.float32, offset)
    result = memory((512,), np.float32)
    with simt.counted() as reports:
        simt.machine.clear_watches()
        simt.machine.watch("source", source.ctypes.data, source.nbytes)
        simt.machine.run_plant("ReverseBlock", False, source.ctypes.data, result.ctypes.data)
    (report,) = reports
    assert (report["kernel"], report["grid"], report["block"]) == ("ReverseBlock", (4, 1, 1), (128, 1, 1))
    assert report["static_shared"] == 512
    assert report["traffic"] == {
        "source": {"loaded": 2048, "load_moved": 16 * sectors * 32, "stored": 0, "store_moved": 0},
        "": {"loaded": 0, "load_moved": 0, "stored": 2048, "store_moved": 2048},
    }
