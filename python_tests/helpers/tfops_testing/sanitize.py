"""Builds the kernels and their Python module with sanitizers; runs their tests, and the fuzzer of their entry points.

    make sanitize ARGS="--only address --seconds 30 --pytest ARGS"

address   AddressSanitizer and UndefinedBehaviorSanitizer; tests include those of the CUDA kernels, run on the CPU by
          csrc/simt's build with both. (csrc/simt has one thread. Races among CUDA's threads are found by its build
          "race", in simt/test_races.py.)
thread    ThreadSanitizer.
fuzzer    the first two once more, and libFuzzer, which searches for inputs that reach new code. It needs clang++; the
          others draw inputs at random. No tests.

No suppressions, and no TensorFlow in these processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .paths import ROOT, TESTS
from .simt import sanitizer_environment

FLAGS = {"address": "address,undefined", "thread": "thread", "fuzzer": "fuzzer-no-link,address,undefined"}
KERNELS = [f"kernels/test_{name}.py" for name in ("cpu", "phases", "in_place", "virtual_batches")]
FILES = {"address": [*KERNELS, "simt/test_kernels.py"], "thread": KERNELS}
# What fills more memory than the cache holds takes minutes.
SELECTED = {
    "address": "not larger_than_the_cache and not every_kernel_ran",
    "thread": "not larger_than_the_cache and not by_simt",
}
_PYTEST = """
import sys, pytest
status = pytest.main(sys.argv[1:])
assert "tensorflow" not in sys.modules
sys.exit(status)
"""


def build(name: str) -> Path:
    """Installs tfops_kernels with those sanitizers into a folder of its own."""
    site = ROOT / "build" / "sanitize" / name
    settings = {
        "build-dir": f"build/sanitize/{name}-build",
        "cmake.define.TFOPS_SANITIZE": FLAGS[name],
        "cmake.define.TFOPS_CUDA": "OFF",
        "cmake.define.TFOPS_TENSORFLOW": "OFF",
    }
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade", "--no-deps"]
    options = [option for key, value in settings.items() for option in ("-C", f"{key}={value}")]
    compiler = {"CXX": "clang++", "CC": "clang"} if name == "fuzzer" else {}
    subprocess.run([*pip, "--target", site, *options, ROOT], env=os.environ | compiler, check=True)
    return site


def fuzz(name: str, site: Path, seconds: int) -> None:
    options = [f"-max_total_time={seconds}", "-max_len=64", "-verbosity=0"] if name == "fuzzer" else [str(seconds)]
    subprocess.run([*_prefix(name), site / "tfops_kernels" / "fuzz_kernels", *options], check=True)


def test(name: str, site: Path, arguments: list[str]) -> None:
    environment = sanitizer_environment({"address": "asan", "thread": "tsan"}[name])
    environment |= {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "TFOPS_SIMT_VARIANT": "asan"}
    # Reports are not to be captured: the process ends with them.
    options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-k", SELECTED[name], *arguments]
    pytest = [sys.executable, "-c", _PYTEST, *options]
    command = [*_prefix(name), *pytest, *(TESTS / file for file in FILES[name])]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


def _prefix(name: str) -> list[str]:
    # Randomized addresses leave ThreadSanitizer too little room, with some kernels of Linux.
    return ["setarch", "-R"] if name == "thread" else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=FLAGS)
    parser.add_argument("--seconds", type=int, default=30, help="of fuzzing, with each")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="more arguments of the tests")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else FLAGS:
        if name == "fuzzer" and not shutil.which("clang++"):
            print("fuzzer: left out, for there is no clang++")
            continue
        start = time.monotonic()
        site = build(name)
        fuzz(name, site, arguments.seconds)
        if name in FILES:
            test(name, site, arguments.pytest)
        print(f"{name}: clean, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
