"""The unit tests of csrc/tests: what is plain C++, compiled without the kernels. One test here for each there."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tfops_testing import building
from tfops_testing.paths import ROOT

SOURCES = ROOT / "csrc" / "tests"
BUILD = ROOT / "build" / "cpp_tests"
pytestmark = pytest.mark.source_tree

NAMES = [
    name
    for path in sorted(SOURCES.glob("*_test.cc"))
    for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="session")
def program() -> Path:
    """Built, or what of it is out of date."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    building.build(SOURCES, BUILD)
    return BUILD / "tests"


def test_all_tests_are_known(program):
    assert sorted(building.run(program, "--list").split()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cpp(program, name):
    building.run(program, name)
