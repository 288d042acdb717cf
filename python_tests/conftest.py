"""Settings for all tests: quiet TensorFlow, and no GPU tests where there is no GPU."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import pytest

import tfops_kernels

import simt_runner


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    info = tfops_kernels.build_info()
    if info["gpus"]:
        return
    skip = pytest.mark.skip(reason=f"no GPU: {info['cuda_problem'] or 'the driver lists none'}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def simt() -> simt_runner.Simt:
    """The CUDA kernels on the CPU, built if need be."""
    simt_runner.build()
    return simt_runner.Simt()
