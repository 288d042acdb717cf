"""Which CUDA kernels a problem takes: the policy, on paper, for an H200 unless a test says otherwise."""

from __future__ import annotations

import json
import subprocess
import textwrap

import pytest

import tfops_kernels
from tfops_kernels import _kernels, _policy
from tfops_testing.fresh_process import run_python
from tfops_testing.kernel_cases import Case, make_problem
from tfops_testing.requirements import needs_cuda_build

pytestmark = needs_cuda_build

H200 = {
    "compute_capability": 90,
    "multiprocessors": 132,
    "shared_bytes_per_block": 227 << 10,
    "l2_bytes": 50 << 20,
    "largest_cluster": 16,
    "cooperative": True,
}
A100 = {
    "compute_capability": 80,
    "multiprocessors": 108,
    "shared_bytes_per_block": 163 << 10,
    "l2_bytes": 40 << 20,
    "largest_cluster": 1,
}
TIERS = ("one_block", "cluster", "grid", "streaming")

# (shape, axis, dtype, residual, forward's tier, backward's), all with relu.
PROBLEMS = [
    # MNIST with batches of 256, and dense layers
    ((256, 26, 26, 32), -1, "float32", False, "grid", "grid"),
    ((256, 26, 26, 32), -1, "float16", False, "grid", "grid"),
    ((256, 11, 11, 64), -1, "float32", False, "cluster", "cluster"),
    ((256, 11, 11, 64), -1, "float16", False, "cluster", "cluster"),
    ((256, 128), -1, "float32", False, "one_block", "one_block"),
    ((32, 10), -1, "float32", False, "one_block", "one_block"),
    ((512, 1000), -1, "float16", False, "one_block", "one_block"),
    # AlexNet with batches of 256
    ((256, 55, 55, 96), -1, "float16", False, "grid", "grid"),
    ((256, 27, 27, 256), -1, "float16", False, "grid", "grid"),
    ((256, 13, 13, 384), -1, "float16", False, "cluster", "grid"),
    ((256, 4096), -1, "float16", False, "one_block", "one_block"),
    # ResNet-50 with batches of 32 and of 256
    ((32, 112, 112, 64), -1, "float16", False, "grid", "grid"),
    ((32, 56, 56, 64), -1, "float16", False, "grid", "grid"),
    ((32, 28, 28, 128), -1, "float16", False, "cluster", "cluster"),
    ((32, 28, 28, 512), -1, "float16", True, "grid", "grid"),
    ((32, 14, 14, 256), -1, "float32", False, "cluster", "cluster"),
    ((32, 14, 14, 1024), -1, "float16", True, "grid", "grid"),
    ((32, 7, 7, 512), -1, "float16", False, "cluster", "cluster"),
    ((32, 7, 7, 2048), -1, "float16", True, "cluster", "cluster"),
    ((256, 56, 56, 256), -1, "float16", True, "grid", "grid"),
    ((256, 7, 7, 2048), -1, "float16", True, "grid", "cluster"),
    ((32, 512, 28, 28), 1, "float16", True, "one_block", "one_block"),
    ((32, 2048, 7, 7), 1, "float16", True, "one_block", "one_block"),
    # Ragged channels, and five dimensions
    ((128, 28, 28, 24), -1, "float32", False, "grid", "grid"),
    ((128, 28, 28, 131), -1, "float32", False, "grid", "grid"),
    ((8, 16, 32, 32, 32), -1, "float16", False, "grid", "grid"),
]


def plan(shape, device=H200, **settings):
    return tfops_kernels.cuda_plan(shape, **{"activation": "relu", **settings}, **{**H200, **device})


@pytest.mark.parametrize(("shape", "axis", "dtype", "residual", "forward", "backward"), PROBLEMS, ids=str)
def test_problems_take_the_expected_tiers(shape, axis, dtype, residual, forward, backward):
    plans = [plan(shape, axis=axis, dtype=dtype, residual=residual, backward=b) for b in (False, True)]
    assert [p.tier for p in plans] == [forward, backward]
    for p in plans:
        assert p.launches == (3 if p.tier == "streaming" else 1)
        assert p.lanes == {"float16": 8, "float32": 4}[dtype]
        assert p.blocks % p.blocks_per_slab == 0
        if p.tier != "streaming":
            assert p.shared_bytes <= H200["shared_bytes_per_block"]
        if p.tier == "one_block":
            assert p.blocks_per_slab == 1
        if p.tier == "cluster":
            assert 2 <= p.blocks_per_slab <= 16
        if p.tier == "grid":
            assert p.blocks <= H200["multiprocessors"]


def test_larger_batches_take_more_blocks_and_then_read_again():
    """As batches grow, blocks get company, until there is no room for all, and then for hardly anything."""
    plans = [plan((n, 64)) for n in (16, 4096, 100_000, 1_000_000)]
    assert [p.tier for p in plans] == ["one_block", "cluster", "grid", "grid"]
    assert [p.read_again for p in plans[:3]] == [0, 0, 0]
    assert 0.8 < plans[3].read_again < 1
    assert "% read again" in plans[3].reason


@pytest.mark.parametrize(
    ("shape", "backward", "passes"),
    [
        ((32, 112, 112, 64), False, 2.15),
        ((32, 56, 56, 256), False, 2.15),
        ((32, 28, 28, 512), True, 3.35),
        ((32, 56, 56, 128), True, 3.35),
    ],
)
def test_what_little_more_than_fits_is_mostly_kept(shape, backward, passes):
    """51.4 MB in the forward pass and twice 25.7 MB in the backward pass, where all of it would be 3 and 5 passes."""
    arrays = 2 if backward else 1
    p = plan(shape, dtype="float16", backward=backward)
    assert arrays + 1 < arrays * (1 + p.read_again) + 1 <= passes


def test_reasons_for_which_a_tier_cannot_be_had():
    for shape, settings, why in (
        ((10_000, 64), {"aligned": False}, "single elements are streamed"),
        ((64, 131, 27, 27), {"axis": 1}, "a slab of whole channels would be wider than a block"),
    ):
        assert why in plan(shape, **settings).reason
        with _policy.settings(tier="one_block"), pytest.raises(ValueError, match=why):
            plan(shape, **settings)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(100_000, 64), (4096, 2048)])
def test_problems_too_large_for_the_chip_stream(shape, backward):
    """The least shared memory with which a problem stays on the chip is what its plan asks for, or less."""
    device = {"largest_cluster": 1, "cooperative": False}
    assert plan(shape, device, backward=backward).tier in ("one_block", "streaming")
    tiers = [plan(shape, {"shared_bytes_per_block": kb << 10}, backward=backward).tier for kb in (1, 2, 4)]
    assert tiers == ["streaming"] * 3
    assert "do not fit" in plan(shape, {"shared_bytes_per_block": 1024}, backward=backward).reason


@pytest.mark.parametrize(("shape", "axis", "dtype", "residual", "forward", "backward"), PROBLEMS, ids=str)
def test_without_clusters_plans_fit_the_device(shape, axis, dtype, residual, forward, backward):
    for b in (False, True):
        p = plan(shape, A100, axis=axis, dtype=dtype, residual=residual, backward=b)
        assert p.tier != "cluster"
        assert p.shared_bytes <= A100["shared_bytes_per_block"]
        p = plan(shape, {**A100, "cooperative": False}, axis=axis, dtype=dtype, residual=residual, backward=b)
        assert p.tier in ("one_block", "streaming")


def test_inference_streams_in_one_pass():
    """Its forward pass is one pass; its gradient takes sums."""
    p = plan((256, 128), training=False)
    assert (p.tier, p.launches) == ("streaming", 1)
    assert "single pass" in p.reason
    assert plan((256, 128), training=False, backward=True).tier == "one_block"


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_plan_without_elements_says_so(shape):
    assert "no elements" in plan(shape).reason


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((128, 14, 14, c), -1) for c in (24, 40, 116, 131)] + [((32, 2048, 7, 7), 1), ((32, 512, 13, 13), 1)],
    ids=str,
)
def test_ragged_sizes_have_wide_accesses(shape, axis, residual):
    """With a mask, too, whose rows are of whole bytes, and so begin elsewhere than the rows of elements."""
    for backward in (False, True):
        p = plan(shape, axis=axis, dtype="float16", residual=residual, backward=backward)
        assert p.lanes == 8 or p.tier == "streaming"
        assert plan(shape, axis=axis, dtype="float16", backward=backward, aligned=False).lanes == 1


@pytest.mark.parametrize("tier", TIERS)
def test_forced_tier_is_taken(tier):
    with _policy.settings(tier=tier):
        for backward in (False, True):
            p = plan((1024, 64), backward=backward)
            assert p.tier == tier
            assert "forced" in p.reason
        # There is only one way to do this.
        assert plan((1024, 64), training=False).tier == "streaming"


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_forced_size_of_clusters_is_taken(size):
    with _policy.settings(tier="cluster", cluster=size):
        assert plan((4096, 64)).blocks_per_slab == size
        with pytest.raises(ValueError, match="has no clusters"):
            plan((4096, 64), A100)


@pytest.mark.parametrize(
    ("tier", "device", "why"),
    [
        ("one_block", {"shared_bytes_per_block": 4096}, "has at most 2 KB"),
        ("cluster", {"shared_bytes_per_block": 4096}, "has at most 2 KB"),
        ("grid", {"shared_bytes_per_block": 4096}, "has at most 2 KB"),
        ("cluster", A100, "compute capability 8.0 has no clusters"),
        ("grid", {"cooperative": False}, "no cooperative launches"),
    ],
    ids=str,
)
def test_forced_tier_that_cannot_be_is_refused(tier, device, why):
    with _policy.settings(tier=tier), pytest.raises(ValueError, match=f"the tier {tier} is forced, .*{why}"):
        plan((10_000_000, 64), device)


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return run_python("-c", textwrap.dedent(code), **environment)


def test_environment_is_read_once():
    code = """
        import os
        import tfops_kernels
        from tfops_kernels import _kernels
        tfops_kernels.cuda_plan((1024, 64))
        os.environ |= {"TFOPS_TIER": "grid", "TFOPS_FREE_MULTIPROCESSORS": "3"}
        settings = _kernels.policy_settings()
        print(tfops_kernels.cuda_plan((1024, 64)).tier, settings["tier"], settings["free_multiprocessors"])
    """
    run = _run(code, TFOPS_TIER="cluster", TFOPS_FREE_MULTIPROCESSORS="8")
    assert run.stdout == "cluster cluster 8\n", run.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TFOPS_TIER", "fastest", "TFOPS_TIER must be one_block, cluster, grid or streaming, but it is fastest"),
        ("TFOPS_FREE_MULTIPROCESSORS", "-1", "TFOPS_FREE_MULTIPROCESSORS must be a whole number >= 0, but it is -1"),
    ],
)
def test_wrong_environment_is_named(name, value, message):
    run = _run("import tfops_kernels; tfops_kernels.cuda_plan((4, 4))", **{name: value})
    assert run.returncode != 0
    assert f"ValueError: {message}" in run.stderr


def test_tuning_is_loaded_from_a_file(tmp_path):
    """As gpu_proof.py --calibrate writes it: a part of the constants, or all."""
    defaults = _kernels.policy_settings()["tuning"]
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"launch": 9000, "own_rate": 12.5}))
    code = "from tfops_kernels import _kernels; import json; print(json.dumps(_kernels.policy_settings()['tuning']))"
    run = _run(code, TFOPS_TUNING=str(file))
    assert json.loads(run.stdout) == defaults | {"launch": 9000, "own_rate": 12.5}
    problem = (4096, 64)
    before = plan(problem)
    with _policy.settings():
        _policy.load_tuning(str(file))
        assert plan(problem).nanoseconds > before.nanoseconds + 6000
    assert plan(problem) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "TFOPS_TUNING names a file that cannot be read as JSON, .*tuning.json"),
        ("[1]", r"TFOPS_TUNING must name a JSON file of an object with numbers, but .*tuning.json holds \[1\]"),
        ('{"launch": true}', "TFOPS_TUNING must name a JSON file of an object with numbers, but .* holds .*True"),
        ('{"lunch": 1}', "a constant of the tuning must be one of .*, but it is lunch"),
        ('{"launch": -2}', "the tuning's launch must be a finite number > 0, but it is -2"),
        ('{"cache_share": 2}', "the tuning's cache_share must be a number from 0 to 1, but it is 2"),
    ],
)
def test_wrong_tuning_is_named(tmp_path, text, message):
    file = tmp_path / "tuning.json"
    file.write_text(text)
    before = _kernels.policy_settings()
    with pytest.raises(ValueError, match=message):
        _policy.load_tuning(str(file))
    assert _kernels.policy_settings() == before
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        _policy.load_tuning(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tier": "fastest"}, "tier must be one_block, cluster, grid or streaming, but it is fastest"),
        ({"cluster": 3}, "cluster must be 2, 4, 8, 16, or 0 for any size, but it is 3"),
        ({"free_multiprocessors": -1}, "free_multiprocessors must be >= 0, but it is -1"),
    ],
)
def test_wrong_settings_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        _kernels.set_policy_settings(**changed)


def test_plans_are_listed_and_timed():
    """Those that fit, fastest first; the estimate of a plan by other constants is for that very plan."""
    problem = make_problem(_kernels, Case((4096, 64), -1, "float32", activation="relu"))
    device = _kernels.CudaDevice()
    for name, value in H200.items():
        setattr(device, name, value)
    plans = _kernels.cuda_plans(problem, False, True, device)
    names = [(p.tier, p.blocks_per_slab if p.tier == "cluster" else 0) for p in plans]
    clusters = [("cluster", size) for size in (2, 4, 8, 16)]
    assert sorted(names) == sorted([("one_block", 0), *clusters, ("grid", 0), ("streaming", 0)])
    times = [p.nanoseconds for p in plans]
    assert times == sorted(times)
    assert plans[0].tier == plan((4096, 64)).tier
    for p in plans:
        assert _kernels.cuda_plan_time(problem, False, True, device, p.index, {}) == p.nanoseconds
        slower = _kernels.cuda_plan_time(problem, False, True, device, p.index, {"launch": 3500})
        assert slower == pytest.approx(p.nanoseconds + 1000)
    with pytest.raises(ValueError, match="index must be that of a plan that fits, but it is 100000"):
        _kernels.cuda_plan_time(problem, False, True, device, 100_000, {})


def test_reason_gives_blocks_and_times():
    p = plan((32, 14, 14, 256))
    assert p.reason.startswith(f"{p.blocks // p.blocks_per_slab} slabs of ")
    assert f"{p.blocks_per_slab} blocks each" in p.reason
    assert " us, against " in p.reason


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="but it is int8"):
        plan((4, 4), dtype="int8")
    with pytest.raises(TypeError, match="warps is unknown"):
        tfops_kernels.cuda_plan((4, 4), warps=3)
    with pytest.raises(ValueError, match="multiprocessors must be > 0, but it is 0"):
        plan((4, 4), {"multiprocessors": 0})
