"""The cells' work by PyTorch: its native kernels, cuDNN, and what torch.compile fuses."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from problems import Cell

from . import clocks
from .calls import EPSILON, MOMENTUM, Tensors
from .cells import cell_of, name_of, telling
from .records import NOT_RUN, OK, first_line
from .steps import TIMING, Context, make_sets

MOST_COMPILED = 16  # cells: to compile one takes seconds


def run(context: Context, compiled: bool) -> int:
    """Peers of all cells that were measured, the most telling first."""
    step = "compile" if compiled else "peers"
    if context.dry_run or importlib.util.find_spec("torch") is None:
        reason = "PyTorch's kernels need a GPU" if context.dry_run else "PyTorch is not installed"
        return context.run(step, [("torch", lambda: {"status": NOT_RUN, "error": reason})], on_gpu=False)
    first = telling()
    if compiled:
        return context.run(step, compiled_items(context, first[:MOST_COMPILED]))
    others = [cell_of(item) for item, record in context.records.ended("rest").items() if record["status"] == OK]
    items = [(name_of(cell), functools.partial(measure, context, cell)) for cell in first + others]
    items.insert(len(first), ("copy", lambda: clocks.copy_rate(context.backend, context.dry_run)))
    return context.run(step, items)


def measure(context: Context, cell: Cell) -> dict[str, Any]:
    """The times of all peers of a cell."""
    times, errors = {}, {}
    try:
        every = [calls_of(cell, t) for t in make_sets(context.backend, cell)]
    except context.backend.exhausted:
        return {"status": NOT_RUN, "error": "the GPU has too little memory"}
    for name in every[0]:
        try:
            times[name] = context.backend.seconds([calls[name]() for calls in every], TIMING)
        except RuntimeError as problem:
            if not context.backend.is_sound():
                raise
            errors[name] = first_line(problem)
    if not times:
        return {"status": NOT_RUN, "error": next(iter(errors.values())), "peer_errors": errors}
    return {"peers": times, "peer_errors": errors}


def calls_of(cell: Cell, t: Tensors) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what makes a call of a peer: native and cuDNN, on contiguous and channels-last memory."""
    import torch

    first = t.x if t.axis == 1 else t.x.movedim(-1, 1)  # channels second, as PyTorch wants it; the memory stays
    memory = {"contiguous": torch.contiguous_format}
    if first.dim() == 4:
        memory["channels_last"] = torch.channels_last
    if first.dim() == 5:
        memory["channels_last"] = torch.channels_last_3d
    made = {}
    for name, memory_format in memory.items():
        for kind in ("cudnn", "native"):
            if kind == "cudnn" and first.dim() == 2:
                continue  # PyTorch does not give it such data
            made[f"{kind}, {name}"] = functools.partial(make_call, cell, t, kind, memory_format)
    return made


def place(t: Tensors, memory_format: Any) -> tuple[Any, Any, Any]:
    """x, dy and residual with the channels second, in that format."""
    found = []
    for tensor in (t.x, t.dy, t.residual):
        if tensor is not None and t.axis != 1:
            tensor = tensor.movedim(-1, 1)
        found.append(None if tensor is None else tensor.contiguous(memory_format=memory_format))
    return found[0], found[1], found[2]


def make_call(cell: Cell, t: Tensors, kind: str, memory_format: Any) -> Callable[[], Any]:
    import torch

    aten = torch.ops.aten
    x, dy, residual = place(t, memory_format)
    mean, variance = t.mean.clone(), t.variance.clone()
    training = cell.what != "inference"

    def normalize() -> tuple:
        if kind == "cudnn":
            return aten.cudnn_batch_norm(x, t.scale, t.offset, mean, variance, training, MOMENTUM, EPSILON)
        return aten.native_batch_norm(x, t.scale, t.offset, mean, variance, training, MOMENTUM, EPSILON)

    def forward() -> Any:
        y, *saved = normalize()
        if cell.variant == "add_relu":
            y.add_(residual)
        return (y if cell.variant == "plain" else y.relu_()), saved

    if cell.what != "backward":
        return forward
    y, saved = forward()

    def backward() -> Any:
        dz = dy if cell.variant == "plain" else aten.threshold_backward(dy, y, 0)
        if kind == "cudnn":
            arguments = (x, dz, t.scale, mean, variance, saved[0], saved[1], EPSILON, saved[2])
            return aten.cudnn_batch_norm_backward(*arguments), dz
        arguments = (dz, x, t.scale, mean, variance, saved[0], saved[1], True, EPSILON, [True] * 3)
        return aten.native_batch_norm_backward(*arguments), dz

    return backward


# ----------------------------------------------------------------------------------------------------------------------


def compiled_items(context: Context, cells: list[Cell]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """For each shape a function, compiled with its gradient; a backward pass is the time of both, less forward's."""
    for cell in dict.fromkeys(cell._replace(what="backward") for cell in cells):
        name = " ".join(name_of(cell).split(" ")[:5])
        yield name, functools.partial(try_compiled, context, cell)


def try_compiled(context: Context, cell: Cell) -> dict[str, Any]:
    """The times; or why torch.compile has none, which is no failure of ours unless the GPU has been lost."""
    try:
        return measure_compiled(context, cell)
    except Exception as problem:  # of its own types, of Triton's, of a compiler that is not installed
        if not context.backend.is_sound():
            raise
        return {"status": NOT_RUN, "error": first_line(problem)}


def measure_compiled(context: Context, cell: Cell) -> dict[str, Any]:
    import torch
    from torch._functorch import config

    if hasattr(config, "donated_buffer"):
        config.donated_buffer = False  # the gradient is taken more than once
    torch._dynamo.reset()
    sets = make_sets(context.backend, cell)
    memory_format = torch.contiguous_format
    if cell.layout == "NHWC" and len(cell.shape) > 3:
        memory_format = torch.channels_last if len(cell.shape) == 4 else torch.channels_last_3d

    def normalize(x: Any, scale: Any, offset: Any, mean: Any, variance: Any, residual: Any) -> Any:
        y = torch.nn.functional.batch_norm(x, mean, variance, scale, offset, True, MOMENTUM, EPSILON)
        if residual is not None:
            y = y + residual
        return y if cell.variant == "plain" else torch.relu(y)

    compiled = torch.compile(normalize, dynamic=False)
    forward, both = [], []
    for t in sets:
        x, dy, residual = place(t, memory_format)
        leaves = [v.detach().requires_grad_() for v in (x, t.scale, t.offset, residual) if v is not None]
        add = leaves[3] if residual is not None else None
        call = functools.partial(compiled, *leaves[:3], t.mean.clone(), t.variance.clone(), add)

        def gradient(call: Any = call, leaves: Any = leaves, dy: Any = dy) -> Any:
            return torch.autograd.grad(call(), leaves, dy)

        forward.append(call)
        both.append(gradient)
    seconds = context.backend.seconds(forward, TIMING)
    return {"forward": seconds, "backward": context.backend.seconds(both, TIMING) - seconds}
