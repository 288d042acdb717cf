"""Forward and backward on arrays: checks, allocation, one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tfops_kernels import _kernels
from tfops_kernels._arrays import PARAM_TYPES, Library, check, library_of

Array = Any  # numpy.ndarray, or torch.Tensor on a CUDA device


class Forward(NamedTuple):
    """What `forward` returns: arrays of the same kind and on the same device as x.

    Attributes:
        y: The result, of the shape and dtype of x.
        mean: What the running mean becomes, [C]. None in inference, and so are the next three.
        variance: What the running variance becomes, [C].
        saved_mean: The mean of the batch, [C], which `backward` takes. With `virtual_batch_size` that of each virtual
            batch, [V, C].
        saved_inv_std: 1 / sqrt(variance + epsilon) with the population variance of the batch, which `backward` takes;
            of the shape of saved_mean.
        mask: One bit for each element of x, in bytes, which `backward` takes. None unless the gradient needs it, which
            is in training with a residual and relu, relu6 or leaky_relu.
    """

    y: Array
    mean: Array | None
    variance: Array | None
    saved_mean: Array | None
    saved_inv_std: Array | None
    mask: Array | None


class Backward(NamedTuple):
    """What `backward` returns: the gradients of the arguments of `forward` that have the same names.

    Attributes:
        x: Of the shape and dtype of x.
        scale: [C], of the dtype of `scale`. So are the next three.
        offset: [C].
        mean: [C]. None in training.
        variance: [C]. None in training.
        residual: Of the shape and dtype of x; `dy` itself without an activation. None if there is no residual.
    """

    x: Array
    scale: Array
    offset: Array
    mean: Array | None
    variance: Array | None
    residual: Array | None


def _problem(
    requirement: str,
    shape: Sequence[int],
    dtype: str,
    residual: bool,
    activation: str | None,
    virtual_batch_size: int | None = None,
    **settings: Any,
) -> _kernels.Problem:
    """A problem; TypeError, which begins with `requirement`, if there is none with that dtype."""
    if dtype not in PARAM_TYPES:
        raise TypeError(f"{requirement} {', '.join(PARAM_TYPES)}, but it is {dtype}")
    if virtual_batch_size is not None and virtual_batch_size < 1:
        raise ValueError(f"virtual_batch_size must be > 0 or None, but it is {virtual_batch_size!r}")
    return _kernels.Problem(
        shape=list(shape),
        dtype=getattr(_kernels.DataType, dtype),
        has_residual=residual,
        activation=activation or "",
        virtual_batch_size=virtual_batch_size or 0,
        **settings,
    )


def _statistics_shape(problem: _kernels.Problem, virtual_batch_size: int | None) -> tuple[int, ...]:
    """That of saved_mean and saved_inv_std."""
    if virtual_batch_size is None or not problem.training:
        return (problem.channels,)
    return problem.virtual_batches, problem.channels


def xla_attributes(problem: _kernels.Problem) -> dict[str, Any]:
    """The attributes of XLA's custom calls, of the types that csrc/xla/handlers.h reads."""
    names: dict[Any, Sequence[str]] = {
        np.int64: ("outer", "channels", "inner", "virtual_batches"),
        np.int32: ("dtype", "activation"),
        np.float64: ("negative_slope", "max_value", "threshold", "alpha", "epsilon", "exponential_avg_factor"),
        np.bool_: ("has_residual", "training", "unbiased", "in_place"),
    }
    return {name: kind(getattr(problem, name)) for kind, of_kind in names.items() for name in of_kind}


def _device(x: Array) -> Any:
    """A context in which the GPU of x is the current one."""
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
    virtual_batch_size: int | None = None,
    in_place: bool = False,
    threads: int = 1,
) -> Forward:
    """Batch normalization, residual addition and activation.

        y = activation((x - mean) / sqrt(variance + epsilon) * scale + offset + residual)

    with the mean and the population variance of x over all dimensions but `axis` in training, and the arguments in
    inference (`tf.compat.v1.nn.fused_batch_norm`, and
    [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167)).

    Args:
        x: The data: a NumPy array, or a PyTorch tensor on a CUDA device, of float16, bfloat16, float32 or float64, of
            rank >= 2, dense and row-major. All other arrays are of the same kind and on the same device.
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
        activation: None, or one of "relu", "relu6", "leaky_relu" (with slope 0.2), "silu", "hard_silu", "gelu",
            "gelu_tanh", "elu", "selu", "tanh", "sigmoid", "softplus" and "mish". Parameters may follow as in a call:
            "leaky_relu(negative_slope=0.1)", "elu(alpha=0.5)", or "relu(max_value=20, negative_slope=0.1,
            threshold=1)", of which any may be left out.
        unbiased: Whether the returned variance divides the sum of squares by n - 1, not by n, the number of elements in
            a channel.
        virtual_batch_size: In training, of how many consecutive entries of dimension 0 a virtual batch consists, which
            is normalized with statistics of its own (ghost batch normalization,
            [Hoffer, Hubara and Soudry, 2017](https://arxiv.org/abs/1705.08741)); what the running statistics take in is
            the average of them all. The size of dimension 0 is a multiple of it. None means that there is one batch.
        in_place: Whether `backward` is to be given y in the place of x. Training alone, without a residual, with None,
            "leaky_relu" or "elu"; on the CPU scale must not be too near 0 (see `tfops.fused_batch_norm`).
        threads: The number of threads, on the CPU. The result does not depend on it.

    Returns:
        The result, the statistics, and what `backward` needs.

    Raises:
        TypeError: An array is of a wrong kind or dtype. The message names the argument and its value.
        ValueError: A shape, a layout in memory or a number is wrong. Likewise.
        RuntimeError: There is no CUDA in this build, no GPU, a driver that is too old, or a CUDA error.

    Examples:
        >>> import numpy as np
        >>> import tfops_kernels
        >>> x = np.array([[1, 10], [3, 30]], np.float32)
        >>> scale, offset = np.ones(2, np.float32), np.zeros(2, np.float32)
        >>> out = tfops_kernels.forward(x, scale, offset, activation="relu")
        >>> print(out.y.round(2))
        [[0. 0.]
         [1. 1.]]
        >>> print(out.mean, out.variance)
        [ 2. 20.] [  2. 200.]
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
        virtual_batch_size=virtual_batch_size,
        in_place=in_place,
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
    mask = None
    if problem.needs_activation_bits:
        mask = new("activation_bits", (problem.activation_bits_bytes,), "uint8")
    saved = _statistics_shape(problem, virtual_batch_size)
    shapes = {"mean_out": channels, "variance_out": channels, "saved_mean": saved, "saved_inv_std": saved}
    statistics = [new(name, shapes[name], param) if training else None for name in shapes]
    _run("forward", library, x, problem, arrays, threads)
    return Forward._make([y, *statistics, mask])


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
    virtual_batch_size: int | None = None,
    in_place: bool = False,
    threads: int = 1,
) -> Backward:
    """The gradient of `forward`, whose arguments of the same names have the same meaning.

    With z what the activation is applied to, dz = dy * activation'(z), xc = x - mean,
    inv_std = 1 / sqrt(variance + epsilon), and sums over the n elements of a channel:

        doffset = sum(dz)
        dscale = inv_std * sum(dz * xc)
        dresidual = dz

    In training, with f = exponential_avg_factor, and m = n - 1, or n if not `unbiased`:

        dx = scale * inv_std * (dz - sum(dz) / n - xc * inv_std^2 * sum(dz * xc) / n)
             + f * (dmean / n + dvariance * xc * 2 / m)

    where, with V virtual batches, n and the sums in dx are of one, and f is divided by V. In inference:

        dx = scale * inv_std * dz
        dmean = -scale * inv_std * sum(dz)
        dvariance = -scale * inv_std^3 * sum(dz * xc) / 2

    Args:
        dy: The gradient of y, of the shape and dtype of x.
        x: As `forward` was given it; with `in_place` its result y.
        scale: As `forward` was given it.
        offset: As `forward` was given it.
        mean: In training `saved_mean`, in inference the mean; [C], or [V, C] with virtual batches.
        spread: In training `saved_inv_std`, in inference the variance; likewise.
        dmean: In training the gradient of the returned mean, [C], or None for zeros.
        dvariance: In training the gradient of the returned variance, [C], or None for zeros.
        residual: The array if the gradient needs it, which is with all activations but relu, relu6 and leaky_relu (with
            whatever slope), and in inference with these too; else whether there was one.
        mask: As `forward` returned it.
        axis: As `forward` was given it. So are all that follow.
        epsilon: Added to the variance.
        exponential_avg_factor: The share of the batch in what the running statistics become.
        training: Whether mean and variance are those of the batch.
        activation: As for `forward`.
        unbiased: Whether the returned variance is the unbiased one.
        virtual_batch_size: As for `forward`.
        in_place: Whether x is the y that `forward` returned.
        threads: The number of threads, on the CPU. The result does not depend on it.

    Returns:
        The gradients of x, scale, offset and residual, and in inference of mean and variance.

    Raises:
        TypeError: As `forward`.
        ValueError: As `forward`.
        RuntimeError: As `forward`.

    Examples:
        >>> import numpy as np
        >>> import tfops_kernels
        >>> x = np.array([[1, 10], [3, 30]], np.float32)
        >>> scale, offset = np.ones(2, np.float32), np.zeros(2, np.float32)
        >>> out = tfops_kernels.forward(x, scale, offset, activation="relu")
        >>> grad = tfops_kernels.backward(
        ...     np.ones_like(x), x, scale, offset, out.saved_mean, out.saved_inv_std, activation="relu"
        ... )
        >>> print(grad.scale.round(2), grad.offset)
        [1. 1.] [1. 1.]
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
        virtual_batch_size=virtual_batch_size,
        in_place=in_place,
    )
    shape, channels, param = tuple(x.shape), (problem.channels,), PARAM_TYPES[dtype]
    arrays = _kernels.BackwardArrays()
    arrays.x = check(library, "x", x, shape, dtype, x)
    arrays.dy = check(library, "dy", dy, shape, dtype, x)
    for name, array in (("scale", scale), ("offset", offset)):
        setattr(arrays, name, check(library, name, array, channels, param, x))
    saved = _statistics_shape(problem, virtual_batch_size)
    arrays.mean = check(library, "mean", mean, saved, param, x)
    setattr(arrays, "inv_std" if training else "variance", check(library, "spread", spread, saved, param, x))
    for name, array in (("dmean", dmean), ("dvariance", dvariance)):
        if array is not None:
            setattr(arrays, name, check(library, name, array, channels, param, x))
    if problem.needs_residual:
        arrays.residual = check(library, "residual", residual, shape, dtype, x)
    if problem.needs_activation_bits:
        arrays.activation_bits = check(library, "mask", mask, (problem.activation_bits_bytes,), "uint8", x)

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
    """What `cuda_plan` returns.

    Attributes:
        tier: Which kernels: "one_block", "cluster", "grid" (which keep on the chip what they read, or as much of it as
            there is room for), or "streaming".
        reason: Why these, in words.
        launches: The number of kernels that are launched.
        lanes: The elements in each access to memory.
        threads: The threads of a block.
        blocks: The number of blocks.
        blocks_per_slab: The number of blocks that share channels.
        shared_bytes: The shared memory of a block.
        read_again: The part of what is read for the statistics, or for the sums of the gradient, that is read twice.
        waves: How often the GPU has to fill up with blocks until all have run, on the chip.
        nanoseconds: The time that the choice was made by: an estimate.
    """

    tier: str
    reason: str
    launches: int
    lanes: int
    threads: int
    blocks: int
    blocks_per_slab: int
    shared_bytes: int
    read_again: float
    waves: int
    nanoseconds: float


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
    virtual_batch_size: int | None = None,
    **device: int,
) -> Plan:
    """Which of the CUDA kernels a problem takes, and why. Needs no GPU.

    Without one, and for a GPU with other properties than the one that is there, how many blocks run at once is taken
    from a table, which has numbers of an H100. The GPU that is there is asked.

    Args:
        shape: The shape of x.
        axis: The dimension of the channels.
        dtype: The dtype of x: "float16", "bfloat16", "float32" or "float64".
        backward: Whether to ask for the gradient.
        residual: Whether there is a residual.
        training: As for `forward`.
        activation: As for `forward`.
        aligned: Whether all arrays are aligned to 16 bytes.
        virtual_batch_size: As for `forward`.
        **device: Properties of the GPU that differ from those of the current one, or of an H200 if there is none:
            compute_capability (90 for 9.0), multiprocessors, shared_bytes_per_block, l2_bytes, largest_cluster (1
            where there are no clusters) and cooperative (whether all blocks of a grid can synchronize).

    Returns:
        The plan.

    Raises:
        TypeError: The dtype or a property is unknown.
        ValueError: The shape, axis or activation is wrong, the environment variable TFOPS_TIER or
            TFOPS_FREE_MULTIPROCESSORS is, or TFOPS_TIER asks for kernels that cannot be had.
        RuntimeError: There is no CUDA in this build.

    Examples:
        >>> import tfops_kernels
        >>> if tfops_kernels.build_info()["cuda"]:
        ...     plan = tfops_kernels.cuda_plan([32, 56, 56, 64], dtype="bfloat16", activation="relu")
        ...     assert plan.tier in ("one_block", "cluster", "grid", "streaming")
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
        virtual_batch_size=virtual_batch_size,
    )
    properties = _kernels.CudaDevice()
    for name, value in device.items():
        if not hasattr(properties, name):
            raise TypeError(f"device property {name} is unknown")
        setattr(properties, name, value)
    plan = _kernels.cuda_plan(problem, backward, aligned, properties)
    return Plan(*(getattr(plan, field) for field in Plan._fields))
