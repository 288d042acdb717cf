"""The kernels in JAX: custom calls of the same handlers that TensorFlow's XLA calls, on the CPU and on a GPU.

A first step: it runs what tfops has under XLA where there is no TensorFlow, in `jax.jit`, loops and gradients, and on a
GPU in command buffers (CUDA graphs). There are no second derivatives, no forward mode and no rules for sharding, and
`jax.vmap` makes a loop of it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tfops_kernels import _kernels
from tfops_kernels._api import _problem, _statistics_shape, xla_attributes
from tfops_kernels._arrays import PARAM_TYPES

_LIBRARY = Path(__file__).with_name("libtfops_jax.so")
_OPS = ("Training", "TrainingGrad", "Inference", "InferenceGrad", "Moments", "GradientMoments", "GradientNormalize")


def _ffi_version() -> tuple[int, int] | None:
    """The version of XLA's interface for handlers that this jaxlib has, by its headers; None without them."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text() if header.exists() else ""
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return (int(found[0][1]), int(found[1][1])) if found[0] and found[1] else None


def _check_version(built: tuple[int, int], running: tuple[int, int] | None) -> None:
    """Raises ImportError where XLA would refuse the handlers, and fail to start: they must not be newer than it is."""
    if running is not None and (built[0] != running[0] or built > running):
        jaxlib = importlib.metadata.version("jaxlib")
        ours, its = (f"{major}.{minor}" for major, minor in (built, running))
        raise ImportError(
            f"tfops_kernels.jax was built for version {ours} of XLA's interface for custom calls, and jaxlib {jaxlib} "
            f"has {its}: install a newer jaxlib, or build tfops beside this one, with --no-build-isolation"
        )


def _register() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"tfops_kernels.jax needs {_LIBRARY}, which this build does not have: build tfops beside jaxlib or "
            "TensorFlow 2.20 or later, with --no-build-isolation and without TFOPS_JAX=OFF"
        )
    library = ctypes.CDLL(str(_LIBRARY))
    major, minor = (ctypes.c_int * 2).in_dll(library, "Tfops_ffi_version")
    _check_version((major, minor), _ffi_version())

    def handler(symbol: str) -> Any:
        return jax.ffi.pycapsule(getattr(library, symbol))

    for op in _OPS:
        name, symbol = f"Tfops>BatchNorm{op}", f"Tfops_BatchNorm{op}"
        jax.ffi.register_ffi_target(name, handler(f"{symbol}_cpu"), platform="cpu")
        if _kernels.cuda_build()["cuda"]:
            stages = {"initialize": handler(f"{symbol}_cuda_initialize"), "execute": handler(f"{symbol}_cuda")}
            jax.ffi.register_ffi_target(name, stages, platform="CUDA")


_register()


class BatchNorm(NamedTuple):
    """What `batch_norm` returns.

    Attributes:
        y: The result, of the shape and dtype of x.
        mean: In training what the running mean becomes, [C]; in inference the mean.
        variance: Likewise.
    """

    y: jax.Array
    mean: jax.Array
    variance: jax.Array


@dataclasses.dataclass(frozen=True)
class _Settings:
    axis: int
    epsilon: float
    exponential_avg_factor: float
    training: bool
    activation: str | None
    unbiased: bool
    virtual_batch_size: int | None = None
    in_place: bool = False

    def problem(self, x: Any, residual: bool) -> _kernels.Problem:
        return _problem("x must be of dtype", x.shape, x.dtype.name, residual, **dataclasses.asdict(self))


def _call(
    settings: _Settings, backward: bool, residual: bool, x: Any, results: Sequence[Any], operands: Sequence[Any]
) -> list[jax.Array]:
    """The custom call for the platform that the program is compiled for: each has a workspace of its own size."""
    problem = settings.problem(x, residual)
    direction = "backward" if backward else "forward"
    name = f"Tfops>BatchNorm{'Training' if settings.training else 'Inference'}{'Grad' * backward}"

    def run(platform: str, *operands: Any) -> list[jax.Array]:
        workspace_bytes = getattr(_kernels, f"{platform}_{direction}_workspace_bytes")
        size = workspace_bytes(problem, True) if platform == "cuda" else workspace_bytes(problem)
        workspace = jax.ShapeDtypeStruct((size,), np.uint8)
        call = jax.ffi.ffi_call(name, [*results, workspace], vmap_method="sequential")
        return list(call(*operands, **xla_attributes(problem)))[:-1]

    platforms = ("cpu", "cuda") if _kernels.cuda_build()["cuda"] else ("cpu",)
    outputs: list[jax.Array] = jax.lax.platform_dependent(
        *operands, **{platform: functools.partial(run, platform) for platform in platforms}
    )
    return outputs


def _present(*arrays: Any) -> list[Any]:
    return [array for array in arrays if array is not None]


def _forward(
    settings: _Settings, x: Any, scale: Any, offset: Any, mean: Any, variance: Any, residual: Any
) -> tuple[BatchNorm, tuple[Any, ...]]:
    data, vector = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, scale))
    problem = settings.problem(x, residual is not None)
    results = [data]
    if settings.training:
        mask_bytes = problem.activation_bits_bytes if problem.needs_activation_bits else 0
        saved_shape = _statistics_shape(problem, settings.virtual_batch_size)
        saved_vector = jax.ShapeDtypeStruct(saved_shape, scale.dtype)
        results += [vector, vector, saved_vector, saved_vector, jax.ShapeDtypeStruct((mask_bytes,), np.uint8)]
    operands = _present(x, scale, offset, mean, variance, residual)
    y, *others = _call(settings, False, residual is not None, x, results, operands)
    if settings.training:
        mean_out, variance_out, *saved = others
    else:
        mean_out, variance_out, saved = mean, variance, [mean, variance]
    keeps = (y if settings.in_place else x, scale, offset, *saved, residual if problem.needs_residual else None)
    return BatchNorm(y, mean_out, variance_out), (keeps, mean is not None, residual is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(settings: _Settings, *arrays: Any) -> BatchNorm:
    return _forward(settings, *arrays)[0]


def _backward(settings: _Settings, kept: tuple[Any, ...], upstream: BatchNorm) -> tuple[Any, ...]:
    (x, scale, offset, *saved, residual), has_running, has_residual = kept
    data, vector = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, scale))
    dy, dmean, dvariance = upstream
    separate = has_residual and settings.activation is not None  # else dy is the gradient of residual
    last = data if separate else jax.ShapeDtypeStruct((0,), x.dtype)
    if settings.training:
        operands = _present(dy, x, scale, offset, *saved, dmean, dvariance, residual)
        dx, dscale, doffset, dresidual = _call(settings, True, has_residual, x, [data, vector, vector, last], operands)
        kept_share = 1 - settings.exponential_avg_factor
        running = [kept_share * dmean, kept_share * dvariance] if has_running else [None, None]
    else:
        operands = _present(dy, x, scale, offset, *saved, residual)
        dx, dscale, doffset, *running, dresidual = _call(
            settings, True, has_residual, x, [data, *[vector] * 4, last], operands
        )
        running = [running[0] + dmean, running[1] + dvariance]
    return dx, dscale, doffset, *running, (dresidual if separate else dy) if has_residual else None


_batch_norm.defvjp(_forward, _backward)


def _check(name: str, array: Any, shape: tuple[int, ...], dtype: str) -> jax.Array:
    array = jax.numpy.asarray(array)
    if array.dtype.name != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, but it is {array.dtype.name}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but it has {array.shape}")
    return array


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    mean: jax.Array | None = None,
    variance: jax.Array | None = None,
    *,
    residual: jax.Array | None = None,
    axis: int = -1,
    epsilon: float = 1e-3,
    exponential_avg_factor: float = 1.0,
    training: bool = True,
    activation: str | None = None,
    unbiased: bool = True,
    virtual_batch_size: int | None = None,
    in_place: bool = False,
) -> BatchNorm:
    """Batch normalization, residual addition and activation, in JAX, with their gradient.

        y = activation((x - mean) / sqrt(variance + epsilon) * scale + offset + residual)

    with the mean and the population variance of x over all dimensions but `axis` in training, and the arguments in
    inference ([Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167)).

    Args:
        x: The data, of float16, bfloat16, float32 or float64, of rank >= 2.
        scale: The factors, [C] with C = x.shape[axis]; float64 if x is, else float32.
        offset: The summands, of the shape and dtype of `scale`.
        mean: In inference the mean to normalize with. In training the running mean, which is needed if
            `exponential_avg_factor` is not 1. Of the shape and dtype of `scale`.
        variance: The variance; likewise.
        residual: An array of the shape and dtype of x, added before the activation, or None.
        axis: The dimension of the channels, in [-rank, rank).
        epsilon: A number >= 0, added to the variance.
        exponential_avg_factor: The share f in [0, 1] of the batch in what the running statistics become,
            (1 - f) * running + f * batch.
        training: Whether to normalize with the statistics of the batch, and to return what the running ones become.
        activation: As for `tfops_kernels.forward`.
        unbiased: Whether the returned variance divides the sum of squares by n - 1, not by n, the number of elements in
            a channel.
        virtual_batch_size: As for `tfops_kernels.forward`.
        in_place: Whether y is kept for the gradient in the place of x, as by `tfops.fused_batch_norm`. Without effect
            in inference; in training for None, "leaky_relu" and "elu", without a residual.

    Returns:
        The result and the statistics.

    Raises:
        TypeError: An array or another argument is of a wrong type. The message names the argument and its value.
        ValueError: A shape or a number is wrong. Likewise.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tfops_kernels.jax import batch_norm
        >>> out = batch_norm(jnp.array([[1.0, 10.0], [3.0, 30.0]]), jnp.ones(2), jnp.zeros(2), activation="relu")
        >>> print(out.y.round(2))
        [[0. 0.]
         [1. 1.]]
        >>> print(out.mean, out.variance)
        [ 2. 20.] [  2. 200.]
    """
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis must be an integer, but it is {axis!r}")
    for name, value in (("training", training), ("unbiased", unbiased), ("in_place", in_place)):
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be a bool, but it is {value!r}")
    if virtual_batch_size is not None and not isinstance(virtual_batch_size, (int, np.integer)):
        raise TypeError(f"virtual_batch_size must be an integer or None, but it is {virtual_batch_size!r}")
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"activation must be a str or None, but it is {activation!r}")
    x = jax.numpy.asarray(x)
    numbers = float(epsilon), float(exponential_avg_factor)
    keeps_y = bool(in_place and training)
    settings = _Settings(axis, *numbers, training, activation, unbiased, virtual_batch_size, keeps_y)
    channels = (settings.problem(x, residual is not None).channels,)
    param = PARAM_TYPES[x.dtype.name]
    arrays = [x, _check("scale", scale, channels, param), _check("offset", offset, channels, param)]
    needs_statistics = not training or exponential_avg_factor != 1 or mean is not None or variance is not None
    for name, array in (("mean", mean), ("variance", variance)):
        if needs_statistics and array is None:
            raise ValueError(f"{name} must be an array of shape {channels}, but it is None")
        arrays.append(_check(name, array, channels, param) if needs_statistics else None)
    arrays.append(None if residual is None else _check("residual", residual, x.shape, x.dtype.name))
    result: BatchNorm = _batch_norm(settings, *arrays)
    return result
