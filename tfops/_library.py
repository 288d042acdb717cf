"""Loads the op library that was built for the release of TensorFlow that is running."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from tfops_kernels import _build

OLDEST = "2.18"  # that can be built for: cmake/TensorFlow.cmake


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def path(kind: str, version: str) -> Path:
    """Where the library of that kind ("ops" or "xla") is, for a version of TensorFlow: ops link to its C++ ABI."""
    return Path(__file__).with_name(f"_tfops_{kind}-{_release(version)}.so")


def _newest(releases: list[str]) -> str:
    """The argument for `pip install` of the newest of these releases, of the package without CUDA."""
    name = "tensorflow-cpu" if platform.machine() in ("x86_64", "AMD64") else "tensorflow"
    return f"{name}~={releases[-1]}.0"


def check_release(running: str, built: str) -> None:
    """Raises ImportError unless the running version is of a release in `built`, versions with spaces between."""
    releases = [_release(version) for version in built.split()]
    if not releases:
        raise ImportError(
            "this tfops was built without TensorFlow (TFOPS_TENSORFLOW=OFF): only tfops_kernels can be imported. "
            "For the ops, build and install it again without that setting."
        )
    if _release(running) not in releases:
        packages = importlib.metadata.packages_distributions().get("tensorflow", ["tensorflow"])
        package = packages[0].replace("_", "-")
        raise ImportError(
            f"this tfops has ops for TensorFlow {', '.join(releases)}, but TensorFlow {running} ({package}) is "
            f"running. Either install one of those in its place (pip uninstall {package}, then pip install "
            f"{_newest(releases)} or another package of it), or build tfops for the one that is installed, if that is "
            f"{OLDEST} or later: pip install --no-build-isolation in its source tree."
        )


def _missing(built: str) -> ImportError:
    releases = [_release(version) for version in built.split()] or [OLDEST]
    return ImportError(
        f"tfops needs TensorFlow, and there is none in this environment: pip install {_newest(releases)}, or "
        f"'tensorflow[and-cuda]~={releases[-1]}.0' for an NVIDIA GPU"
    )


def load(built: str) -> Any:
    """The ops, from the library for the TensorFlow that is installed. Raises ImportError, saying why there is none."""
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise _missing(built) from error
    running: str = getattr(tf, "__version__", "")
    if not running:  # Python takes an empty folder, which is left of one that was uninstalled, for a package
        raise _missing(built)
    check_release(running, built)
    library = path("ops", running)
    if not library.exists():
        raise ImportError(
            f"{library} does not exist: is this the source tree, imported in place of the installed package? "
            "Then run Python from another folder or with PYTHONSAFEPATH=1."
        )
    try:
        return tf.load_op_library(str(library))
    except tf.errors.OpError as error:
        raise ImportError(
            f"{library.name} does not load in TensorFlow {running}, and was built for one of {built}. Build and "
            f"install tfops again for the one that is running: pip install --no-build-isolation in its source tree. "
            f"{error}"
        ) from error


ops = load(_build.TENSORFLOW)
