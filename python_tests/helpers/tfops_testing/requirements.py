"""What is there to run tests with, and marks for tests that need it.

A folder whose modules cannot even be imported without it says so in its conftest.py:

    collect_ignore_glob = [] if has_tensorflow() else ["*"]
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

import tfops_kernels

from .paths import ROOT


def has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def has_source_tree() -> bool:
    """Whether the tests lie in it, rather than beside an installed package alone."""
    return (ROOT / "csrc").is_dir()


def has_model_packages() -> bool:
    """Whether the dependency group `models` of pyproject.toml is installed; models/*.py import it."""
    return all(importlib.util.find_spec(name) for name in ("matplotlib", "PIL"))


def _keras_version() -> str:
    """The version of the package `keras`, which is not imported."""
    try:
        return importlib.metadata.version("keras")
    except importlib.metadata.PackageNotFoundError:  # keras-nightly, say; this takes a second
        return importlib.metadata.version(importlib.metadata.packages_distributions()["keras"][0])


def has_keras(version: str) -> bool:
    """Whether Keras is that version, such as "3.10", or a later one."""

    def key(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:2]]

    return has_tensorflow() and key(_keras_version()) >= key(version)


def needs_keras(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test of what Keras itself does wrong, or has not, before that version."""
    return pytest.mark.skipif(not has_keras(version), reason=f"needs Keras {version}: {reason}")


# As parameters: compiled by XLA.
JIT = pytest.param("jit", marks=pytest.mark.xla)
JIT_COMPILE = pytest.param(True, marks=pytest.mark.xla, id="jit_compile")
needs_renorm = needs_keras("3.14", "renorm")
needs_remat_scope = needs_keras("3.9", "RematScope")
needs_tensorflow = pytest.mark.skipif(not has_tensorflow(), reason="needs TensorFlow")
needs_cuda_build = pytest.mark.skipif(not tfops_kernels.build_info()["cuda"], reason="this build has no CUDA kernels")
