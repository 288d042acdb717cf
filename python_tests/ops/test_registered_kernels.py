"""Every op has CPU and GPU kernels of every data type, which needs no GPU to be seen; but none for an old driver's."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from tensorflow.python.framework import kernels

import tfops  # noqa: F401  (registers the ops)
from tfops_testing.fresh_process import run_python
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


OLD_DRIVER = """
#include <stdlib.h>
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { (void)flags; abort(); }  // after it, a process that forks cannot use its GPUs
"""
DEVICES = """
import tfops
from tensorflow.python.framework import kernels
print({kernel.device_type for kernel in kernels.get_registered_kernels_for_op("Tfops>BatchNormTraining").kernel})
"""


@needs_cuda_build
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("strict", ["0", "1"])
def test_gpu_kernels_are_not_registered_for_a_driver_that_is_too_old(tmp_path, strict):
    """So TensorFlow runs the ops of saved graphs on the CPU. In strict mode they fail on the GPU."""
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True, timeout=60
    )
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "TFOPS_STRICT": strict, "TF_CPP_MIN_LOG_LEVEL": "0"}
    run = run_python("-c", DEVICES, **environment)
    assert "CPU" in run.stdout, run.stderr
    assert ("'GPU'" in run.stdout) == (strict == "1")
    warned = (
        "the one installed is for CUDA 12.4; update it, or run on the CPU. Until then, graphs that hold" in run.stderr
    )
    assert warned == (strict == "0")
