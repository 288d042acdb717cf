"""Loads the op library, if it was built for the TensorFlow that is running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfops_kernels import _build


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_release(running: str, built: str) -> None:
    """Raises ImportError unless both are of the same release (2.21.x): ops link to TensorFlow's C++ ABI."""
    if _release(running) != _release(built):
        raise ImportError(
            f"this tfops was built for TensorFlow {_release(built)} ({built}), but TensorFlow {running} is running. "
            f"Either 'pip install tensorflow~={_release(built)}.0', or build tfops again for {_release(running)}."
        )


def load(library: Path, built: str) -> Any:
    """The ops of the library file, which was built for that version of TensorFlow. Raises ImportError, saying why."""
    if not built:
        raise ImportError(
            "this tfops was built without TensorFlow (TFOPS_TENSORFLOW=OFF): only tfops_kernels can be imported. "
            "For the ops, build and install it again without that setting."
        )
    import tensorflow as tf

    check_release(tf.__version__, built)
    if not library.exists():
        raise ImportError(
            f"{library} does not exist: is this the source tree, imported in place of the installed package? "
            "Then run Python from another folder or with PYTHONSAFEPATH=1."
        )
    return tf.load_op_library(str(library))


ops = load(Path(__file__).with_name("_tfops_ops.so"), _build.TENSORFLOW)
