"""The settings of the policy, which chooses CUDA kernels: from a file, and for the length of a block."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tfops_kernels import _kernels


def load_tuning(path: str, kernels: ModuleType = _kernels) -> None:
    """Has the policy estimate with the constants of a file.

    Args:
        path: A JSON file: an object of names and numbers, such as
            `_kernels.policy_settings()["tuning"]` has them. Constants that it lacks stay.
        kernels: The module whose policy it is.

    Raises:
        ValueError: The file cannot be read, or a name or value in it is wrong.
    """
    try:
        with open(path, encoding="utf-8") as file:
            constants = json.load(file)
    except (OSError, ValueError) as problem:
        raise ValueError(f"TFOPS_TUNING names a file that cannot be read as JSON, {path}: {problem}") from None
    numbers = isinstance(constants, dict) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in constants.values()
    )
    if not numbers:
        raise ValueError(f"TFOPS_TUNING must name a JSON file of an object with numbers, but {path} holds {constants}")
    kernels.set_policy_settings(tuning={name: float(value) for name, value in constants.items()})


def load_environment() -> None:
    """Does so with the file that the environment variable TFOPS_TUNING names, if it names one."""
    path = os.environ.get("TFOPS_TUNING")
    if path and _kernels.cuda_build()["cuda"]:
        load_tuning(path)


@contextlib.contextmanager
def settings(kernels: Any = _kernels, **changed: Any) -> Iterator[None]:
    """For the length of a block, and for all threads, changes settings of the policy.

    A workspace belongs to the settings under which its size was asked for.

    Args:
        kernels: The module whose policy it is.
        **changed: tier ("" for the fastest), cluster (the size of clusters, 0 for any), free_multiprocessors (that
            cooperative grids leave to others), and tuning (a dict of constants).

    Yields:
        None.

    Raises:
        ValueError: A setting is wrong.
    """
    before = kernels.policy_settings()
    kernels.set_policy_settings(**changed)
    try:
        yield
    finally:
        kernels.set_policy_settings(**before)
