"""Which problems are timed, in which order, and their names."""

from __future__ import annotations

import random

from problems import BYTES, NETWORKS, PASSES, VARIANTS, Cell, cells

DTYPES = ("float32", "float16", "bfloat16")

# What a short time goes to first, forward and backward: every tier, layout and type, at sizes that networks have.
_TELLING = [
    ("resnet50-256", (256, 56, 56, 256), "NHWC", "bfloat16", "add_relu"),
    ("resnet50-32", (32, 14, 14, 1024), "NHWC", "bfloat16", "add_relu"),
    ("mnist-256", (256, 14, 14, 32), "NHWC", "float32", "relu"),
    ("resnet50-256", (256, 7, 7, 2048), "NHWC", "bfloat16", "add_relu"),
    ("resnet50-32", (32, 56, 56, 64), "NHWC", "bfloat16", "relu"),
    ("alexnet-256", (256, 13, 13, 384), "NHWC", "float16", "relu"),
    ("resnet50-32", (32, 28, 28, 512), "NHWC", "bfloat16", "add_relu"),
    ("alexnet-256", (256, 4096), "NHWC", "float32", "relu"),
    ("resnet50-32", (32, 14, 14, 1024), "NCHW", "bfloat16", "add_relu"),
    ("resnet50-256", (256, 14, 14, 1024), "NHWC", "bfloat16", "add_relu"),
    ("resnet50-32", (32, 14, 14, 256), "NHWC", "float32", "relu"),
    ("resnet50-32", (32, 7, 7, 2048), "NHWC", "float16", "add_relu"),
    ("mnist-256", (256, 28, 28, 32), "NHWC", "float16", "relu"),
    ("resnet50-32", (32, 28, 28, 128), "NCHW", "float32", "relu"),
    ("mobile-64", (64, 28, 28, 116), "NHWC", "float16", "relu"),
    ("mnist-256", (256, 128), "NHWC", "float32", "relu"),
    ("resnet50-256", (256, 112, 112, 64), "NHWC", "bfloat16", "relu"),
    ("resnet50-256", (256, 28, 28, 512), "NCHW", "bfloat16", "add_relu"),
    ("alexnet-256", (256, 27, 27, 256), "NHWC", "float32", "plain"),
    ("video-4", (4, 16, 28, 28, 64), "NHWC", "float32", "plain"),
]
# Of the dry run: as small as takes a simulated GPU no time.
_SMALL = [
    ("dry", (20, 3, 3, 24), "NHWC", "float32", "add_relu"),
    ("dry", (6, 4, 6, 16), "NCHW", "float16", "relu"),
]


def telling(dry_run: bool = False) -> list[Cell]:
    """The cells to begin with, most telling first."""
    return [Cell(*cell, what) for cell in (_SMALL if dry_run else _TELLING) for what in ("forward", "backward")]


def rest(dry_run: bool = False) -> list[Cell]:
    """All others, in an order that leaves a fair sample wherever it ends."""
    if dry_run:
        return [Cell("dry", (30, 8), "NHWC", "bfloat16", "plain", what) for what in PASSES]
    first = set(telling())
    others = [cell for cell in cells(list(NETWORKS), list(DTYPES), ["NHWC", "NCHW"], list(VARIANTS), list(PASSES))]
    others = [cell for cell in others if cell not in first]
    random.Random(1).shuffle(others)
    return others


def name_of(cell: Cell) -> str:
    shape = "x".join(map(str, cell.shape))
    return f"{cell.network} {shape} {cell.layout} {cell.dtype} {cell.variant} {cell.what}"


def cell_of(name: str) -> Cell:
    network, shape, *others = name.split(" ")[:6]
    return Cell(network, tuple(map(int, shape.split("x"))), *others)


def to_layout(cell: Cell) -> tuple[tuple[int, ...], int]:
    """The shape of the cell's data, and the axis of their channels."""
    if cell.layout == "NHWC":
        return cell.shape, len(cell.shape) - 1
    return (cell.shape[0], cell.shape[-1], *cell.shape[1:-1]), 1


def moved_bytes(cell: Cell, read_again: float) -> int:
    """What a cell moves, if it reads so much of what it sums up a second time."""
    summed = (2 if cell.what == "backward" else 1) * cell.elements * BYTES[cell.dtype]
    return cell.least_bytes + round(read_again * summed)
