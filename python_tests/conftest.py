"""Settings for all tests: quiet TensorFlow, no GPU tests without a GPU, and none of TensorFlow's without TensorFlow."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import pytest
import simt_runner

import tfops_kernels

# The kernels' own tests run where there is no TensorFlow; the others cannot even be imported there.
_NEEDS_TENSORFLOW = re.compile(r"^(from|import) (tensorflow|keras|tfops)\b", re.MULTILINE)
collect_ignore = []
if importlib.util.find_spec("tensorflow") is None:
    tests = Path(__file__).parent.glob("test_*.py")
    collect_ignore += [path.name for path in tests if _NEEDS_TENSORFLOW.search(path.read_text())]
# The dependency group `models` of pyproject.toml; without it, models/*.py cannot be imported.
if not all(importlib.util.find_spec(name) for name in ("matplotlib", "PIL")):
    collect_ignore += ["test_mnist.py", *(path.name for path in Path(__file__).parent.glob("test_models_*.py"))]

# Beside an installed package alone, without the source tree: what is not about files of the tree.
_HAS_TREE = (Path(__file__).parents[1] / "csrc").exists()
_NEEDS_TREE = re.compile(r'/ "(benchmarks|csrc|models)"|\bROOT\b')
if not _HAS_TREE:
    tests = Path(__file__).parent.glob("test_*.py")
    collect_ignore += [path.name for path in tests if _NEEDS_TREE.search(path.read_text())]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "limits" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="takes minutes and up to 24 GiB: make limits")
        for item in items:
            if item.get_closest_marker("limits"):
                item.add_marker(skip)
    info = tfops_kernels.build_info()
    if info["gpus"]:
        return
    skip = pytest.mark.skip(reason=f"no GPU: {info['cuda_problem'] or 'the driver lists none'}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def simt() -> simt_runner.Simt:
    """The CUDA kernels on the CPU, built if need be. `make sanitize` asks for the variant with sanitizers."""
    if not _HAS_TREE:
        pytest.skip("needs csrc/simt")
    simt_runner.build()
    return simt_runner.Simt(os.environ.get("TFOPS_SIMT_VARIANT", "plain"))
