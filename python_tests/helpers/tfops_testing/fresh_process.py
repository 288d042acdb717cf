"""Python in a process of its own: for what one that runs cannot show, or would be in the way of.

It starts in a folder without the source tree, which Python would import, and can import this package: `-m
tfops_testing.NAME` runs a program of it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .paths import HELPERS


def _call(arguments: tuple[object, ...], environment: dict[str, str]) -> dict[str, object]:
    path = os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, *map(str, arguments)],
        "cwd": sys.prefix,
        "env": {**os.environ, "PYTHONPATH": path, **environment},
        "text": True,
    }


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` to its end."""
    return subprocess.run(**_call(arguments, environment), capture_output=True, timeout=1800, check=False)


def start_python(*arguments: object, **environment: str) -> subprocess.Popen:
    """Starts `python ARGUMENTS`, with pipes for its output and its errors."""
    return subprocess.Popen(**_call(arguments, environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
