"""What the benchmarks call of PyTorch, on NumPy's arrays: a module in the place of `torch` (see gpu_stand_ins.py).

It computes little, and is as strict as PyTorch: operators take what their schemas say, a tensor of the GPU is no NumPy
array, a stream that is captured waits for nothing. A graph's replay takes the time that its capture took.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from tfops_testing import simt

__version__ = "stand-in"
_TYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32", "float64")}
bfloat16, float16, float32, float64 = _TYPES.values()
uint8, uint16 = np.dtype("uint8"), np.dtype("uint16")
contiguous_format, channels_last, channels_last_3d = "contiguous_format", "channels_last", "channels_last_3d"
_RANKS = {channels_last: 4, channels_last_3d: 5}

# As PyTorch 2.13 prints them (torch.ops.aten.NAME.default._schema).
_SCHEMAS = """
cudnn_batch_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, \
float exponential_average_factor, float epsilon) -> (Tensor, Tensor, Tensor, Tensor)
cudnn_batch_norm_backward(Tensor input, Tensor grad_output, Tensor weight, Tensor? running_mean, Tensor? running_var, \
Tensor? save_mean, Tensor? save_var, float epsilon, Tensor reserveSpace) -> (Tensor, Tensor, Tensor)
native_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, \
bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor)
native_batch_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor? running_mean, Tensor? running_var, \
Tensor? save_mean, Tensor? save_invstd, bool train, float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)
threshold_backward(Tensor grad_output, Tensor self, Scalar threshold) -> Tensor
"""


class OutOfMemoryError(RuntimeError):
    """What is raised where the GPU's memory ends."""


class Tensor:
    """A NumPy array, said to be on the GPU unless it was brought to the CPU."""

    __array__ = None  # NumPy does not take it for an array
    device = "cuda:0"

    def __init__(self, data: np.ndarray, requires_grad: bool = False, is_cuda: bool = True):
        self._data, self.requires_grad, self.is_cuda = data, requires_grad, is_cuda
        self.shape, self.dtype = data.shape, data.dtype
        self.normalizes: Tensor | None = None  # of statistics: the tensor that they are of

    def _made(self, data: Any, *others: Any) -> Tensor:
        requires_grad = any(isinstance(t, Tensor) and t.requires_grad for t in (self, *others))
        return Tensor(np.asarray(data), requires_grad, self.is_cuda)

    def dim(self) -> int:
        return self._data.ndim

    def data_ptr(self) -> int:
        return self._data.ctypes.data

    def view(self, dtype_or_shape: Any) -> Tensor:
        if isinstance(dtype_or_shape, np.dtype):
            return self._made(self._data.view(dtype_or_shape))
        return self._made(self._data.reshape(dtype_or_shape))

    def is_contiguous(self) -> bool:
        return self._data.flags.c_contiguous

    def cuda(self) -> Tensor:
        return Tensor(_memory(self.shape, self.dtype, self._data))

    def reshape(self, shape: list[int]) -> Tensor:
        return self._made(self._data.reshape(shape))

    def movedim(self, source: int, destination: int) -> Tensor:
        return self._made(np.moveaxis(self._data, source, destination))

    def contiguous(self, memory_format: str = contiguous_format) -> Tensor:
        if self.dim() != _RANKS.get(memory_format, self.dim()):
            raise RuntimeError(f"required rank {_RANKS[memory_format]} tensor to use {memory_format} format")
        if memory_format == contiguous_format:
            return self._made(np.ascontiguousarray(self._data))
        return self._made(np.moveaxis(np.ascontiguousarray(np.moveaxis(self._data, 1, -1)), -1, 1))

    def to(self, dtype: np.dtype) -> Tensor:
        return self._made(_memory(self.shape, dtype, self._data))

    def double(self) -> Tensor:
        return self._made(self._data.astype(np.float64))

    def clone(self) -> Tensor:
        return self.to(self.dtype)

    def detach(self) -> Tensor:
        return Tensor(self._data)

    def requires_grad_(self) -> Tensor:
        self.requires_grad = True
        return self

    def cpu(self) -> Tensor:
        cuda.synchronize()
        return Tensor(self._data, self.requires_grad, is_cuda=False)

    def numpy(self) -> np.ndarray:
        if self.is_cuda or self.requires_grad:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self._data

    def fill_(self, value: int) -> Tensor:
        self._data[...] = value
        return self

    def copy_(self, source: Tensor) -> Tensor:
        self._data[...] = source._data
        return self

    def add_(self, other: Tensor) -> Tensor:
        self._data += other._data
        return self

    def relu_(self) -> Tensor:
        return self.fill_(np.maximum(self._data, 0))

    def sum(self, dim: tuple[int, ...]) -> Tensor:
        return self._made(self._data.sum(dim))

    def max(self) -> Tensor:
        return self._made(self._data.max())

    def __abs__(self) -> Tensor:
        return self._made(abs(self._data))

    def __float__(self) -> float:
        cuda.synchronize()
        return float(self._data)


def _operator(function: Any) -> Any:
    def apply(self: Tensor, other: Any) -> Tensor:
        return self._made(function(self._data, other._data if isinstance(other, Tensor) else other), other)

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow", "gt", "le", "eq"):
    setattr(Tensor, f"__{_name}__", _operator(getattr(operator, _name)))
Tensor.__rmul__ = Tensor.__mul__


def _memory(shape: tuple[int, ...], dtype: Any, values: Any) -> np.ndarray:
    array = simt.memory(tuple(shape), dtype)
    array[...] = values
    return array


_random = np.random.default_rng()


def manual_seed(seed: int) -> None:
    global _random
    _random = np.random.default_rng(seed)


def randn(size: tuple[int, ...], *, device: str) -> Tensor:
    return Tensor(_memory(size, float32, _random.standard_normal(size)), is_cuda=device in ("cuda", "cuda:0"))


def rand(size: int, *, device: str) -> Tensor:
    return Tensor(_memory((size,), float32, _random.random(size)), is_cuda=device in ("cuda", "cuda:0"))


def empty(size: Any, *, device: str, dtype: np.dtype) -> Tensor:
    size = (min(size, 1 << 20),) if isinstance(size, int) else size  # less than a GiB to be copied
    return Tensor(simt.memory(size, dtype), is_cuda=device in ("cuda", "cuda:0"))


def empty_like(input: Tensor) -> Tensor:
    return Tensor(simt.memory(input.shape, input.dtype), is_cuda=input.is_cuda)


def from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype == bfloat16:
        raise TypeError("can't convert np.ndarray of type bfloat16")
    return Tensor(array, is_cuda=False)


def equal(input: Tensor, other: Tensor) -> bool:
    _demand(input.dtype == other.dtype, "tensors of one type")
    return np.array_equal(input._data, other._data)


def relu(input: Tensor) -> Tensor:
    return input._made(np.maximum(input._data, 0))


# ----------------------------------------------------------------------------------------------------------------------
# Streams, graphs and clocks


class _Gpu:
    seconds = 0.0  # that the GPU has worked in graphs
    capturing: CUDAGraph | None = None


class CUDAGraph:
    took: float | None = None

    def replay(self) -> None:
        if self.took is None or _Gpu.capturing:
            raise RuntimeError("this graph cannot be replayed: it holds nothing, or another is being captured")
        _Gpu.seconds += self.took


class _Stream:
    cuda_stream = 0

    def wait_stream(self, stream: _Stream) -> None:
        if not isinstance(stream, _Stream):
            raise TypeError(stream)


class _Event:
    def __init__(self, enable_timing: bool = False):
        self._timed, self._at = enable_timing, None

    def record(self) -> None:
        self._at = _Gpu.seconds

    def synchronize(self) -> None:
        cuda.synchronize()

    def elapsed_time(self, end_event: _Event) -> float:
        if not self._timed or self._at is None or end_event._at is None:
            raise RuntimeError("both events must be recorded and have timing enabled")
        return (end_event._at - self._at) * 1e3


@contextlib.contextmanager
def _graph(cuda_graph: CUDAGraph, stream: _Stream | None = None) -> Any:
    import tfops_kernels

    start, _Gpu.capturing = time.perf_counter(), cuda_graph
    tfops_kernels._kernels.set_capturing(True)
    try:
        yield
    finally:
        _Gpu.capturing = None
        tfops_kernels._kernels.set_capturing(False)
    cuda_graph.took = time.perf_counter() - start


def _synchronize() -> None:
    if _Gpu.capturing:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


cuda = SimpleNamespace(
    is_available=lambda: True,
    is_initialized=lambda: True,
    get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1 << 16),
    get_device_name=lambda device: "a stand-in",
    current_stream=lambda device=None: _Stream(),
    device=lambda device: contextlib.nullcontext(),
    stream=lambda stream: contextlib.nullcontext(),
    synchronize=_synchronize,
    OutOfMemoryError=OutOfMemoryError,
    CUDAGraph=CUDAGraph,
    Stream=_Stream,
    Event=_Event,
    graph=_graph,
)
backends = SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91900))


# ----------------------------------------------------------------------------------------------------------------------
# Operators


def _check(schema: str, arguments: tuple[Any, ...]) -> None:
    parameters = schema.partition("(")[2].partition(")")[0].split(", ")
    if len(parameters) != len(arguments):
        raise RuntimeError(f"{schema} was given {len(arguments)} arguments")
    fits = {"Tensor": lambda v: isinstance(v, Tensor) and v.is_cuda, "bool": lambda v: isinstance(v, bool)}
    fits["Tensor?"] = lambda v: v is None or fits["Tensor"](v)
    fits["float"] = fits["Scalar"] = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    fits["bool[3]"] = lambda v: len(v) == 3 and all(map(fits["bool"], v))
    for parameter, value in zip(parameters, arguments, strict=True):
        if not fits[parameter.split()[0]](value):
            raise RuntimeError(f"{schema} was given {value!r} for {parameter}")


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"Expected {what}")


def _operation(schema: str) -> Any:
    name = schema.partition("(")[0]

    def normalize(x: Tensor, *vectors_and_settings: Any) -> tuple[Tensor, ...]:
        vectors = vectors_and_settings[:4]
        _demand(all(v.shape == (x.shape[1],) and v.dtype == float32 for v in vectors), "vectors of channels")
        _demand(x.dim() > 2 or name == "native_batch_norm", "data that cuDNN is given")
        saved = [Tensor(np.ones(x.shape[1], np.float32)) for _ in range(2)]
        for each in saved:
            each.normalizes = x
        return (x.clone(), *saved, *([Tensor(np.zeros(8, np.uint8))] if name == "cudnn_batch_norm" else []))

    def differentiate(first: Tensor, second: Tensor, *others: Any) -> tuple[Tensor, ...]:
        x, dy = (first, second) if name == "cudnn_batch_norm_backward" else (second, first)
        _demand(others[3].normalizes is x and others[4].normalizes is x, "the statistics of input")
        _demand(dy.shape == x.shape and dy.dtype == x.dtype, "grad_output like input")
        if name == "cudnn_batch_norm_backward":
            _demand(others[-1].dtype == uint8, "reserveSpace of bytes")
        return (x.clone(), *(Tensor(np.ones(x.shape[1], np.float32)) for _ in range(2)))

    def run(*arguments: Any) -> Any:
        _check(schema, arguments)
        if name == "threshold_backward":
            return arguments[0]._made(arguments[0]._data * (arguments[1]._data > 0).astype(arguments[0].dtype))
        return (differentiate if name.endswith("backward") else normalize)(*arguments)

    return run


ops = SimpleNamespace(
    aten=SimpleNamespace(**{s.partition("(")[0]: _operation(s) for s in _SCHEMAS.strip().splitlines()}),
)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    found = ops.aten.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return input._made(found[0]._data, weight, bias)


def _grad(outputs: Tensor, inputs: list[Tensor], grad_outputs: Tensor) -> tuple[Tensor, ...]:
    _demand(outputs.requires_grad and all(t.requires_grad for t in inputs), "tensors that require a gradient")
    _demand(outputs.shape == grad_outputs.shape and outputs.dtype == grad_outputs.dtype, "gradients like outputs")
    return tuple(t.clone() for t in inputs)


def compile(model: Any, *, dynamic: bool | None = None) -> Any:
    return model


nn = SimpleNamespace(functional=SimpleNamespace(batch_norm=_batch_norm))
autograd = SimpleNamespace(grad=_grad)
_dynamo = SimpleNamespace(reset=lambda: None)
_functorch = ModuleType("torch._functorch")
_functorch.config = SimpleNamespace(donated_buffer=True)  # type: ignore[attr-defined]
sys.modules["torch._functorch"] = _functorch
