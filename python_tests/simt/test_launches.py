"""What is launched, counted, refused and remembered; what CUDA is asked; and what that takes of the host."""

from __future__ import annotations

import numpy as np
import pytest

from tfops_testing import kernel_cases, tier_cases
from tfops_testing.kernel_cases import Case
from tfops_testing.simt import memory

CASE = Case((600, 64), -1, "float32", True, "relu", residual=True)
INVALID_CONFIGURATION, LAUNCH_FAILURE, COOPERATIVE_TOO_LARGE = 9, 719, 720
# Constants by which each tier is the fastest, without being forced.
SLOW = {"next_launch": 1e9, "own_rate": 1e-3, "grid_barrier": 1e9, "cluster_barrier": 1e9}
FASTEST = {"cluster": SLOW | {"cluster_barrier": 1.0}, "grid": SLOW | {"grid_barrier": 1.0}}
KIND = {"cluster": "cluster", "grid": "cooperative"}


def _check(simt, case: Case = CASE) -> None:
    kernel_cases.check(case, simt.place, np.asarray, kernels=simt)


@pytest.fixture
def refusing(simt):
    """The machine, which forgets afterwards what it was told to refuse, and that it did."""
    simt.configure("h200")
    yield simt
    simt.machine.refuse_launches("", 0)
    simt.machine.set_capturing(False)
    simt.machine.reset_cuda_launches()


@pytest.mark.parametrize(
    ("device", "shape", "axis", "dtype", "offset"),
    [
        ("h200", (600, 64), -1, "float32", 0),
        ("three", (136, 65), -1, "float16", 0),
        ("three", (136, 65), -1, "float64", 1),
        ("small", (4, 6, 16, 16), 1, "bfloat16", 0),
        ("small_old", (600, 24), -1, "float32", 1),
        ("rtx", (4, 6, 16, 16), 1, "float32", 0),
        ("v100", (600, 64), -1, "float16", 0),
        ("slice", (1500, 24), -1, "float16", 0),
    ],
    ids=str,
)
def test_every_plan_that_fits_agrees_and_is_the_one_that_runs(simt, device, shape, axis, dtype, offset):
    """As test_gpu.py has it on a GPU."""
    simt.configure(device, offset=offset)
    case = Case(shape, axis, dtype, True, "relu", True, 0.25)
    names = tier_cases.check_every_plan(case, simt, simt.machine, simt.place, np.asarray, aligned=offset == 0)
    least = {"one_block", "streaming"} if offset == 0 else {"streaming"}
    assert least <= names <= tier_cases.names_on(simt.machine)


@pytest.mark.parametrize(
    ("given", "dtype"), list(zip(tier_cases.VIRTUAL_BATCHES, ("float32", "float16", "float64"), strict=True)), ids=str
)
def test_every_plan_agrees_on_virtual_batches(simt, given, dtype):
    simt.configure("h200")
    shape, axis, size = given
    case = Case(shape, axis, dtype, True, kernel_cases.BOUNDED_RELU, True, 0.25)
    kernels = (simt, simt.machine, simt.place, np.asarray)
    names = tier_cases.check_every_plan(case, *kernels, virtual_batch_size=size)
    assert {"one_block", "streaming"} <= names <= tier_cases.names_on(simt.machine) - {"grid"}


@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
def test_every_plan_agrees_in_place(simt, activation):
    simt.configure("h200")
    case = Case((390, 64), -1, "bfloat16", activation=activation)
    names = tier_cases.check_every_plan(case, simt, simt.machine, simt.place, np.asarray, in_place=True)
    assert {"one_block", "cluster 2", "streaming"} <= names


@pytest.mark.parametrize("device", ["h200", "three", "rtx", "slice"])
def test_every_tier_that_a_gpu_has_fits_a_case(simt, device):
    simt.configure(device)
    plans = [tier_cases.plans(simt.machine, Case(*shape, "float32"), True) for shape in tier_cases.SHAPES]
    names = {tier_cases.name_of(plan) for pair in plans for of_pass in pair for plan in of_pass}
    assert names == tier_cases.names_on(simt.machine)


def test_forced_size_of_clusters_is_launched(simt, force):
    simt.configure("h200")
    for size in (2, 4, 8, 16):
        force(simt, tier="cluster", cluster=size)
        simt.machine.take_reports()
        _check(simt)
        assert [report["cluster"] for report in simt.machine.take_reports()] == [size, size]


def test_check_of_tiers_fails_where_another_runs(simt):
    """For the other tests could not fail without it."""
    simt.configure("h200")
    forward, backward = tier_cases.plans(simt.machine, CASE, True)
    on_chip = [next(plan for plan in plans if plan.tier == "one_block") for plans in (forward, backward)]
    kernels = tier_cases.Forced(_Streaming(simt), simt.machine, *on_chip)
    with pytest.raises(AssertionError, match="forward was to take one_block"):
        kernel_cases.check(CASE, simt.place, np.asarray, kernels)


class _Streaming:
    """Takes streaming, whatever is forced."""

    def __init__(self, simt):
        self._simt = simt

    def forward(self, *arguments, **named):
        with self._simt.settings(tier="streaming"):
            return self._simt.forward(*arguments, **named)


@pytest.mark.parametrize("tier", FASTEST)
def test_refused_launch_streams_from_then_on(refusing, force, capfd, tier):
    force(refusing, tuning=FASTEST[tier])
    refusing.machine.reset_cuda_launches()
    _check(refusing)
    assert refusing.machine.cuda_launches()["calls"][tier] == 2  # forward and backward; by itself, then

    force(refusing, tuning=FASTEST[tier])  # forgets choices
    refusing.machine.reset_cuda_launches()
    refusing.machine.refuse_launches(KIND[tier], INVALID_CONFIGURATION)
    for times in (1, 2, 3):
        _check(refusing)
        launches = refusing.machine.cuda_launches()
        assert launches["calls"] == {"one_block": 0, "cluster": 0, "grid": 0, "streaming": 2 * times}
        problem = "600 x 64 channels x 1 of float32"
        assert launches["refusals"] == [
            {"tier": tier, "pass": direction, "error": "refused, as told", "problem": problem, "count": 1}
            for direction in ("backward", "forward")
        ]
    _check(refusing, Case((700, 64), -1, "float32", True, "relu", residual=True))
    assert [refusal["count"] for refusal in refusing.machine.cuda_launches()["refusals"]] == [2, 2]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        f"tfops: CUDA refused a launch of the tier {tier} (forward pass, {problem}): refused, as told. The streaming "
        "tier does this work from now on; tfops_kernels.cuda_launches() counts."
    )
    # With the machine as it was, but the same settings, it is not tried again.
    refusing.machine.refuse_launches("", 0)
    _check(refusing)
    assert refusing.machine.cuda_launches()["calls"][tier] == 0


def test_refused_launch_of_a_forced_tier_is_an_error(refusing, force):
    force(refusing, tier="grid")
    refusing.machine.refuse_launches("cooperative", COOPERATIVE_TOO_LARGE)
    for times in (1, 2):
        with pytest.raises(RuntimeError, match="starting a CUDA kernel failed: refused, as told"):
            _check(refusing)
        launches = refusing.machine.cuda_launches()
        assert [(refusal["tier"], refusal["count"]) for refusal in launches["refusals"]] == [("grid", times)]
        assert not any(launches["calls"].values())


def test_failure_that_is_no_refusal_is_an_error(refusing, force):
    """An earlier kernel's fault, such as this, is not made up for, and says nothing about the problem."""
    force(refusing, tuning=FASTEST["cluster"])
    refusing.machine.refuse_launches("cluster", LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match="starting a CUDA kernel failed"):
        _check(refusing)
    assert refusing.machine.cuda_launches()["refusals"] == []
    refusing.machine.refuse_launches("", 0)
    refusing.machine.reset_cuda_launches()
    _check(refusing)
    assert refusing.machine.cuda_launches()["calls"]["cluster"] == 2


def test_refusal_in_a_capture_that_goes_on_streams(refusing, force):
    force(refusing, tuning=FASTEST["grid"])
    refusing.machine.refuse_launches("cooperative", COOPERATIVE_TOO_LARGE)
    refusing.machine.set_capturing(True)
    _check(refusing)
    assert refusing.machine.cuda_launches()["calls"]["streaming"] == 2


def test_refusal_that_ends_a_capture_is_an_error_once(refusing, force):
    force(refusing, tuning=FASTEST["grid"])
    refusing.machine.refuse_launches("cooperative", COOPERATIVE_TOO_LARGE)
    refusing.machine.set_capturing(True, ends=True)
    with pytest.raises(RuntimeError, match=r"which ends the capture \(refused, as told\); capture again"):
        _check(refusing)
    calls = refusing.machine.cuda_launches()["calls"]
    assert not any(calls.values()), "nothing else goes into a capture that is over"
    # The next capture has no refusal in the forward pass; the backward pass meets its own.
    refusing.machine.set_capturing(True, ends=False)
    _check(refusing)
    assert refusing.machine.cuda_launches()["calls"]["streaming"] == 2


def test_plans_go_by_what_cuda_says(simt):
    """A partition that runs no clusters of 8, though its chip has some."""
    simt.configure("slice")
    module = simt.machine
    device = module.CudaDevice()
    asked = module.cuda_occupancy(module.DataType.float32, False, device)
    assert asked["asked"]
    assert asked["clusters"] == {2: 8, 4: 3, 8: 0, 16: 0}
    case = Case((4096, 64), -1, "float32")
    assert max(plan.blocks_per_slab for plan in tier_cases.plans(module, case, True)[0] if plan.tier == "cluster") == 4
    device.multiprocessors = device.multiprocessors  # one on paper now
    paper = module.cuda_occupancy(module.DataType.float32, False, device)
    assert not paper["asked"]
    assert paper["clusters"][8] == 1


@pytest.mark.parametrize("device", ["h200", "b200", "a100", "v100", "rtx", "three", "small"])
def test_room_is_within_every_reading_of_the_limit(simt, device):
    simt.configure(device)
    module = simt.machine
    gpu = module.CudaDevice()
    new = gpu.compute_capability >= 90
    for dtype in module.DataType.__members__.values():
        for backward in (False, True):
            got = module.cuda_occupancy(dtype, backward, gpu)
            assert got["static_shared_bytes"] == (1024 if new else 0)
            assert got["room"] == gpu.shared_bytes_per_block - (2048 if new else 0)
            assert got["blocks"] == gpu.multiprocessors


def test_grids_leave_multiprocessors_to_others(simt, force):
    simt.configure("h200")
    force(simt, tier="grid", free_multiprocessors=100)
    simt.machine.take_reports()
    _check(simt, Case((2000, 64), -1, "float32"))
    for report in simt.machine.take_reports():
        assert report["cooperative"]
        assert report["grid"][0] <= 32
    force(simt, tier="grid", free_multiprocessors=132)
    with pytest.raises(ValueError, match="the tier grid is forced, and cannot be had: there is no work for a second"):
        _check(simt)


VECTORS = ("scale", "offset", "mean_out", "variance_out", "saved_mean", "saved_inv_std")
ARRAYS = {
    "ForwardArrays": ("x", "y", *VECTORS),
    "BackwardArrays": ("dy", "x", "dx", "scale", "offset", "mean", "inv_std", "dscale", "doffset"),
}


@pytest.mark.exclusive
@pytest.mark.parametrize("given", ARRAYS)
@pytest.mark.parametrize("tier", ["one_block", "cluster", "grid", "streaming", ""])
def test_call_takes_less_than_two_microseconds_of_the_host(simt, force, tier, given):
    """All but the launch itself: the check of the problem, the choice, the workspace's size, the counters."""
    simt.configure("h200")
    force(simt, tier=tier)
    module = simt.machine
    problem = kernel_cases.make_problem(module, Case((4096, 64), -1, "float32", activation="relu"))
    arrays = getattr(module, given)()
    x = memory((64,), np.float32)
    for field in ARRAYS[given]:
        setattr(arrays, field, x.ctypes.data)  # nothing is read or written
    module.set_stubbed(True)
    try:
        # The least of several, for other processes take their time as well.
        nanoseconds = min(module.host_nanoseconds(problem, arrays, x.ctypes.data, 1000) for _ in range(5))
    finally:
        module.set_stubbed(False)
    assert nanoseconds < 2000
