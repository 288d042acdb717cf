"""The lessons in models/ as notebooks: `make notebooks` converts and executes them, and tests do so with little data.

A lesson is a script in jupytext's percent format; its notebook has the same text, and what the execution printed and
drew. Ids and metadata are the same whenever and wherever it is made.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from .models_data import environment
from .paths import MODELS

LESSONS = sorted(path for path in MODELS.glob("*.py") if path.name != "train.py")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def convert(lesson: Path) -> nbformat.NotebookNode:
    """The lesson as a notebook, without outputs."""
    notebook = jupytext.read(lesson, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{lesson.stem}-{number}"
        cell.metadata.clear()
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, **variables: str) -> None:
    """Executes the notebook in a folder, with environment variables; its outputs are added to it.

    Raises nbclient.exceptions.CellExecutionError, which quotes the code that failed.
    """
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment(**variables))
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel has added its version


def main(names: list[str]) -> int:
    """Writes the notebooks of the lessons named, or of all."""
    known = {path.stem: path for path in LESSONS}
    if unknown := set(names) - set(known):
        print(f"no lesson {', '.join(sorted(unknown))}, only {', '.join(known)}", file=sys.stderr)
        return 2
    for name in names or known:
        start = time.perf_counter()
        notebook = convert(known[name])
        execute(notebook, MODELS, TF_CPP_MIN_LOG_LEVEL="3")
        path = known[name].with_suffix(".ipynb")
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
