"""Which TensorFlow a build is for: the one beside Python, the release that was asked for, or all in a folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tfops_testing import building
from tfops_testing.paths import ROOT

pytest.importorskip("pybind11")
pytestmark = pytest.mark.source_tree

VERSION_HEADER = "tensorflow/include/tensorflow/core/public/version.h"
FFI_HEADER = "tensorflow/include/xla/ffi/api/ffi.h"
XLA_INCLUDES = [f"tensorflow/include/external/{name}/here" for name in ("highwayhash", "farmhash_archive/src")]
LIBRARIES = ("tensorflow/libtensorflow_framework.so.2", "tensorflow/libtensorflow_cc.so.2")


def _package(folder: Path, version: str, name: str = "tensorflow_cpu", ffi: bool = True) -> Path:
    """A package of TensorFlow without a word in it, as pip leaves it: in `folder`/tensorflow."""
    information = f"{name}-{version}.dist-info"
    files = [VERSION_HEADER, *LIBRARIES, *([FFI_HEADER, *XLA_INCLUDES] if ffi else [])]
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / information).mkdir()
    (folder / information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / information / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return folder / "tensorflow"


def _configure(folder: Path, **definitions: str | Path) -> dict[str, str]:
    """What CMake writes into _build.py, and into build.ninja. Raises AssertionError with its message if it fails."""
    said = building.configure(folder / "build", TFOPS_CUDA="OFF", TFOPS_NATIVE="ON", **definitions)
    built: dict[str, str] = {"said": said}
    exec((folder / "build" / "_build.py").read_text(), built)
    built["modules"] = sorted(set(re.findall(r"_tfops_\w+-[\d.]+\.so", (folder / "build" / "build.ninja").read_text())))
    return built


def test_ops_are_built_for_every_package_in_a_folder(tmp_path):
    packages = tmp_path / "packages"
    _package(packages / "one", "2.18.1", ffi=False)
    _package(packages / "two", "2.21.3")
    _package(packages / "three", "2.22.0.dev20260101", "tf_nightly")
    built = _configure(tmp_path, TFOPS_TENSORFLOW_PACKAGES=packages)
    assert sorted(built["TENSORFLOW"].split()) == ["2.18.1", "2.21.3", "2.22.0.dev20260101"]
    ops = [f"_tfops_ops-{release}.so" for release in ("2.18", "2.21", "2.22")]
    xla = [f"_tfops_xla-{release}.so" for release in ("2.21", "2.22")]
    assert built["modules"] == ops + xla


def test_xla_kernels_can_be_left_out(tmp_path):
    _package(tmp_path / "packages" / "one", "2.21.3")
    built = _configure(tmp_path, TFOPS_TENSORFLOW_PACKAGES=tmp_path / "packages", TFOPS_XLA="OFF")
    assert built["modules"] == ["_tfops_ops-2.21.so"]


def _interface(include: Path, minor: int) -> None:
    """Headers of XLA's interface for custom calls, of version 0.<minor>, without another word in them."""
    folder = include / "xla" / "ffi" / "api"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ffi.h").touch()
    (folder / "c_api.h").write_text(f"#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR {minor}\n")


def test_handlers_for_jax_take_the_headers_of_the_least_version(tmp_path):
    """XLA takes what was built with headers that are older than its own. Here a later TensorFlow has the older ones."""
    packages = tmp_path / "packages"
    for name, version, minor in (("one", "2.18.1", None), ("two", "2.20.0", 1), ("three", "2.21.0", 0)):
        package = _package(packages / name, version, ffi=minor is not None)
        if minor is not None:
            _interface(package / "include", minor)
    said = _configure(tmp_path, TFOPS_TENSORFLOW_PACKAGES=packages, TFOPS_JAX="ON")["said"]
    headers = f"version 0.0 of XLA's interface, with the headers in {packages}/three/tensorflow/include"
    assert f"Handlers for JAX: {headers}\n" in said
    assert "libtfops_jax.so" in (tmp_path / "build" / "build.ninja").read_text()
    _configure(tmp_path, TFOPS_TENSORFLOW_PACKAGES=packages, TFOPS_JAX="OFF")
    assert "libtfops_jax.so" not in (tmp_path / "build" / "build.ninja").read_text()


@pytest.mark.parametrize("has_tensorflow", [False, True], ids=["alone", "beside TensorFlow"])
def test_handlers_for_jax_take_the_headers_of_an_older_jaxlib(tmp_path, has_tensorflow):
    """Else advice to build tfops beside it, where TensorFlow is newer, would lead nowhere."""
    pytest.importorskip("jaxlib")
    settings = {"TFOPS_TENSORFLOW": "OFF"}
    if has_tensorflow:
        _interface(_package(tmp_path / "packages" / "one", "2.21.3") / "include", 1000)
        settings = {"TFOPS_TENSORFLOW_PACKAGES": tmp_path / "packages"}
    said = _configure(tmp_path, TFOPS_JAX="ON", **settings)["said"]
    assert re.search("Handlers for JAX: version .* with the headers in .*/jaxlib/include\n", said)


@pytest.mark.parametrize("minors", [(9, 10), (10, 9), (9, None), (None, 9), (9, 9)], ids=str)
def test_versions_of_headers_are_numbers(tmp_path, minors):
    """Those of two jaxlibs, in folders that differ on some systems; where one has no version, the other's are taken."""
    folders = [tmp_path / name for name in ("pure", "platform")]
    for folder, minor in zip(folders, minors, strict=True):
        _interface(folder / "jaxlib" / "include", minor or 0)
        if minor is None:
            (folder / "jaxlib/include/xla/ffi/api/c_api.h").write_text("")
    definitions = ["-DTFOPS_JAX=ON", f"-DPython_SITELIB={folders[0]}", f"-DPython_SITEARCH={folders[1]}"]
    said = building.run(building.tool("cmake"), *definitions, "-P", ROOT / "cmake" / "Jax.cmake")
    want = folders[minors.index(9)] / "jaxlib" / "include"
    assert f"Handlers for JAX: version 0.9 of XLA's interface, with the headers in {want}\n" in said


def test_default_is_the_package_beside_python(tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    assert _configure(tmp_path)["TENSORFLOW"] == tensorflow.__version__


def test_ops_can_be_left_out(tmp_path):
    built = _configure(tmp_path, TFOPS_TENSORFLOW="OFF", TFOPS_TENSORFLOW_PACKAGES=tmp_path / "nowhere")
    assert (built["TENSORFLOW"], built["modules"]) == ("", [])


@pytest.mark.parametrize(
    ("versions", "settings", "message"),
    [
        (["2.17.1"], {}, "tfops needs TensorFlow 2.18 or later, but .*packages/0/tensorflow holds version '2.17.1'"),
        (
            ["2.20.0"],
            {"TFOPS_TENSORFLOW": "2.21"},
            "TFOPS_TENSORFLOW=2.21, but .*/0/tensorflow holds TensorFlow 2.20.0",
        ),
        (["2.20.0"], {"TFOPS_TENSORFLOW": "new"}, "must be ON, OFF or a release such as 2.21, but it is 'new'"),
        (["2.20.0"], {"TFOPS_JAX": "new"}, "TFOPS_JAX must be AUTO, ON or OFF, but it is 'new'"),
        (["2.20.0", "2.20.1"], {}, "TFOPS_TENSORFLOW_PACKAGES='.*packages' holds TensorFlow 2.20 twice"),
        (
            [],
            {},
            "there is no TensorFlow beside .* or in TFOPS_TENSORFLOW_PACKAGES='.*packages': install tensorflow-cpu or",
        ),
    ],
    ids=["too old", "another", "no release", "JAX", "twice", "none"],
)
def test_wrong_settings_are_named(tmp_path, versions, settings, message):
    packages = tmp_path / "packages"
    packages.mkdir()
    for i, version in enumerate(versions):
        _package(packages / str(i), version)
    with pytest.raises(AssertionError) as error:
        _configure(tmp_path, TFOPS_TENSORFLOW_PACKAGES=packages, **settings)
    assert re.search(message, " ".join(str(error.value).split())), error.value


def test_package_without_metadata_is_refused(tmp_path):
    package = _package(tmp_path / "packages" / "one", "2.21.0")
    for file in package.parent.glob("*.dist-info/*"):
        file.unlink()
    with pytest.raises(AssertionError, match=r"holds\s+version ''"):
        _configure(tmp_path, TFOPS_TENSORFLOW_PACKAGES=tmp_path / "packages")


def test_folder_of_two_packages_is_refused(tmp_path):
    """Which one's files are there, nothing tells."""
    _package(tmp_path / "packages" / "one", "2.21.0")
    _package(tmp_path / "packages" / "one", "2.20.0", "tensorflow")
    with pytest.raises(AssertionError) as error:
        _configure(tmp_path, TFOPS_TENSORFLOW_PACKAGES=tmp_path / "packages")
    said = " ".join(str(error.value).split())
    assert "is of tensorflow 2.20.0 and tensorflow_cpu 2.21.0: uninstall them all" in said


def test_folder_that_is_left_of_a_package_is_none(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    packages = building.load(ROOT / "cmake" / "tensorflow_packages.py")
    sys.path.insert(0, str(tmp_path))
    try:
        assert packages.installed() != tmp_path / "tensorflow"
    finally:
        sys.path.remove(str(tmp_path))


def test_oldest_release_is_the_same_everywhere():
    from tfops import _library

    assert next(iter(building.load(ROOT / "cmake" / "tensorflow_packages.py").RELEASES)) == _library.OLDEST
    assert f"VERSION_LESS {_library.OLDEST})" in (ROOT / "cmake" / "TensorFlow.cmake").read_text()


@pytest.mark.parametrize(
    ("settings", "release"),
    [
        ({}, "newest"),
        ({"cmake.define.TFOPS_TENSORFLOW": "2.19"}, "2.19"),
        ({"cmake.define.TFOPS_TENSORFLOW": "OFF"}, None),
        ({"cmake.define.TFOPS_TENSORFLOW_PACKAGES": "build/tensorflow"}, None),
    ],
    ids=["newest", "asked for", "off", "folder"],
)
def test_isolated_build_gets_the_release_that_is_asked_for(settings, release):
    pytest.importorskip("scikit_build_core")
    backend = building.load(ROOT / "cmake" / "build_backend.py")
    if release == "newest":
        release = [*backend.tensorflow_packages.RELEASES][-1]
    wanted = [] if release is None else [f"{backend.tensorflow_packages.name()}=={release}.*"]
    assert backend.tensorflow_requirements(settings) == wanted


def test_what_is_fetched_is_found(tmp_path, monkeypatch):
    """Headers, libraries and metadata of a wheel, and nothing else; what is there is not fetched again."""
    packages = building.load(ROOT / "cmake" / "tensorflow_packages.py")
    calls = []

    def download(command, check):
        calls.append(command)
        (to,) = [word.partition("=")[2] for word in command if word.startswith("--dest=")]
        package = _package(tmp_path / "wheel", "2.20.9")
        for other in ("__init__.py", "large.so"):
            (package / other).touch()
        shutil.make_archive(f"{to}/tensorflow_cpu", "zip", tmp_path / "wheel")
        Path(f"{to}/tensorflow_cpu.zip").rename(f"{to}/tensorflow_cpu.whl")
        shutil.rmtree(tmp_path / "wheel")

    monkeypatch.setattr(packages.subprocess, "run", download)
    for _ in range(2):
        packages.fetch("2.20", tmp_path / "2.20")
    assert len(calls) == 1
    assert calls[0][-1] == f"{packages.name()}==2.20.*"
    assert packages.version(tmp_path / "2.20" / "tensorflow") == "2.20.9"
    got = {str(file.relative_to(tmp_path / "2.20")) for file in (tmp_path / "2.20").rglob("*") if file.is_file()}
    information = {f"tensorflow_cpu-2.20.9.dist-info/{name}" for name in ("METADATA", "RECORD")}
    assert got == {VERSION_HEADER, FFI_HEADER, *XLA_INCLUDES, *LIBRARIES, *information}


@pytest.mark.parametrize("arguments", [[], ["fetch"], ["search"]], ids=["nothing", "no folder", "another command"])
def test_wrong_commands_are_refused(arguments):
    """Without a folder, gigabytes would go to wherever one is."""
    command = [sys.executable, ROOT / "cmake" / "tensorflow_packages.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "error: " in run.stderr
