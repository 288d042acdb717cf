"""scikit-build-core's build backend, with the build requirements that depend on the machine.

nvcc comes from PyPI where the system has none (CUDACXX, then PATH), and TensorFlow's headers where they are wanted.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  (the hooks that are not overridden here)

TENSORFLOW = "2.21.*"
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


def _requirements(settings: dict[str, Any] | None) -> list[str]:
    requirements = []
    if _define("TFOPS_TENSORFLOW", "ON", settings) not in ("OFF", "0", "FALSE", "NO"):
        package = "tensorflow-cpu" if platform.machine() == "x86_64" else "tensorflow"
        requirements.append(f"{package}=={TENSORFLOW}")
    has_nvcc = bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
    if _define("TFOPS_CUDA", "AUTO", settings) != "OFF" and not has_nvcc and sys.platform == "linux":
        packages = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
        requirements += [f"{package}=={CUDA}" for package in packages]
    return requirements


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_requirements(config_settings)]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_requirements(config_settings)]
