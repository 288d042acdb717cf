"""The unit tests of csrc/tests pass on AArch64 too, which qemu plays. `make aarch64` tests kernels and ops there."""

from __future__ import annotations

import pytest

from tfops_testing import aarch64, building
from tfops_testing.paths import ROOT, TESTS

pytestmark = pytest.mark.source_tree


def test_cpp_on_aarch64():
    if missing := aarch64.missing_tools():
        pytest.skip(f"needs Debian's {' and '.join(missing)}")
    folder = ROOT / "build" / "aarch64" / "cpp_tests"
    building.build(ROOT / "csrc" / "tests", folder, f"-DCMAKE_TOOLCHAIN_FILE={aarch64.TOOLCHAIN}")
    building.run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", folder / "tests")


def test_sources_of_ubuntu_are_those_for_arm64():
    first, *others = aarch64._ubuntu_sources("noble").splitlines()
    signed = "signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg"
    assert first == f"deb [arch=arm64 {signed}] http://ports.ubuntu.com/ubuntu-ports noble main universe"
    assert [line.split()[4] for line in others] == ["noble-updates", "noble-security"]


def test_kernels_tests_that_are_not_run_there_exist():
    assert not [name for name in aarch64.NOT_THERE if not (TESTS / "kernels" / name).exists()]
    assert {"test_cpu.py", "test_in_place.py", "test_virtual_batches.py"} <= set(aarch64.KERNEL_TESTS)
