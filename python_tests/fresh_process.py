"""Python in a process of its own: for what one that runs cannot show, or would be in the way of."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` to its end, from a folder without the source tree, which Python would import."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=sys.prefix,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
