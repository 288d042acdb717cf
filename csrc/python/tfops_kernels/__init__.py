"""The kernels of tfops on plain arrays, without TensorFlow: NumPy on the CPU, PyTorch's CUDA tensors on a GPU.

These are the entry points that the TensorFlow ops call, for tests, benchmarks and other frameworks.
"""

from tfops_kernels import _policy
from tfops_kernels._api import Backward, Forward, Plan, backward, cuda_plan, forward
from tfops_kernels._info import build_info, cuda_launches

__all__ = ["Backward", "Forward", "Plan", "backward", "build_info", "cuda_launches", "cuda_plan", "forward"]

_policy.load_environment()
