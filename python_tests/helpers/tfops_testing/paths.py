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
    """mnist.npz: of TFOPS_MNIST, in Keras' cache, or in shared/data beside the checkout."""
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    named = os.environ.get("TFOPS_MNIST")
    places = [Path(named)] if named else []
    places += [keras_home / "datasets" / "mnist.npz", ROOT.parent / "shared" / "data" / "mnist.npz"]
    return next((place for place in places if place.is_file()), None)
