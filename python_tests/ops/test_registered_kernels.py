"""Every op has CPU and GPU kernels of every data type, which needs no GPU to be seen."""

from __future__ import annotations

import pytest
from tensorflow.python.framework import kernels

import tfops  # noqa: F401  (registers the ops)
from tfops_testing.requirements import needs_cuda_build

OPS = [f"Tfops>BatchNorm{mode}{grad}" for mode in ("Training", "Inference") for grad in ("", "Grad")]
OPS += [f"Tfops>BatchNorm{phase}" for phase in ("Moments", "GradientMoments", "GradientNormalize")]


@needs_cuda_build
@pytest.mark.parametrize("op", OPS)
def test_gpu_kernels_are_registered(op):
    registered = {}
    for kernel in kernels.get_registered_kernels_for_op(op).kernel:
        if kernel.device_type.startswith("XLA_"):
            continue  # test_xla.py's
        types = {c.name: c.allowed_values.list.type[0] for c in kernel.constraint}
        registered.setdefault(kernel.device_type, set()).add(types["T"])
    half, float32, float64, bfloat16 = 19, 1, 2, 14
    wanted = {half, bfloat16, float32, float64}
    assert registered == {"CPU": wanted, "GPU": wanted}
