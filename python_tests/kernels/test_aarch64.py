"""The unit tests of csrc/tests pass on AArch64 too, which qemu plays. `make aarch64` tests kernels and ops there."""

from __future__ import annotations

import pytest

from tfops_testing import aarch64, building
from tfops_testing.paths import ROOT

pytestmark = pytest.mark.source_tree


def test_cpp_on_aarch64():
    if missing := aarch64.missing_tools():
        pytest.skip(f"needs Debian's {' and '.join(missing)}")
    folder = ROOT / "build" / "aarch64" / "cpp_tests"
    building.build(ROOT / "csrc" / "tests", folder, f"-DCMAKE_TOOLCHAIN_FILE={aarch64.TOOLCHAIN}")
    building.run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", folder / "tests")
