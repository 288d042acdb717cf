"""What the tests of models/ share: the folder, drawn digits, and a way to run its programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import tfops

from .paths import HELPERS, MODELS


def draw_digits(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Seven-segment digits at random places in noise: uint8 `[count, 28, 28]`, and labels uint8 `[count]`."""
    segments = {  # rows, columns
        "a": (slice(0, 2), slice(0, 9)),
        "b": (slice(0, 8), slice(7, 9)),
        "c": (slice(8, 16), slice(7, 9)),
        "d": (slice(14, 16), slice(0, 9)),
        "e": (slice(8, 16), slice(0, 2)),
        "f": (slice(0, 8), slice(0, 2)),
        "g": (slice(7, 9), slice(0, 9)),
    }
    lit = ["abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg"]
    images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(2, 10), rng.integers(2, 17)
        digit = image[row : row + 16, column : column + 9]
        for segment in lit[label]:
            digit[segments[segment]] = rng.integers(150, 256)
    return images, labels


def draw_arrays(train: int, test: int) -> dict[str, np.ndarray]:
    """The four arrays of mnist.npz."""
    rng = np.random.default_rng(0)
    (x_train, y_train), (x_test, y_test) = draw_digits(train, rng), draw_digits(test, rng)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def command(program: str, *arguments: object) -> list[str]:
    return [sys.executable, str(MODELS / "train.py"), program, *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """This process' environment, the same tfops, this package, and the modules of models/, even with PYTHONSAFEPATH."""
    path = [str(Path(tfops.__file__).parents[1]), str(MODELS), str(HELPERS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **extra}


def run_program(program: str, *arguments: object, cwd: Path, timeout: float = 1800, **extra: str):
    """Runs a program of `models/train.py` to its end."""
    return run_in(cwd, *command(program, *arguments)[1:], timeout=timeout, **extra)


def run_in(folder: Path, *arguments: object, timeout: float = 1800, **extra: str):
    """Runs `python ARGUMENTS` in a folder to its end, with `environment`."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env=environment(**extra),
        check=False,
    )
