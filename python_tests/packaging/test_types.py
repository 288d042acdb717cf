"""The packages are typed, as their py.typed says: in themselves, and for whoever calls them."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tfops_testing.paths import ROOT

pytest.importorskip("mypy", reason="needs mypy")


def _mypy(*arguments: str, module: str = "mypy", cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.source_tree
def test_types_hold():
    """In the configuration of pyproject.toml, which is strict."""
    run = _mypy(cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


def test_stubs_are_those_of_the_modules(tmp_path):
    modules = ("tfops_kernels._kernels", "tfops_kernels._build")
    run = _mypy("--concise", *modules, module="mypy.stubtest", cwd=tmp_path)
    assert not run.stderr
    of_pybind11 = r"metaclass differs$|\.__pybind11_\w+ is not present|\.CudaPlan\.__init__ "  # that has no constructor
    assert not [line for line in run.stdout.splitlines() if not re.search(of_pybind11, line)]


def test_callers_are_checked(tmp_path):
    """Right calls pass, results have types, and each wrong call is reported where it is."""
    code = textwrap.dedent("""\
        from typing import Any

        import numpy as np
        from typing_extensions import assert_type

        import tfops
        import tfops_kernels

        x, c = np.ones((4, 3), np.float32), np.ones(3, np.float32)
        y, mean, variance = tfops.fused_batch_norm(x, c, c, axis=-1, activation="relu", residual=x)
        y, mean, variance = tfops.reference.fused_batch_norm(x, c, c, is_training=True)
        layer = tfops.keras.BatchNormalization(1, momentum=0.9, activation="silu", name="norm", dtype="float16")
        y = layer(x, training=True, residual=x)
        model = tfops.keras.convert(tfops.keras.convert(layer), to="keras", verbose=0)
        assert_type(layer, tfops.keras.BatchNormalization)
        assert_type(layer.get_config(), dict[str, Any])
        assert_type(tfops.__version__, str)
        assert_type(tfops.build_info(), dict[str, Any])
        assert_type(tfops_kernels.forward(x, c, c), tfops_kernels.Forward)
        assert_type(tfops_kernels.backward(x, x, c, c, c, c), tfops_kernels.Backward)
        assert_type(tfops_kernels.cuda_plan([4, 3], l2_bytes=1).threads, int)

        tfops.fused_batch_norm(x, c)  # call-arg
        tfops.fused_batch_norm(x, c, c, activation=6)  # arg-type
        tfops.fused_batch_norm(x, c, c, shortcut=x)  # call-arg
        tfops.keras.BatchNormalization(momentum="0.9")  # arg-type
        tfops.keras.BatchNormalization(activation=6)  # arg-type
        tfops.keras.convert(layer, to="torch")  # arg-type
        tfops_kernels.forward(x, c, c, epsilon=None)  # arg-type
        tfops_kernels.forward(x, c, c).dx  # attr-defined
    """)
    (tmp_path / "caller.py").write_text(code)
    run = _mypy("--strict", "caller.py", cwd=tmp_path)
    told = re.findall(r"^caller\.py:(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE)
    want = [(str(i), line.split("  # ")[1]) for i, line in enumerate(code.splitlines(), 1) if "  # " in line]
    assert told == want, run.stdout + run.stderr
