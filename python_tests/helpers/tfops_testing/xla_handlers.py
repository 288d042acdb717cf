"""Calls the handlers of XLA's custom calls in the place of XLA, with call frames as xla/ffi/api/c_api.h has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

INITIALIZE, EXECUTE = 2, 3  # stages
COMMAND_BUFFER_COMPATIBLE = 1  # a trait
_TYPES = {"uint8": 6, "int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16, "bool": 1}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    """A struct of the API, which begins with its size and a pointer to extensions."""
    all_fields = [("struct_size", _SIZE), ("extension", _POINTER), *fields]
    return type(name, (ctypes.Structure,), {"_fields_": all_fields})


def _new(struct: type[ctypes.Structure], **fields: Any) -> Any:
    return struct(struct_size=ctypes.sizeof(struct), **fields)


_Version = _struct("Version", ("major", ctypes.c_int), ("minor", ctypes.c_int))
_Call = ctypes.CFUNCTYPE(_POINTER, _POINTER)
_FUNCTIONS = (
    *("Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register", "Stream_Get", "Type_Register"),
    *("ExecutionContext_Get", "State_Set", "State_Get", "DeviceMemory_Allocate", "DeviceMemory_Free"),
    *("ThreadPool_Schedule", "ThreadPool_NumThreads", "Future_Create", "Future_SetAvailable", "Future_SetError"),
    *("RunId_Get", "DeviceOrdinal_Get"),
)
_Api = _struct("Api", ("version", _Version), ("internal", _POINTER), *((name, _Call) for name in _FUNCTIONS))
_Buffer = _struct("Buffer", ("dtype", ctypes.c_int), ("data", _POINTER), ("rank", ctypes.c_int64), ("dims", _POINTER))
_Arguments = _struct("Arguments", ("size", ctypes.c_int64), ("types", _POINTER), ("values", _POINTER))
_Attributes = _struct(
    "Attributes", ("size", ctypes.c_int64), ("types", _POINTER), ("names", _POINTER), ("values", _POINTER)
)
_Frame = _struct(
    "Frame",
    ("api", _POINTER),
    ("context", _POINTER),
    ("stage", ctypes.c_int),
    ("arguments", _Arguments),
    ("results", _Arguments),
    ("attributes", _Attributes),
    ("future", _POINTER),
)
_ErrorCreate = _struct("ErrorCreate", ("message", ctypes.c_char_p), ("code", ctypes.c_int))
_StreamGet = _struct("StreamGet", ("context", _POINTER), ("stream", _POINTER))
_NumThreads = _struct("NumThreads", ("context", _POINTER), ("number", ctypes.POINTER(ctypes.c_int64)))


class _Metadata(ctypes.Structure):
    _fields_ = [("size", _SIZE), ("version", _Version), ("traits", ctypes.c_uint32), ("state_type", ctypes.c_int64)]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [("size", _SIZE), ("type", ctypes.c_int), ("next", _POINTER), ("metadata", ctypes.POINTER(_Metadata))]


class _Scalar(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("value", _POINTER)]


class _Span(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", _SIZE)]


class HandlerError(Exception):
    """What a handler returned."""


class Handlers:
    """The handlers of a library, which this calls. Everything that a handler asks of XLA is noted in `asked`."""

    def __init__(self, library: str):
        self.library = ctypes.CDLL(library)
        self.asked: list[str] = []
        self._messages: list[bytes] = []
        functions = {name: _Call(getattr(self, f"_{name}", self._unexpected(name))) for name in _FUNCTIONS}
        self._api = _new(_Api, version=_new(_Version, major=0, minor=1), **functions)

    def _unexpected(self, name: str) -> Any:
        def call(arguments: int) -> int:
            self.asked.append(name)
            return self._error(f"no {name} here".encode())

        return call

    def _error(self, message: bytes) -> int:
        self._messages.append(message)
        return len(self._messages)

    def _Error_Create(self, arguments: int) -> int:
        return self._error(_ErrorCreate.from_address(arguments).message)

    def _Stream_Get(self, arguments: int) -> None:
        self.asked.append("Stream_Get")
        _StreamGet.from_address(arguments).stream = None

    def _ThreadPool_NumThreads(self, arguments: int) -> None:
        self.asked.append("ThreadPool_NumThreads")
        _NumThreads.from_address(arguments).number[0] = 1

    def _invoke(self, symbol: str, frame: Any) -> None:
        handler = getattr(self.library, symbol)
        handler.argtypes, handler.restype = [_POINTER], _POINTER
        frame.api = ctypes.addressof(self._api)
        frame.struct_size = _Frame.future.offset  # as c_api.h reckons it
        if error := handler(ctypes.addressof(frame)):
            raise HandlerError(self._messages[error - 1].decode())

    def traits(self, symbol: str) -> int:
        """What the handler tells XLA when it is registered."""
        metadata = _Metadata(size=ctypes.sizeof(_Metadata), version=_new(_Version), traits=2**32 - 1)
        extension = _MetadataExtension(ctypes.sizeof(_MetadataExtension), 1, None, ctypes.pointer(metadata))
        self._invoke(symbol, _new(_Frame, extension=ctypes.addressof(extension)))
        assert (metadata.version.major, metadata.version.minor > 0) == (0, True)
        return metadata.traits

    def call(
        self,
        symbol: str,
        arguments: Sequence[np.ndarray],
        results: Sequence[np.ndarray],
        attributes: dict[str, Any],
        stage: int = EXECUTE,
    ) -> None:
        """One call. HandlerError with its message, if it returns an error."""
        held: list[Any] = []

        def keep(value: Any) -> int:
            held.append(value)
            return ctypes.addressof(value)

        def addresses(values: Sequence[int]) -> int:
            return keep((_POINTER * max(len(values), 1))(*values))

        def kinds(count: int, kind: int) -> int:
            return keep((ctypes.c_int * max(count, 1))(*[kind] * count))

        def buffers(arrays: Sequence[np.ndarray]) -> Any:
            made = []
            for array in arrays:
                dims = keep((ctypes.c_int64 * max(array.ndim, 1))(*array.shape))
                dtype = _TYPES[array.dtype.name]
                made.append(keep(_new(_Buffer, dtype=dtype, data=array.ctypes.data, rank=array.ndim, dims=dims)))
            return _new(_Arguments, size=len(made), types=kinds(len(made), 1), values=addresses(made))

        names, scalars = [], []
        for name in sorted(attributes):
            value = np.array(attributes[name])
            held.append(value)
            names.append(keep(_Span(name.encode(), len(name))))
            scalars.append(keep(_Scalar(_TYPES[value.dtype.name], value.ctypes.data)))
        packed = _new(
            _Attributes,
            size=len(names),
            types=kinds(len(names), 3),
            names=addresses(names),
            values=addresses(scalars),
        )
        frame = _new(_Frame, stage=stage, arguments=buffers(arguments), results=buffers(results), attributes=packed)
        self._invoke(symbol, frame)
