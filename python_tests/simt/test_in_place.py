"""The CUDA kernels where y alone is kept, run on the CPU by csrc/simt: within the stated bounds, and NaN, not wrong."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest

from tfops_testing import in_place_cases, kernel_cases
from tfops_testing.kernel_cases import Case

DEVICES = ("h200", "three", "one", "small", "small_old", "a100", "b200", "rtx", "v100")
TIERS = ("one_block", "cluster", "grid", "streaming")


def _check(simt, case: Case) -> None:
    in_place_cases.check(case, simt.place, np.asarray, kernels=simt)


@pytest.mark.parametrize("case", in_place_cases.random_cases(seed=2), ids=str)
def test_shapes(simt, case):
    devices = np.random.default_rng(zlib.crc32(str(case).encode())).permutation(DEVICES)[:2]
    for seed, device in enumerate(devices):
        simt.configure(str(device), seed=seed, offset=seed)
        _check(simt, case)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier(simt, force, tier, dtype):
    force(simt, tier=tier)
    shapes = [((390, 64), -1), ((136, 65), -1), ((4, 6, 16, 16), 1)]
    for (shape, axis), activation in zip(itertools.cycle(shapes), in_place_cases.ACTIVATIONS, strict=False):
        for offset in (0, 1) if tier == "streaming" else (0,):
            simt.configure("three", offset=offset)
            _check(simt, Case(shape, axis, dtype, activation=activation))


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("activation", in_place_cases.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((64, 24), -1), ((3, 8, 40), 1)], ids=str)
@pytest.mark.parametrize("tier", ["one_block", "streaming"])
def test_scale_near_zero_makes_nan(simt, force, tier, shape, axis, activation, dtype):
    force(simt, tier=tier)
    simt.configure("three")
    in_place_cases.check_refusal(Case(shape, axis, dtype, activation=activation), simt.place, simt)
