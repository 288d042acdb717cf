"""The batch norms of well-known networks: what the benchmarks run, and the tests ask the policy about."""

from __future__ import annotations

import math
from typing import NamedTuple

# What gpu_proof.py runs: of each network (batch, *pixels, channels) of each of its batch norms, once each.
NETWORKS: dict[str, list[tuple[int, ...]]] = {
    "mnist-256": [(256, 28, 28, 32), (256, 14, 14, 32), (256, 7, 7, 64), (256, 128)],
    "alexnet-256": [(256, 55, 55, 96), (256, 27, 27, 256), (256, 13, 13, 384), (256, 13, 13, 256), (256, 4096)],
    **{
        f"resnet50-{batch}": [
            (batch, 112, 112, 64),
            (batch, 56, 56, 64),
            (batch, 56, 56, 256),
            (batch, 56, 56, 128),
            (batch, 28, 28, 128),
            (batch, 28, 28, 512),
            (batch, 28, 28, 256),
            (batch, 14, 14, 256),
            (batch, 14, 14, 1024),
            (batch, 14, 14, 512),
            (batch, 7, 7, 512),
            (batch, 7, 7, 2048),
        ]
        for batch in (32, 256)
    },
    "mobile-64": [(64, 56, 56, 24), (64, 28, 28, 40), (64, 28, 28, 116)],
    "video-4": [(4, 16, 28, 28, 64)],
}

# What cpu.py runs.
CPU_NETWORKS: dict[str, list[tuple[int, ...]]] = {
    "mnist-256": NETWORKS["mnist-256"],
    "alexnet-64": [(64, *shape[1:]) for shape in NETWORKS["alexnet-256"]],
    "resnet50-32": NETWORKS["resnet50-32"],
    "ragged-64": [*NETWORKS["mobile-64"], (64, 28, 28, 131)],
    "dense-256": [(256, 4096)],
    "video-4": NETWORKS["video-4"],
}

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
PASSES = ("forward", "backward", "inference")
VARIANTS = ("plain", "relu", "add_relu")


class Cell(NamedTuple):
    """One thing to measure."""

    network: str
    shape: tuple[int, ...]  # channels last
    layout: str  # "NHWC" or "NCHW", of any rank
    dtype: str
    variant: str
    what: str  # one of PASSES, or "forward_backward"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.elements * BYTES[self.dtype]

    @property
    def _mask_bytes(self) -> int:
        return self.elements // 8 if self.variant == "add_relu" else 0

    @property
    def written_bytes(self) -> int:
        """What has to be written: tensors, and bits of masks."""
        if self.what == "forward_backward":
            return sum(self._replace(what=what).written_bytes for what in ("forward", "backward"))
        if self.what == "backward":  # dx, dresidual
            return (1 + (self.variant == "add_relu")) * self.tensor_bytes
        return self.tensor_bytes + (self._mask_bytes if self.what == "forward" else 0)  # y, mask

    @property
    def least_bytes(self) -> int:
        """What has to be read and written if everything is read and written once."""
        add = self.variant == "add_relu"
        if self.what == "backward":  # dy, x, mask
            return 2 * self.tensor_bytes + self._mask_bytes + self.written_bytes
        return (1 + add) * self.tensor_bytes + self.written_bytes  # x, residual

    @property
    def streamed_bytes(self) -> int:
        """What has to be moved where nothing stays on the chip from statistics to results: inputs are read twice."""
        if self.what == "forward_backward":
            return sum(self._replace(what=what).streamed_bytes for what in ("forward", "backward"))
        again = {
            "forward": self.tensor_bytes,
            "backward": 2 * self.tensor_bytes + self._mask_bytes,
            "inference": 0,
        }  # x; dy, x, mask
        return self.least_bytes + again[self.what]


def cells(
    networks: list[str],
    dtypes: list[str],
    layouts: list[str],
    variants: list[str],
    passes: list[str],
    shapes: dict[str, list[tuple[int, ...]]] = NETWORKS,
) -> list[Cell]:
    """All combinations. 2-D data have one layout."""
    return [
        Cell(network, shape, layout, dtype, variant, what)
        for network in networks
        for shape in shapes[network]
        for layout in layouts
        if len(shape) > 2 or layout == "NHWC"
        for dtype in dtypes
        for variant in variants
        for what in passes
    ]
