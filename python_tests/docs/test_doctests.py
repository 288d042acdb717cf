"""The examples in docstrings, run by doctest."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import tfops
import tfops.gradcheck
import tfops_kernels

PACKAGES = [tfops, tfops.gradcheck, tfops.keras, tfops_kernels]
JAX = "tfops_kernels.jax"  # by itself, since it cannot be imported everywhere


def _hold(module: ModuleType) -> bool:
    return not doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_docstrings_hold(package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    names = {f"{package.__name__}.{file}" for file in files} - {JAX}
    modules = [package, *(importlib.import_module(name) for name in sorted(names))]
    assert not [module for module in modules if not _hold(module)]


def test_docstrings_for_jax_hold():
    assert _hold(pytest.importorskip(JAX, exc_type=ImportError))
