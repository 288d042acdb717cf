"""Builds the kernels and their Python module with sanitizers; runs their tests, and the fuzzer of their entry points.

    python python_tests/sanitize.py [--only address] [--seconds 30] [--pytest ARGS]

address is AddressSanitizer with UndefinedBehaviorSanitizer; its tests include those of the CUDA kernels, run on the CPU
by csrc/simt's build with both. (csrc/simt runs on one thread. Its races are those of CUDA's threads, which its build
"race" finds, in test_simt_races.py.) No suppressions, and no TensorFlow in these processes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import simt_runner

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
# Options of the compiler, the library that a process must start with, and pytest's arguments. What is left out takes
# minutes, for it fills more memory than the cache holds, or starts these tests again for other instruction sets.
SANITIZERS = {
    "address": (
        "address,undefined",
        "asan",
        ["test_kernels_cpu.py", "test_kernels_phases.py", "test_simt.py"],
        "not larger_than_the_cache and not test_every_kernel_ran",
    ),
    "thread": (
        "thread",
        "tsan",
        ["test_kernels_cpu.py", "test_kernels_phases.py"],
        "not larger_than_the_cache and not simt and not rounding",
    ),
}
_PYTEST = """
import sys, pytest
status = pytest.main(sys.argv[1:])
assert "tensorflow" not in sys.modules
sys.exit(status)
"""


def build(name: str) -> Path:
    """Installs tfops_kernels with that sanitizer into a folder of its own."""
    site = ROOT / "build" / "sanitize" / name
    settings = {
        "build-dir": f"build/sanitize/{name}-build",
        "cmake.define.TFOPS_SANITIZE": SANITIZERS[name][0],
        "cmake.define.TFOPS_CUDA": "OFF",
        "cmake.define.TFOPS_TENSORFLOW": "OFF",
    }
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade", "--no-deps"]
    options = [option for key, value in settings.items() for option in ("-C", f"{key}={value}")]
    subprocess.run([*pip, "--target", site, *options, ROOT], check=True)
    return site


def run(name: str, site: Path, seconds: int, selected: list[str]) -> None:
    _, library, files, expression = SANITIZERS[name]
    environment = simt_runner.sanitizer_environment(library)
    environment |= {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "TFOPS_SIMT_VARIANT": "asan"}
    # Without address space randomization, which leaves ThreadSanitizer too little room on some kernels.
    prefix = ["setarch", "-R"] if name == "thread" else []
    # The fuzzer is linked with the sanitizer, and is no Python, which leaks.
    alone = {k: v for k, v in environment.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    subprocess.run([*prefix, site / "tfops_kernels" / "fuzz_kernels", str(seconds)], env=alone, check=True)
    pytest = [sys.executable, "-c", _PYTEST, "-q", "-p", "no:cacheprovider", *(selected or ["-k", expression])]
    subprocess.run([*prefix, *pytest, *(TESTS / file for file in files)], env=environment, cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=SANITIZERS)
    parser.add_argument("--seconds", type=int, default=30, help="of fuzzing, with each")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="arguments in place of the selection")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else SANITIZERS:
        start = time.monotonic()
        run(name, build(name), arguments.seconds, arguments.pytest)
        print(f"{name}: clean, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
