"""Loads the op library that was built for the release of TensorFlow that is running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfops_kernels import _build


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def path(kind: str, version: str) -> Path:
    """Where the library of that kind ("ops" or "xla") is, for a version of TensorFlow: ops link to its C++ ABI."""
    return Path(__file__).with_name(f"_tfops_{kind}-{_release(version)}.so")


def check_release(running: str, built: str) -> None:
    """Raises ImportError unless the running version is of a release in `built`, versions with spaces between."""
    releases = [_release(version) for version in built.split()]
    if not releases:
        raise ImportError(
            "this tfops was built without TensorFlow (TFOPS_TENSORFLOW=OFF): only tfops_kernels can be imported. "
            "For the ops, build and install it again without that setting."
        )
    if _release(running) not in releases:
        raise ImportError(
            f"this tfops has ops for TensorFlow {', '.join(releases)}, but TensorFlow {running} is running. Either "
            f"install one of those (pip install tensorflow~={releases[-1]}.0), or build tfops for the one that is "
            "installed: pip install --no-build-isolation in its source tree."
        )


def load(built: str) -> Any:
    """The ops, from the library for the TensorFlow that is installed. Raises ImportError, saying why there is none."""
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise ImportError(
            "tfops needs TensorFlow, and there is none in this environment: pip install tensorflow-cpu, or "
            "'tensorflow[and-cuda]' for an NVIDIA GPU"
        ) from error
    check_release(tf.__version__, built)
    library = path("ops", tf.__version__)
    if not library.exists():
        raise ImportError(
            f"{library} does not exist: is this the source tree, imported in place of the installed package? "
            "Then run Python from another folder or with PYTHONSAFEPATH=1."
        )
    return tf.load_op_library(str(library))


ops = load(_build.TENSORFLOW)
