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


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_docstrings_hold(package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    modules = [package, *(importlib.import_module(f"{package.__name__}.{name}") for name in sorted(names))]
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert not [module for module in modules if doctest.testmod(module, optionflags=flags).failed]
