"""A plugin for pytest-xdist: beside a test that is marked `exclusive`, no other runs.

Each test holds a lock while it runs, with its setup and teardown: an exclusive one alone, the others in common. Before
that it passes a turnstile, and stays in it until it has the lock. So an exclusive test waits for those that run, and no
other test can overtake it. Without xdist tests run one by one, and there is nothing to lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

_FOLDER = pytest.StashKey[tempfile.TemporaryDirectory]()


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, kind)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # children that were forked have the file open, too


class Turns:
    """What a worker adds."""

    def __init__(self, folder: Path):
        self.turnstile, self.room = folder / "turnstile", folder / "room"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        kind = fcntl.LOCK_EX if item.get_closest_marker("exclusive") else fcntl.LOCK_SH
        with contextlib.ExitStack() as stack:
            with _locked(self.turnstile, fcntl.LOCK_EX):
                stack.enter_context(_locked(self.room, kind))
            return (yield)


def pytest_configure(config: pytest.Config) -> None:
    text = "exclusive: needs all cores, or times something, or takes most of the memory: nothing runs beside it"
    config.addinivalue_line("markers", text)
    if worker := getattr(config, "workerinput", None):
        config.pluginmanager.register(Turns(Path(worker["exclusive_folder"])))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Gives each worker the folder of this run's locks."""
    stash = node.config.stash
    if _FOLDER not in stash:
        stash[_FOLDER] = tempfile.TemporaryDirectory(prefix="tfops-tests-")
    node.workerinput["exclusive_folder"] = stash[_FOLDER].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_FOLDER, None):
        folder.cleanup()
