"""scikit-build-core's build backend, with the build requirements that depend on the machine.

nvcc comes from PyPI where the system has none (CUDACXX, then PATH), and TensorFlow's headers where they are wanted.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import tensorflow_packages
from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  (the hooks that are not overridden here)

CUDA = "13.0.*"


def _define(name: str, default: str, settings: dict[str, Any] | None) -> str:
    """The CMake variable's value from pip's -C cmake.define.NAME=..., or from SKBUILD_CMAKE_DEFINE."""
    value = (settings or {}).get(f"cmake.define.{name}")
    if value is None:
        for pair in os.environ.get("SKBUILD_CMAKE_DEFINE", "").split(";"):
            key, _, setting = pair.partition("=")
            if key == name:
                value = setting
    return str(default if value is None else value).upper()


def _is_on(name: str, default: str, settings: dict[str, Any] | None) -> bool:
    return _define(name, default, settings) not in ("OFF", "0", "FALSE", "NO")


def tensorflow_requirements(settings: dict[str, Any] | None = None) -> list[str]:
    """TensorFlow, for its headers and libraries: the release that TFOPS_TENSORFLOW names, by default the newest."""
    wanted = _define("TFOPS_TENSORFLOW", "ON", settings)
    if not _is_on("TFOPS_TENSORFLOW", "ON", settings) or _define("TFOPS_TENSORFLOW_PACKAGES", "", settings):
        return []
    release = wanted if "." in wanted else [*tensorflow_packages.RELEASES][-1]
    return [f"{tensorflow_packages.name()}=={release}.*"]


def cuda_requirements(settings: dict[str, Any] | None = None) -> list[str]:
    """NVIDIA's packages of nvcc, unless the machine has one, or CUDA is not built."""
    is_wanted = _is_on("TFOPS_CUDA", "AUTO", settings) and sys.platform == "linux"
    if _is_on("TFOPS_NATIVE", "OFF", settings) and _define("TFOPS_CUDA", "AUTO", settings) == "AUTO":
        is_wanted = is_wanted and bool(shutil.which("nvidia-smi"))
    if not is_wanted or os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return []
    packages = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
    return [f"{package}=={CUDA}" for package in packages]


def _requirements(settings: dict[str, Any] | None) -> list[str]:
    return tensorflow_requirements(settings) + cuda_requirements(settings)


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_requirements(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_requirements(config_settings)]


if __name__ == "__main__":  # for an environment that builds the portable wheel without isolation: see the Makefile
    print(*cuda_requirements())
