"""No two threads come to the same byte, one of them to write, without a barrier between: csrc/simt's variant "race"."""

from __future__ import annotations

import numpy as np
import pytest

from tfops_testing import kernel_cases, virtual_batches
from tfops_testing.kernel_cases import Case
from tfops_testing.simt import Simt, memory


@pytest.fixture(scope="module")
def race(simt) -> Simt:
    return Simt("race")


def _run(race: Simt, name: str, planted: bool, seed: int) -> None:
    race.configure("three", seed)
    source, result = (memory((512,), np.float32) for _ in range(2))
    race.machine.run_plant(name, planted, source.ctypes.data, result.ctypes.data)


@pytest.mark.parametrize("name", ["ReverseBlock", "ReverseTwice", "ReverseGrid", "ClusterRace"])
def test_missing_barriers_are_reported(race, name):
    place = r"block \d, thread \d+ (writes|reads) at [^\n]*\.cuh?:\d+(?s:.*)"
    for seed in range(5):
        _run(race, name, False, seed)
        with pytest.raises(RuntimeError, match=rf"in {name}, a race: (?s:.*){place}{place}"):
            _run(race, name, True, seed)


def test_block_that_ends_too_early_is_reported(race):
    """Before another of its cluster has read its shared memory, or before it is known to have."""
    for seed in range(5):
        _run(race, "ReverseCluster", False, seed)
        with pytest.raises(RuntimeError, match=r"shared memory ends|of a block that has ended"):
            _run(race, "ReverseCluster", True, seed)


@pytest.mark.parametrize("name", ["ReverseWarp", "ReverseHalfWarps"])
def test_warp_collectives_count_as_barriers(race, name):
    _run(race, name, False, seed=1)


@pytest.mark.parametrize("tier", ["one_block", "cluster", "grid", "streaming"])
@pytest.mark.parametrize(("shape", "axis"), [((300, 64), -1), ((400, 7), -1), ((4, 6, 16, 16), 1), ((4, 5, 10, 7), 1)])
def test_training_kernels_have_no_races(race, force, tier, shape, axis):
    force(race, tier=tier)
    for i, dtype in enumerate(("float32", "float16", "float64")):
        race.configure("three", seed=i, offset=i % 2 if tier == "streaming" else 0)
        try:
            kernel_cases.check(Case(shape, axis, dtype, True, "relu", True), race.place, np.asarray, kernels=race)
        except ValueError as error:
            if "there is no work for a second block" not in str(error):
                raise


@pytest.mark.parametrize("tier", ["one_block", "cluster", "streaming"])
@pytest.mark.parametrize(("shape", "axis", "size"), [((300, 64), -1, 100), ((4, 6, 16, 16), 1, 2), ((400, 7), -1, 200)])
def test_virtual_batches_have_no_races(race, force, tier, shape, axis, size):
    force(race, tier=tier)
    for i, dtype in enumerate(("float32", "float64")):
        race.configure("three", seed=i)
        case = Case(shape, axis, dtype, True, "relu", True)
        virtual_batches.check(case, size, race.place, np.asarray, kernels=race)


@pytest.mark.parametrize(("shape", "axis"), [((300, 64), -1), ((4, 6, 16, 16), 1)])
def test_inference_kernels_have_no_races(race, shape, axis):
    race.configure("three")
    kernel_cases.check(Case(shape, axis, "float32", False, "silu", True), race.place, np.asarray, kernels=race)
