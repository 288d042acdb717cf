"""Folders and files that the tests use."""

from __future__ import annotations

import os
from pathlib import Path

HELPERS = Path(__file__).parents[1]
TESTS = HELPERS.parent
ROOT = TESTS.parent
MODELS = ROOT / "models"
BENCHMARKS = ROOT / "benchmarks"


def find_mnist() -> Path | None:
    """mnist.npz: what TFOPS_MNIST names, else that in Keras' cache, else that in shared/data beside the checkout.

    Raises FileNotFoundError if TFOPS_MNIST names no file.
    """
    if named := os.environ.get("TFOPS_MNIST"):
        if not Path(named).is_file():
            raise FileNotFoundError(f"TFOPS_MNIST is {named!r}, but there is no such file")
        return Path(named)
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    places = [keras_home / "datasets" / "mnist.npz", ROOT.parent / "shared" / "data" / "mnist.npz"]
    return next((place for place in places if place.is_file()), None)
