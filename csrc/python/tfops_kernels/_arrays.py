"""What the two kinds of arrays have in common: NumPy's, and PyTorch's tensors on a CUDA device."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

# By name: bfloat16 is a NumPy type only once ml_dtypes has been imported.
PARAM_TYPES = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


class Library(Protocol):
    """How to look at, and make, arrays of one kind."""

    is_cuda: bool

    def dtype(self, array: Any) -> str: ...
    def is_dense(self, array: Any) -> bool: ...
    def address(self, array: Any) -> int: ...
    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any: ...
    def stream(self, array: Any) -> int: ...


class _NumPy:
    is_cuda = False

    def dtype(self, array: np.ndarray) -> str:
        return array.dtype.name

    def is_dense(self, array: np.ndarray) -> bool:
        return array.flags.c_contiguous and array.dtype.isnative

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: str, like: np.ndarray) -> np.ndarray:
        return np.empty(shape, like.dtype if dtype == like.dtype.name else dtype)

    def stream(self, array: np.ndarray) -> int:
        return 0


class _Torch:
    is_cuda = True

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def is_dense(self, array: Any) -> bool:
        return array.is_contiguous()

    def address(self, array: Any) -> int:
        return array.data_ptr()

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)

    def stream(self, array: Any) -> int:
        import torch

        return torch.cuda.current_stream(array.device).cuda_stream


def library_of(x: Any) -> Library:
    """The library of x, or TypeError."""
    if isinstance(x, np.ndarray):
        return _NumPy()
    if type(x).__module__.partition(".")[0] == "torch" and x.is_cuda:
        return _Torch()
    raise TypeError(f"x must be a numpy.ndarray or a CUDA torch.Tensor, but it is {type(x).__qualname__}")


def check(library: Library, name: str, array: Any, shape: tuple[int, ...], dtype: str, like: Any) -> int:
    """The array's address. TypeError or ValueError, naming the argument, unless it is what is expected."""
    if type(array) is not type(like):
        raise TypeError(f"{name} must be a {type(like).__qualname__} as x is, but it is {type(array).__qualname__}")
    if library.is_cuda and array.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as x is, but it is on {array.device}")
    if library.dtype(array) != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, but it is {library.dtype(array)}")
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, but it has {tuple(array.shape)}")
    if not library.is_dense(array):
        raise ValueError(f"{name} must be dense and row-major (numpy.ascontiguousarray or .contiguous() makes it so)")
    return library.address(array)
