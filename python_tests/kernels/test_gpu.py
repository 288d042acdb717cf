"""The CUDA kernels, on PyTorch's tensors and without TensorFlow, agree with float64 NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tfops_testing import kernel_cases

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
