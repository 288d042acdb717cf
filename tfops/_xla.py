"""Registers the ops' XLA kernels, which `jit_compile=True` needs: a library of its own, which may be missing.

TensorFlow has the interface that they use from release 2.20 on. The library is loaded with the package, not when first
needed: that takes less than a millisecond, and whether a graph will be compiled is not always known when it is built (a
function called by a compiled one, a saved model).
"""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

from tfops import _gpus, _library  # the ops first: these are kernels of theirs


def load(library: Path) -> str:
    """Loads the library file; returns why its kernels are not there, or "" if they are."""
    if not library.exists():
        return (
            f"this tfops has none for TensorFlow {tf.__version__}: they need TensorFlow 2.20 or later, and a build "
            "without TFOPS_XLA=OFF"
        )
    try:
        tf.load_library(str(library))
    except tf.errors.OpError as error:
        return str(error.message)
    return ""


PROBLEM = load(_library.path("xla", tf.__version__))


def supports_jit() -> bool:
    """Whether XLA can compile what is made on the devices of this process, as Keras asks of a layer.

    It can where the ops have kernels for it, and where TensorFlow's own operations take their place.
    """
    return not PROBLEM or bool(_gpus.problem())
