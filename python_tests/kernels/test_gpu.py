"""The CUDA kernels, on PyTorch's tensors and without TensorFlow, agree with float64 NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tfops_kernels
from tfops_kernels import _kernels
from tfops_testing import in_place_cases, kernel_cases, tier_cases
from tfops_testing.phase_cases import SHAPES, Phases, assert_cuda_agrees

pytestmark = pytest.mark.gpu


def _to_device(array: np.ndarray):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(array).cuda()


def _to_host(tensor) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


def _unaligned(array: np.ndarray):
    """On the device, aligned to its element and no more."""
    flat = _to_device(np.concatenate([array.ravel()[:1], array.ravel()]))
    return flat[1:].view(array.shape)


@pytest.fixture(autouse=True)
def _nothing_is_refused():
    """CUDA starts every launch that the policy has it make."""
    _kernels.reset_cuda_launches()
    yield
    assert tfops_kernels.cuda_launches()["refusals"] == []


@pytest.mark.parametrize("case", kernel_cases.random_cases(seed=1, count=8), ids=str)
def test_shapes(case):
    kernel_cases.check(case, _to_device, _to_host)


@pytest.mark.parametrize("case", kernel_cases.random_cases(seed=2, count=4), ids=str)
def test_unaligned(case):
    if 0 in case.shape:
        pytest.skip("no first element")
    kernel_cases.check(case, _unaligned, _to_host)


@pytest.mark.parametrize(("shape", "axis"), [((50, 3, 23), -1), ((64, 32), -1), ((3, 37, 5, 5), 1)], ids=str)
def test_combinations(shape, axis):
    for case in kernel_cases.combinations(shape, axis):
        kernel_cases.check(case, _to_device, _to_host)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), tier_cases.SHAPES, ids=str)
def test_every_plan_that_fits_agrees_and_is_the_one_that_runs(shape, axis, dtype):
    """One block, clusters of each size, the grid and streaming: forced, and no other runs."""
    for case in tier_cases.cases(shape, axis, dtype):
        tier_cases.check_every_plan(case, tfops_kernels, _kernels, _to_device, _to_host)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("shape", "axis"), tier_cases.SHAPES[:2], ids=str)
def test_every_plan_agrees_on_unaligned_arrays(shape, axis, dtype):
    case = kernel_cases.Case(shape, axis, dtype, True, "relu", residual=True)
    tier_cases.check_every_plan(case, tfops_kernels, _kernels, _unaligned, _to_host, aligned=False)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis", "size"), tier_cases.VIRTUAL_BATCHES, ids=str)
def test_every_plan_agrees_on_virtual_batches(shape, axis, size, dtype):
    for activation, residual in (("relu", True), (None, False), (kernel_cases.BOUNDED_RELU, True)):
        case = kernel_cases.Case(shape, axis, dtype, True, activation, residual, 0.25)
        kernels = (tfops_kernels, _kernels, _to_device, _to_host)
        names = tier_cases.check_every_plan(case, *kernels, virtual_batch_size=size)
        assert names <= tier_cases.names_on(_kernels) - {"grid"}


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((390, 64), -1), ((136, 65), -1), ((4, 6, 16, 16), 1)], ids=str)
def test_every_plan_agrees_in_place(shape, axis, dtype):
    for activation in in_place_cases.ACTIVATIONS:
        case = kernel_cases.Case(shape, axis, dtype, activation=activation)
        tier_cases.check_every_plan(case, tfops_kernels, _kernels, _to_device, _to_host, in_place=True)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_scale_near_zero_makes_nan_in_place(dtype):
    case = kernel_cases.Case((390, 24), -1, dtype)
    for plan in tier_cases.plans(_kernels, case, aligned=True, in_place=True)[1]:
        with tier_cases.force(_kernels, plan):
            in_place_cases.check_refusal(case, _to_device, tfops_kernels, _to_host)


def test_every_tier_that_the_gpu_has_fits_a_case():
    plans = [tier_cases.plans(_kernels, kernel_cases.Case(*shape, "float32"), True) for shape in tier_cases.SHAPES]
    names = {tier_cases.name_of(plan) for pair in plans for of_pass in pair for plan in of_pass}
    assert names == tier_cases.names_on(_kernels)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_phases_agree_with_cpu(shape, axis, dtype):
    """What masks, renormalization and synchronization are made of."""
    import torch

    def make_cuda(i: int, keep: np.ndarray | None) -> Phases:
        def scratch(size: int):
            return torch.empty(size, dtype=torch.uint8, device="cuda")

        return Phases(_kernels, True, _to_device, 1, lambda tensor: tensor.data_ptr(), _to_host, scratch)

    assert_cuda_agrees(make_cuda, shape, axis, dtype)


def test_graph_holds_what_was_captured():
    """Forward and backward of every plan, captured on a stream of its own and replayed, do what they do without."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    case = kernel_cases.Case((4096, 64), -1, "float32", True, "relu", residual=True)
    arrays = {name: _to_device(array) for name, array in kernel_cases.inputs(case).items()}

    def call():
        given = (arrays["x"], arrays["scale"], arrays["offset"])
        out = tfops_kernels.forward(*given, residual=arrays["residual"], activation="relu")
        saved = (out.saved_mean, out.saved_inv_std)
        back = tfops_kernels.backward(arrays["dy"], *given, *saved, residual=True, mask=out.mask, activation="relu")
        return [tensor for tensor in (*out, *back) if tensor is not None]

    for plan in tier_cases.plans(_kernels, case, aligned=True)[1]:
        with tier_cases.force(_kernels, plan):
            want = call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = call()
            graph.replay()
            torch.cuda.synchronize()
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g, w), tier_cases.name_of(plan)
