"""Builds tfops for AArch64 (ARM of 64 bits) on an x86 machine, and runs its tests there under qemu.

    make aarch64 ARGS="--only kernels --pytest -k moments"

kernels      the tests of the CPU's kernels, as they are.
statistics   results are bit for bit those of x86, where sums are in the same order; see docs/numerics.md.
tensorflow   TensorFlow for AArch64 loads the ops; gradients are right, and a sample of the tests passes, XLA's too.

It needs Debian or Ubuntu with g++-aarch64-linux-gnu and qemu-user. Python for AArch64 is taken from the distribution's
packages, all else from PyPI: everything into build/aarch64, and nothing into the system.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pybind11

from . import building, kernel_bits
from .fresh_process import run_python
from .paths import HELPERS, ROOT, TESTS

FOLDER = ROOT / "build" / "aarch64"
SYSTEM = FOLDER / "system"  # Python for AArch64, and the libraries that it and TensorFlow need
PYTHON = FOLDER / "python"  # a script that runs it
TOOLCHAIN = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
NOT_THERE = {  # of the kernels' tests
    "test_aarch64.py": "is about this",
    "test_cpp.py": "test_aarch64.py runs the same C++",
    "test_gpu.py": "is for a GPU",
    "test_jax.py": "would take JAX for AArch64",
    "test_limits.py": "takes minutes without emulation",
    "test_tiers.py": "is about CUDA",
}
KERNEL_TESTS = sorted({path.name for path in (TESTS / "kernels").glob("test_*.py")} - NOT_THERE.keys())
OPS_TESTS = [
    "test_activations.py",
    "test_gradients.py",
    "test_in_place.py",
    "test_op.py",
    "test_phases.py",
    "test_virtual_batches.py",
    "test_xla.py",
]

# Results by erfc of the C library, of which each processor has its own.
OF_THE_C_LIBRARY = r"-float64-.*-gelu(-residual)?/(y|d\w+)$"

# Where kernels and tests look for the size of the last-level cache: qemu looks in SYSTEM first. A small one is soon
# outgrown, which would take minutes under emulation.
CACHE = SYSTEM / "sys/devices/system/cpu/cpu0/cache/index3/size"

# Vectors of 16 bytes with fused multiplications and additions, as NEON's: a build that exists for the comparison alone.
TWIN = {"TFOPS_CPU_LEVELS": "generic", "CMAKE_CXX_FLAGS": "-mfma -mf16c -mno-mmx", "Python_EXECUTABLE": sys.executable}


def missing_tools() -> list[str]:
    """Debian's packages that are not installed."""
    packages = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
    return [package for program, package in packages.items() if not shutil.which(program)]


def _install_system() -> None:
    """Unpacks the packages of Python for AArch64 and all that they depend on. apt works in a folder of its own."""
    done = SYSTEM / ".done"
    if done.exists():
        return
    apt = FOLDER / "apt"
    (apt / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    (apt / "state").mkdir(exist_ok=True)
    (apt / "status").touch()  # as of a system on which nothing is installed
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "",
        "Dir::Cache": apt / "cache",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
    }
    release = platform.freedesktop_os_release()
    if release["ID"] == "ubuntu":  # which has arm64 in a place of its own
        settings |= {"Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "-"}
        (apt / "sources.list").write_text(_ubuntu_sources(release["VERSION_CODENAME"]))
    apt_get = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]
    building.run(*apt_get, "update")
    packages = ["python3-dev", "libstdc++6"]
    building.run(*apt_get, "install", "--download-only", "--no-install-recommends", "--yes", *packages)
    for package in (apt / "cache" / "archives").glob("*.deb"):
        building.run("dpkg-deb", "--extract", package, SYSTEM)
    CACHE.parent.mkdir(parents=True)
    CACHE.write_text("1024K\n")
    done.touch()


def _ubuntu_sources(codename: str) -> str:
    options = "[arch=arm64 signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg]"
    suites = (codename, f"{codename}-updates", f"{codename}-security")
    return "".join(f"deb {options} http://ports.ubuntu.com/ubuntu-ports {suite} main universe\n" for suite in suites)


def _write_python() -> None:
    """A script that runs Python for AArch64 under qemu, and has it take this script for itself: tests start Python."""
    path = os.pathsep.join(
        map(str, [FOLDER / "startup", *map(_packages, ("installed", "tests", "tensorflow")), HELPERS])
    )
    script = f"""#!/bin/sh
PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{path}" exec qemu-aarch64 -L {SYSTEM} {SYSTEM}/usr/bin/python3 "$@"
"""
    PYTHON.write_text(script)
    PYTHON.chmod(0o755)
    (FOLDER / "startup").mkdir(exist_ok=True)
    (FOLDER / "startup" / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(PYTHON)!r}\n")


def _packages(name: str) -> Path:
    return FOLDER / f"packages-{name}"


def _install_packages(name: str, *requirements: str) -> None:
    """Installs packages from PyPI for that Python, unless these are there."""
    folder = _packages(name)
    done = folder / ".done"
    if done.exists() and done.read_text() == "\n".join(requirements):
        return
    shutil.rmtree(folder, ignore_errors=True)
    version = building.run(PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37))]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", folder]
    options = [f"--platform={platform}" for platform in platforms]
    options += ["--only-binary=:all:", f"--python-version={version}"]
    building.run(*pip, *options, *requirements)
    done.write_text("\n".join(requirements))


def _same_version(*names: str) -> list[str]:
    """Requirements of the versions that are installed here."""
    return [f"{name}=={metadata.version(name)}" for name in names]


def build(name: str, settings: dict[str, object]) -> Path:
    """Builds tfops with CMake, and puts it into a folder that Python can import it from."""
    folder, installed = FOLDER / f"build-{name}", _packages(name)
    settings = {
        "CMAKE_INSTALL_PREFIX": installed,
        "SKBUILD_PROJECT_VERSION": metadata.version("tfops"),
        "TFOPS_CUDA": "OFF",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        **settings,
    }
    building.build(ROOT, folder, *(f"-D{key}={value}" for key, value in settings.items()))
    shutil.rmtree(installed, ignore_errors=True)
    for package in (ROOT / "tfops", ROOT / "csrc" / "python" / "tfops_kernels"):
        shutil.copytree(package, installed / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    building.run(building.tool("cmake"), "--install", folder)
    return installed


def prepare(with_tensorflow: bool) -> None:
    """Python, the packages that tests need, and tfops, all for AArch64."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    _install_system()
    _write_python()
    _install_packages("tests", *_same_version("numpy", "ml_dtypes", "pytest"))
    if with_tensorflow:
        _install_packages("tensorflow", f"tensorflow=={_tensorflow_version()}")
    settings = {
        "CMAKE_TOOLCHAIN_FILE": TOOLCHAIN,
        # CMake is to ask that Python for its headers. The script emulates by itself.
        "CMAKE_POLICY_DEFAULT_CMP0190": "NEW",
        "CMAKE_CROSSCOMPILING_EMULATOR": shutil.which("env"),
        "Python_EXECUTABLE": PYTHON,
        # Debian's pyconfig.h is there, by a name that the compiler's own folders complete where Python is the system's.
        "CMAKE_CXX_FLAGS": f"-idirafter {SYSTEM}/usr/include",
        "TFOPS_TENSORFLOW": "ON" if with_tensorflow else "OFF",
    }
    build("installed", settings)


def _tensorflow_version() -> str:
    return metadata.version(metadata.packages_distributions()["tensorflow"][0])


def _emulate(*arguments: object, **environment: str) -> None:
    # A first processor of the kind: one with more would hide what asks for too much.
    settings = {"QEMU_CPU": "cortex-a57", "PYTHONSAFEPATH": "1", **environment}
    subprocess.run([PYTHON, *map(str, arguments)], env=os.environ | settings, cwd=ROOT, check=True)


def _run_tests(folder: str, names: list[str], *options: str) -> None:
    _emulate("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *(TESTS / folder / name for name in names))


def check_kernels(pytest_arguments: list[str]) -> None:
    _run_tests("kernels", KERNEL_TESTS, *pytest_arguments)  # those of csrc/simt skip: there is no pybind11


def check_statistics(pytest_arguments: list[str]) -> None:
    """Compares with x86: the build that is a twin of this, and the levels that are installed here."""
    twin = build("twin", {**TWIN, "TFOPS_TENSORFLOW": "OFF"})
    _emulate("-m", "tfops_testing.kernel_bits", FOLDER / "neon.json")
    neon = json.loads((FOLDER / "neon.json").read_text())
    neon = {name: bits for name, bits in neon.items() if not re.search(OF_THE_C_LIBRARY, name)}
    _compare(neon, _bits_here("twin", PYTHONPATH=f"{twin}:{HELPERS}"), "those of x86 with such vectors", list(neon))
    columns = list(filter(kernel_bits.is_channels_last, neon))
    for level in filter(_runs_here, ("x86-64-v3", "x86-64-v4")):
        bits = _bits_here(level, PYTHONPATH=str(HELPERS), TFOPS_CPU=level)
        _compare(neon, bits, f"those of {level}, channels last", columns)


def _runs_here(level: str) -> bool:
    """Whether the tfops that is installed has these kernels, and this machine runs them."""
    program = "import tfops_kernels; print(tfops_kernels.build_info()['cpu_instruction_set'])"
    return run_python("-c", program, TFOPS_CPU=level).stdout.strip() == level


def _bits_here(name: str, **environment: str) -> dict[str, str]:
    file = FOLDER / f"{name}.json"
    command = [sys.executable, "-m", "tfops_testing.kernel_bits", file]
    subprocess.run(command, env=os.environ | environment | {"PYTHONSAFEPATH": "1"}, cwd=FOLDER, check=True)
    return json.loads(file.read_text())


def _compare(got: dict[str, str], want: dict[str, str], whose: str, names: list[str]) -> None:
    different = [name for name in names if got[name] != want[name]]
    if different:
        print("", *different[:40], sep="\n  ")
        raise AssertionError(f"{len(different)} of {len(names)} results are not bit for bit {whose}")
    print(f"  {len(names)} results are bit for bit {whose}", flush=True)


def check_tensorflow(pytest_arguments: list[str]) -> None:
    _emulate("-m", "tfops.info")
    _emulate("-m", "tfops.gradcheck", "--layout", "NHWC", "--mode", "training", "inference")
    _run_tests("ops", OPS_TESTS, "--every=20", *pytest_arguments)


CHECKS = {"kernels": check_kernels, "statistics": check_statistics, "tensorflow": check_tensorflow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=CHECKS)
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="more arguments of the tests")
    arguments = parser.parse_args()
    if missing := missing_tools():
        raise SystemExit(f"this needs what Debian has in {' and '.join(missing)}")
    names = [arguments.only] if arguments.only else list(CHECKS)
    prepare(with_tensorflow="tensorflow" in names)
    for name in names:
        start = time.monotonic()
        CHECKS[name](arguments.pytest)
        print(f"{name}: passed, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
