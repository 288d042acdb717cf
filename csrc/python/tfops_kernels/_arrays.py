"""What arrays of NumPy and CUDA tensors of PyTorch have in common."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# By name: bfloat16 is a NumPy type only once ml_dtypes has been imported.
PARAM_TYPES = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


class Library(Protocol):
    """How to look at, and make, arrays of one kind."""

    is_cuda: bool
    kind: str  # of arrays

    def has(self, array: Any) -> bool: ...
    def dtype(self, array: Any) -> str: ...
    def fault(self, array: Any) -> str: ...  # what it would have to be to be read as it lies in memory; "" if it is
    def address(self, array: Any) -> int: ...
    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any: ...
    def stream(self, array: Any) -> int: ...


class _NumPy:
    is_cuda = False
    kind = "numpy.ndarray"

    def has(self, array: Any) -> bool:
        return isinstance(array, np.ndarray)  # or a np.memmap, which says the same of itself

    def dtype(self, array: npt.NDArray[Any]) -> str:
        name: str = array.dtype.name
        return name

    def fault(self, array: npt.NDArray[Any]) -> str:
        if isinstance(array, np.ma.MaskedArray):
            return "without a mask (array.filled() makes it so)"
        if not array.dtype.isnative:
            return f"in this machine's byte order (array.astype({array.dtype.name!r}) makes it so)"
        if not array.flags.c_contiguous:
            return "dense and row-major (numpy.ascontiguousarray makes it so)"
        return "" if array.flags.aligned else "aligned to its elements (array.copy() makes it so)"

    def address(self, array: npt.NDArray[Any]) -> int:
        return array.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: str, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.empty(shape, like.dtype if dtype == like.dtype.name else dtype)

    def stream(self, array: npt.NDArray[Any]) -> int:
        return 0


class _Torch:
    is_cuda = True
    kind = "CUDA torch.Tensor"

    def has(self, array: Any) -> bool:
        torch = sys.modules.get("torch")  # where there is a tensor, it has been imported
        return torch is not None and isinstance(array, torch.Tensor) and array.is_cuda

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def fault(self, array: Any) -> str:
        return "" if array.is_contiguous() else "dense and row-major (.contiguous() makes it so)"

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)

    def stream(self, array: Any) -> int:
        import torch

        return int(torch.cuda.current_stream(array.device).cuda_stream)


_LIBRARIES: tuple[Library, ...] = (_NumPy(), _Torch())


def library_of(x: Any) -> Library:
    """The library of x, or TypeError."""
    for library in _LIBRARIES:
        if library.has(x):
            return library
    kinds = " or a ".join(library.kind for library in _LIBRARIES)
    raise TypeError(f"x must be a {kinds}, but it is a {_class(x)}")


def check(library: Library, name: str, array: Any, shape: tuple[int, ...], dtype: str, like: Any) -> int:
    """The array's address. TypeError or ValueError, naming the argument, unless it is what is expected."""
    if not library.has(array):
        raise TypeError(f"{name} must be a {library.kind} as x is, but it is a {_class(array)}")
    if library.is_cuda and array.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as x is, but it is on {array.device}")
    if library.dtype(array) != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, but it is {library.dtype(array)}")
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, but it has {tuple(array.shape)}")
    if fault := library.fault(array):
        raise ValueError(f"{name} must be {fault}")
    return library.address(array)


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
