"""Hashes of all that the CPU's kernels make of some problems, to be compared with another machine's:

python -m tfops_testing.kernel_bits FILE.json

Each has the name of a case and a result, as in "50x3x23-axis-1-float32-training-relu/y".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tfops_kernels

from . import kernel_cases
from .kernel_cases import Case
from .phase_cases import cpu, make_given, make_keeps

# Folded and whole rows, with ragged ends; several chunks; planes and segments of them, of whole vectors and not.
SHAPES = [
    *(((50, 3, 23), -1), ((1030, 65), -1), ((260, 300), -1), ((3000, 64), -1), ((400, 2), -1)),
    *(((5, 24, 10, 10), 1), ((3, 37, 7, 5), 1), ((2, 3, 200, 201), 1), ((64, 8, 16), 1)),
]


def is_channels_last(name: str) -> bool:
    return "axis-1" in name


def _results(case: Case, **others: Any) -> Iterator[tuple[str, np.ndarray]]:
    arrays = kernel_cases.inputs(case)
    yield from ((f"given-{name}", array) for name, array in arrays.items())
    settings = {"axis": case.axis, "training": case.training, "activation": case.activation, **others}
    if case.residual:
        settings["residual"] = arrays["residual"]
    vectors = [arrays[name] for name in ("scale", "offset")]
    statistics = [arrays[name] for name in ("mean", "variance")]
    forward = tfops_kernels.forward(arrays["x"], *vectors, *([] if case.training else statistics), **settings)
    yield from ((name, value) for name, value in forward._asdict().items() if value is not None)
    saved = [forward.saved_mean, forward.saved_inv_std] if case.training else statistics
    kept = forward.y if others.get("in_place") else arrays["x"]
    backward = tfops_kernels.backward(arrays["dy"], kept, *vectors, *saved, mask=forward.mask, **settings)
    yield from ((f"d{name}", value) for name, value in backward._asdict().items() if value is not None)


def _phases(case: Case) -> Iterator[tuple[str, np.ndarray]]:
    given = make_given(case.shape, case.axis, case.dtype)
    for i, keep in enumerate(make_keeps(case.shape)):
        moments = cpu().moments(given["x"], case.axis, keep, given["scale"])
        gradient = cpu().gradient(given, case.axis, "relu6", True, keep)
        yield from ((f"kept{i}-{k}", array) for k, array in enumerate(moments + gradient))


def _all() -> Iterator[tuple[str, np.ndarray]]:
    for shape, axis in SHAPES:
        for case in kernel_cases.combinations(shape, axis):
            yield from ((f"{case}/{name}", array) for name, array in _results(case))
        for dtype in kernel_cases.DTYPES:
            case = Case(shape, axis, dtype)
            yield from ((f"{case}/{name}", array) for name, array in _phases(case))
            size = shape[0] // 2 if shape[0] % 2 == 0 else 1
            for others in ({"virtual_batch_size": size}, {"in_place": True}):
                of_case = _results(dataclasses.replace(case, activation="leaky_relu"), **others)
                yield from ((f"{case}/{next(iter(others))}-{name}", array) for name, array in of_case)


if __name__ == "__main__":
    hashes = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in _all()}
    Path(sys.argv[1]).write_text(json.dumps(hashes))
