"""Forward and backward on arrays: checks, allocation, one call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from tfops_kernels import _build, _kernels
from tfops_kernels._arrays import PARAM_TYPES, Library, check, library_of

Array = Any  # numpy.ndarray, or torch.Tensor on a CUDA device


class Forward(NamedTuple):
    """What `forward` returns. In inference all but y are None; mask is None where the gradient needs none."""

    y: Array
    mean: Array | None
    variance: Array | None
    saved_mean: Array | None
    saved_inv_std: Array | None
    mask: Array | None


class Backward(NamedTuple):
    """What `backward` returns. mean and variance are None in training; residual is None if there is none."""

    x: Array
    scale: Array
    offset: Array
    mean: Array | None
    variance: Array | None
    residual: Array | None


def _problem(
    requirement: str, shape: Sequence[int], dtype: str, residual: bool, activation: str | None, **settings: Any
) -> _kernels.Problem:
    """A problem; TypeError, which begins with `requirement`, if there is none with that dtype."""
    if dtype not in PARAM_TYPES:
        raise TypeError(f"{requirement} {', '.join(PARAM_TYPES)}, but it is {dtype}")
    return _kernels.Problem(
        shape=list(shape),
        dtype=getattr(_kernels.DataType, dtype),
        has_residual=residual,
        activation=activation or "",
        **settings,
    )


def _device(x: Array) -> contextlib.AbstractContextManager:
    """Makes the GPU of x the current one."""
    import torch

    return torch.cuda.device(x.device)


def _output(library: Library, like: Array, arrays: Any, field: str, shape: tuple[int, ...], dtype: str) -> Array:
    """A new array, which the kernels will find in that field."""
    array = library.empty(shape, dtype, like)
    setattr(arrays, field, library.address(array))
    return array


def _run(direction: str, library: Library, x: Array, problem: _kernels.Problem, arrays: Any, threads: int) -> None:
    """Calls the kernels of x's device; direction is "forward" or "backward"."""
    call = getattr(_kernels, f"{'cuda' if library.is_cuda else 'cpu'}_{direction}")
    if not library.is_cuda:
        call(problem, arrays, threads)
        return
    with _device(x):
        workspace_bytes = getattr(_kernels, f"cuda_{direction}_workspace_bytes")(problem)
        workspace = library.empty((workspace_bytes,), "uint8", x)
        call(problem, arrays, library.address(workspace), library.stream(x))


def forward(
    x: Array,
    scale: Array,
    offset: Array,
    mean: Array | None = None,
    variance: Array | None = None,
    *,
    residual: Array | None = None,
    axis: int = -1,
    epsilon: float = 1e-3,
    exponential_avg_factor: float = 1.0,
    training: bool = True,
    activation: str | None = None,
    unbiased: bool = True,
    threads: int = 1,
) -> Forward:
    """y = act((x - mean) / sqrt(variance + epsilon) * scale + offset + residual).

    Args:
      x: float16, bfloat16, float32 or float64, of rank >= 2, dense.
      scale, offset: [C], float32 (float64 if x is), C = x.shape[axis].
      mean, variance: likewise; the statistics in inference. In training the running ones: needed if
        exponential_avg_factor != 1.
      residual: of x's shape and dtype.
      training: normalize with the statistics of the batch, and return what running ones become.
      activation: None, "relu", "relu6", "leaky_relu" or "silu".
      unbiased: the returned variance takes the sum of squares over n - 1, not n.
      threads: on the CPU. The result does not depend on it.

    Returns:
      A `Forward`.

    Raises:
      TypeError, ValueError: naming the argument and its value.
      RuntimeError: no CUDA in this build, no GPU, a driver too old, or a CUDA error.
    """
    library = library_of(x)
    dtype = library.dtype(x)
    problem = _problem(
        "x must be of dtype",
        x.shape,
        dtype,
        residual is not None,
        axis=axis,
        activation=activation,
        training=training,
        epsilon=epsilon,
        exponential_avg_factor=exponential_avg_factor,
        unbiased=unbiased,
    )
    shape, channels, param = tuple(x.shape), (problem.channels,), PARAM_TYPES[dtype]
    arrays = _kernels.ForwardArrays()
    arrays.x = check(library, "x", x, shape, dtype, x)
    arrays.scale = check(library, "scale", scale, channels, param, x)
    arrays.offset = check(library, "offset", offset, channels, param, x)
    if residual is not None:
        arrays.residual = check(library, "residual", residual, shape, dtype, x)
    if mean is not None or not training or exponential_avg_factor != 1:
        arrays.mean = check(library, "mean", mean, channels, param, x)
    if variance is not None or not training or exponential_avg_factor != 1:
        arrays.variance = check(library, "variance", variance, channels, param, x)

    new = functools.partial(_output, library, x, arrays)
    y = new("y", shape, dtype)
    mask = new("mask", (problem.mask_bytes,), "uint8") if problem.needs_mask else None
    statistics = [None] * 4
    if training:
        names = ("mean_out", "variance_out", "saved_mean", "saved_inv_std")
        statistics = [new(name, channels, param) for name in names]
    _run("forward", library, x, problem, arrays, threads)
    return Forward(y, *statistics, mask)


def backward(
    dy: Array,
    x: Array,
    scale: Array,
    offset: Array,
    mean: Array,
    spread: Array,
    *,
    dmean: Array | None = None,
    dvariance: Array | None = None,
    residual: Array | bool = False,
    mask: Array | None = None,
    axis: int = -1,
    epsilon: float = 1e-3,
    exponential_avg_factor: float = 1.0,
    training: bool = True,
    activation: str | None = None,
    unbiased: bool = True,
    threads: int = 1,
) -> Backward:
    """The gradient of `forward`, whose arguments of the same names have the same meaning.

    Args:
      dy: the gradient of y; of x's shape and dtype.
      mean: `saved_mean` in training, the mean in inference; [C].
      spread: `saved_inv_std` in training, the variance in inference; [C].
      dmean, dvariance: training: the gradients of the returned mean and variance; [C], or None.
      residual: the array if the gradient needs it (silu, or an activation in inference), else whether there was one.
      mask: as `forward` returned it.

    Returns:
      A `Backward`.

    Raises:
      As `forward`.
    """
    library = library_of(x)
    has_residual = residual is not False and residual is not None
    dtype = library.dtype(x)
    problem = _problem(
        "x must be of dtype",
        x.shape,
        dtype,
        has_residual,
        axis=axis,
        activation=activation,
        training=training,
        epsilon=epsilon,
        exponential_avg_factor=exponential_avg_factor,
        unbiased=unbiased,
    )
    shape, channels, param = tuple(x.shape), (problem.channels,), PARAM_TYPES[dtype]
    arrays = _kernels.BackwardArrays()
    arrays.x = check(library, "x", x, shape, dtype, x)
    arrays.dy = check(library, "dy", dy, shape, dtype, x)
    for name, array in (("scale", scale), ("offset", offset), ("mean", mean), ("spread", spread)):
        setattr(arrays, name, check(library, name, array, channels, param, x))
    for name, array in (("dmean", dmean), ("dvariance", dvariance)):
        if array is not None:
            setattr(arrays, name, check(library, name, array, channels, param, x))
    if problem.needs_residual:
        arrays.residual = check(library, "residual", residual, shape, dtype, x)
    if problem.needs_mask:
        arrays.mask = check(library, "mask", mask, (problem.mask_bytes,), "uint8", x)

    new = functools.partial(_output, library, x, arrays)
    dx = new("dx", shape, dtype)
    dscale, doffset = new("dscale", channels, param), new("doffset", channels, param)
    dmean_in = dvariance_in = dresidual = None
    if not training:
        dmean_in, dvariance_in = new("dmean_in", channels, param), new("dvariance_in", channels, param)
    if has_residual:
        dresidual = new("dresidual", shape, dtype) if activation else dy
    _run("backward", library, x, problem, arrays, threads)
    return Backward(dx, dscale, doffset, dmean_in, dvariance_in, dresidual)


class Plan(NamedTuple):
    """What `cuda_plan` returns."""

    tier: str  # "one_block", "cluster", "grid" or "streaming"
    reason: str
    launches: int  # of kernels
    lanes: int  # elements in each access to memory
    threads: int  # of a block
    blocks: int
    blocks_per_slab: int  # blocks that share channels
    shared_bytes: int  # of a block


def cuda_plan(
    shape: Sequence[int],
    *,
    axis: int = -1,
    dtype: str = "float32",
    backward: bool = False,
    residual: bool = False,
    training: bool = True,
    activation: str | None = None,
    aligned: bool = True,
    **device: int,
) -> Plan:
    """Which of the CUDA kernels a problem takes, and why. Needs no GPU.

    Args:
      shape, axis, dtype: of x.
      backward: ask for the gradient.
      residual, training, activation: as for `forward`.
      aligned: all arrays are aligned to 16 bytes.
      device: properties of the GPU that differ from those of the current one, or of an H200 if there is none:
        compute_capability (90 for 9.0), multiprocessors, shared_bytes_per_block, shared_bytes_per_multiprocessor,
        l2_bytes, largest_cluster (1 where there are none), cooperative.

    Returns:
      A `Plan`.

    Raises:
      TypeError, ValueError: naming the argument and its value; ValueError too if the environment variable TFOPS_TIER
        asks for a tier that cannot be had.
      RuntimeError: no CUDA in this build.
    """
    problem = _problem(
        "dtype must be",
        shape,
        dtype,
        residual,
        axis=axis,
        activation=activation,
        training=training,
        epsilon=1e-3,
        exponential_avg_factor=1.0,
        unbiased=True,
    )
    properties = _kernels.CudaDevice()
    for name, value in device.items():
        if not hasattr(properties, name):
            raise TypeError(f"device property {name} is unknown")
        setattr(properties, name, value)
    plan = _kernels.cuda_plan(problem, backward, aligned, properties)
    return Plan(*(getattr(plan, field) for field in Plan._fields))


def build_info() -> dict[str, Any]:
    """What this build holds and what is on this machine.

    Returns:
      A dict with `version`, `tensorflow` (built for; "" if without), `compiler`, `build_type`, `native` (bool: for one
      machine alone, TFOPS_NATIVE=ON), `cpu_instruction_sets` (of this build, separated by spaces),
      `cpu_instruction_set` (chosen now; "none" if this machine has none of them), `cuda` (bool), `cuda_toolkit`,
      `cuda_architectures`, `cuda_driver` (the CUDA version that the driver serves; "" if none), `gpus` (a list of
      dicts) and `cuda_problem` (why no GPU can be used; "" if one can).
    """
    return {
        "version": _build.VERSION,
        "tensorflow": _build.TENSORFLOW,
        "compiler": _build.COMPILER,
        "build_type": _build.BUILD_TYPE,
        "native": _build.NATIVE,
        "cpu_instruction_sets": _build.CPU_INSTRUCTION_SETS,
        "cpu_instruction_set": _kernels.instruction_set(),
        **_kernels.cuda_build(),
        **_kernels.driver(),
    }
