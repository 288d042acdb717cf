"""What is installed: its libraries, what they need, the import checks, and what it says of itself."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from packaging.requirements import Requirement

import tfops
import tfops_kernels
from tfops import _library
from tfops.keras._batch_normalization import check_backend
from tfops_testing.fresh_process import run_python

SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def _library_file(name: str) -> Path:
    (path,) = Path(tfops_kernels.__file__).parent.parent.glob(name)
    return path


def _dynamic(path: Path) -> tuple[set[str], str]:
    """The libraries that an ELF file needs, and its RUNPATH."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("needs readelf")
    lines = subprocess.run([readelf, "-dW", path], capture_output=True, text=True, check=True).stdout.splitlines()
    values = {kind: [line.split("[")[1].split("]")[0] for line in lines if f"({kind})" in line] for kind in _KINDS}
    return set(values["NEEDED"]), "".join(values["RUNPATH"] + values["RPATH"])


_KINDS = ("NEEDED", "RUNPATH", "RPATH")


def test_libraries_need_no_driver_and_vendor_nothing():
    needed, path = _dynamic(_library_file("tfops_kernels/libtfops_kernels.so"))
    assert needed <= SYSTEM
    assert path == ""
    needed, path = _dynamic(_library_file("tfops_kernels/_kernels.*.so"))
    assert needed - SYSTEM == {"libtfops_kernels.so"}
    assert path == "$ORIGIN"
    for file in Path(tfops_kernels.__file__).parent.glob("libtfops_jax.so"):
        needed, path = _dynamic(file)
        assert needed - SYSTEM == {"libtfops_kernels.so"}
        assert path == "$ORIGIN"
    # TensorFlow has loaded its own two; what is loaded is found by name.
    tensorflow = {"ops": {"libtensorflow_framework.so.2"}}
    tensorflow["xla"] = {*tensorflow["ops"], "libtensorflow_cc.so.2"}
    for file in _tensorflow_libraries():
        needed, path = _dynamic(_library_file(f"tfops/{file}"))
        assert needed - SYSTEM == {"libtfops_kernels.so", *tensorflow[re.match(r"_tfops_(\w+)-", file)[1]]}, file
        assert path == "$ORIGIN/../tfops_kernels", file


def _releases() -> list[str]:
    """Those that this is built for, the oldest first."""
    return [_library._release(version) for version in tfops.build_info()["tensorflow"].split()]


def _tensorflow_libraries() -> set[str]:
    """Those for each release that this is built for. XLA's interface is there from 2.20 on."""
    releases = set(_releases())
    with_xla = {release for release in releases if int(release.split(".")[1]) >= 20}
    return {f"_tfops_ops-{release}.so" for release in releases} | {f"_tfops_xla-{release}.so" for release in with_xla}


def test_package_holds_what_it_should():
    files = {str(file) for file in importlib.metadata.files("tfops") if "__pycache__" not in str(file)}
    information = f"tfops-{tfops.__version__}.dist-info/"
    libraries = {file for file in files if ".so" in file}
    of_tensorflow = {Path(file).name for file in libraries if file.startswith("tfops/")}
    assert of_tensorflow == _tensorflow_libraries()
    others = {Path(file).name.split(".")[0] for file in libraries if not file.startswith("tfops/")}
    with_xla = any("_xla-" in file for file in of_tensorflow)
    assert others - {"libtfops_jax"} == {"libtfops_kernels", "_kernels"}
    assert "libtfops_jax" in others or not with_xla
    # Python, its types, and nothing else: no headers, no sources, no tests.
    others = {file for file in files - libraries if not file.startswith(information)}
    assert {Path(file).name for file in others if not file.endswith((".py", ".pyi"))} == {"py.typed"}
    assert {file.split("/")[0] for file in others} == {"tfops", "tfops_kernels"}
    for file in ("py.typed", "_build.py", "_build.pyi", "_kernels.pyi"):
        assert f"tfops_kernels/{file}" in files
    assert "tfops/py.typed" in files
    written = {file.removeprefix(information) for file in files if file.startswith(information)}
    by_installers = {"INSTALLER", "REQUESTED", "direct_url.json"}
    assert written - by_installers == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}


def test_libraries_do_not_tell_where_they_were_built():
    """So they are the same wherever that is, too: make reproducible."""
    for name in ("tfops_kernels/*.so", "tfops/*.so"):
        for path in Path(tfops_kernels.__file__).parent.parent.glob(name):
            strings = re.findall(rb"[\x20-\x7e]{6,}", path.read_bytes())
            places = [s for s in strings if re.search(rb"/(tmp|home|root|build|site-packages)/", s)]
            assert not places, (path, places[:5])


def test_wheel_needs_no_more_than_an_old_glibc():
    """`auditwheel show` finds nothing that an older system does not have, but TensorFlow's own libraries.

    Older than glibc 2.34, or than the one that it was built with, whose headers may ask for new symbols.
    """
    wheels = list(Path("build/wheel").glob("*.whl"))
    auditwheel = Path(sys.executable).with_name("auditwheel")
    if not wheels or not auditwheel.exists():
        pytest.skip("needs auditwheel, and a wheel in build/wheel: make wheel")
    (wheel,) = wheels
    assert wheel.stat().st_size < 20e6
    if platform.machine() != "x86_64":
        return
    run = subprocess.run([auditwheel, "show", wheel], capture_output=True, text=True, check=True)
    shown = " ".join(run.stdout.split())
    libraries = set(re.findall(r"lib\S+\.so[.\d]*", shown))
    assert libraries - {"libtensorflow_framework.so.2", "libtensorflow_cc.so.2", "libtfops_kernels.so"} <= SYSTEM
    policy = re.search(r"manylinux_2_(\d+)_x86_64", shown)
    assert policy, shown
    assert int(policy[1]) <= max(34, int(platform.libc_ver()[1].split(".")[1]))


def test_requirements_are_those_of_the_project():
    """TensorFlow is one of several packages, which the user has or asks for: pip must not choose one."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("tfops")]
    assert [each.name for each in requirements if not each.marker] == ["numpy"]
    extras = {}
    for extra in ("cpu", "gpu"):
        wanted = [each for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
        extras[extra] = {each.name + "".join(f"[{name}]" for name in each.extras) for each in wanted}
    cpu = "tensorflow-cpu" if platform.machine() == "x86_64" else "tensorflow"
    assert extras == {"cpu": {cpu}, "gpu": {"tensorflow[and-cuda]"}}
    assert importlib.metadata.metadata("tfops")["Requires-Python"] in (">=3.10,<3.14", "<3.14,>=3.10")


@pytest.mark.parametrize("running", ["2.17.0", "2.<next>.0-rc1", "3.0.0"])
def test_another_release_is_refused(running):
    releases = _releases()
    running = running.replace("<next>", str(int(releases[-1].split(".")[1]) + 1))
    run = run_python("-c", f"import tensorflow as tf; tf.__version__ = {running!r}; import tfops")
    assert run.returncode != 0
    message = run.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    assert f"has ops for TensorFlow {', '.join(releases)}, but TensorFlow {running} (" in message
    package = importlib.metadata.packages_distributions()["tensorflow"][0].replace("_", "-")
    assert f"({package}) is running" in message
    assert re.search(rf"pip uninstall {package}, then pip install tensorflow(-cpu)?~={releases[-1]}\.0 or", message)
    assert "pip install --no-build-isolation" in message


@pytest.mark.parametrize("running", ["2.18.0", "2.21.9", "2.21.0-rc1"])
def test_other_patch_releases_are_fine(running):
    _library.check_release(running, "2.18.1 2.21.0")


def test_library_is_that_of_the_release():
    assert _library.path("ops", "2.19.7").name == "_tfops_ops-2.19.so"
    assert _library.path("xla", "2.100.0-rc1").name == "_tfops_xla-2.100.so"


def test_missing_tensorflow_is_explained():
    run = run_python("-c", "import sys; sys.modules['tensorflow'] = None; import tfops")
    message = run.stderr.splitlines()[-1]
    assert message.startswith("ImportError: tfops needs TensorFlow, and there is none")
    newest = _releases()[-1]
    assert re.search(rf"pip install tensorflow(-cpu)?~={newest}\.0, or 'tensorflow\[and-cuda\]~={newest}\.0'", message)


def test_folder_that_is_left_of_tensorflow_is_none():
    """Python takes it for a package, in which nothing is."""
    empty = "import sys, types; sys.modules['tensorflow'] = types.ModuleType('tensorflow')"
    run = run_python("-c", f"{empty}; import tfops")
    assert "ImportError: tfops needs TensorFlow, and there is none" in run.stderr


def test_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    library = tmp_path / "_tfops_ops-2.0.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(_library, "path", lambda kind, version: library)
    built = tfops.build_info()["tensorflow"]
    message = rf"{library.name} does not load in TensorFlow {tf.__version__}, and was built for one of {built}\. Build"
    with pytest.raises(ImportError, match=message):
        _library.load(built)


def test_what_tensorflow_cannot_import_is_named():
    run = run_python("-c", "import sys; sys.modules['tensorflow.python'] = None; import tfops")
    assert "No module named" in run.stderr or "tensorflow.python" in run.stderr.splitlines()[-1]
    assert "there is none in this environment" not in run.stderr


def test_build_without_tensorflow_says_so():
    with pytest.raises(ImportError, match="TFOPS_TENSORFLOW=OFF"):
        _library.load(built="")


def test_source_tree_in_the_way_is_explained(monkeypatch):
    monkeypatch.setattr(_library, "path", lambda kind, version: Path("nowhere.so"))
    with pytest.raises(ImportError, match=r"nowhere\.so does not exist.* PYTHONSAFEPATH=1"):
        _library.load(built=tf.__version__)


def test_kernels_do_without_tensorflow():
    run = run_python(
        "-c",
        "import sys; sys.modules['tensorflow'] = None\n"
        "import numpy as np, tfops_kernels\n"
        "y = tfops_kernels.forward(np.eye(3, dtype=np.float32), *np.ones((2, 3), np.float32)).y\n"
        "tfops_kernels.build_info()\n"
        "print(y.shape, [m for m in sys.modules if m.startswith(('tensorflow.', 'keras'))])",
    )
    assert run.stdout.strip() == "(3, 3) []", run.stderr


def test_another_backend_is_refused():
    with pytest.raises(
        ImportError, match="the backend is 'jax': set the environment variable KERAS_BACKEND=tensorflow"
    ):
        check_backend("jax")


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_is_refused_at_import(backend):
    """Whether it is installed, or not: Keras itself cannot be imported then."""
    run = run_python("-c", "import tfops.keras", KERAS_BACKEND=backend)
    message = "ImportError: tfops needs Keras' TensorFlow backend, but .*KERAS_BACKEND=tensorflow before Keras is first"
    assert re.search(message, run.stderr), run.stderr


def test_build_info_is_complete():
    info = tfops.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == tfops.__version__ == importlib.metadata.version("tfops")
    assert _library._release(tf.__version__) in _releases()
    assert info["tensorflow_running"] == tf.__version__
    assert info["cpu_instruction_set"] in info["cpu_instruction_sets"].split()
    assert set(info["cpu_instruction_sets"].split()) <= {"x86-64-v2", "x86-64-v3", "x86-64-v4", "neon", "generic"}
    assert len(info["cpu_instruction_sets"].split()) == 1 or not info["native"]
    if not info["cuda"]:
        assert (info["cuda_toolkit"], info["cuda_architectures"], info["cuda_driver_needed"]) == ("", "", "")
    if not info["gpus"]:
        assert info["cuda_problem"]


@pytest.mark.skipif(not tfops.build_info()["cuda"], reason="this build has no CUDA kernels")
def test_build_says_which_driver_it_needs():
    """The first of the toolkit's major version; and where there is no driver, the release too."""
    info = tfops.build_info()
    major = info["cuda_toolkit"].partition(".")[0]
    assert info["cuda_driver_needed"] == f"{major}.0"
    if not info["cuda_driver"]:
        release = {"12": 525, "13": 580}[major]
        assert f"for CUDA {major}.0 or later (release {release} or later), but there is none" in info["cuda_problem"]
    assert f"; the kernels need {major}.0 or later\n" in run_python("-m", "tfops.info").stdout


def test_info_command_names_everything():
    run = run_python("-m", "tfops.info")
    assert run.returncode == 0, run.stderr
    for name in (
        "tfops",
        "Built for",
        "TensorFlow",
        "CPU kernels",
        "CUDA kernels",
        "XLA kernels",
        "CUDA driver",
        "GPU",
    ):
        assert f"\n{name} " in f"\n{run.stdout}"


def test_cpu_level_can_be_forced():
    info = "import tfops_kernels; print(tfops_kernels.build_info()['cpu_instruction_set'])"
    least = tfops.build_info()["cpu_instruction_sets"].split()[0]
    assert run_python("-c", info, TFOPS_CPU=least).stdout.strip() == least


@pytest.mark.parametrize("variable", ["TFOPS_CPU", "TFOPS_CPU_STREAMS"])
def test_unknown_cpu_choice_is_named(variable):
    call = "import numpy as np, tfops_kernels as k; k.forward(np.eye(2), np.ones(2), np.ones(2))"
    run = run_python("-c", call, **{variable: "sse9"})
    assert f"{variable} is 'sse9', but this machine and build have: " in run.stderr
