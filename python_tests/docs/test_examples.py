"""The examples in Markdown files: Python is run, and commands name what exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from itertools import dropwhile
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tfops_testing.models_data import draw_arrays, run_in
from tfops_testing.paths import ROOT

pytestmark = pytest.mark.source_tree

PATTERNS = ("*.md", "docs/**/*.md", "models/*.md", "models/answers/*.md", "benchmarks/README.md", "csrc/README.md")
FILES = sorted({path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern)})
SHELL = ("console", "sh")


def _blocks(file: str, *languages: str) -> list[Token]:
    """The fenced blocks in these languages."""
    tokens = MarkdownIt().parse((ROOT / file).read_text())
    return [token for token in tokens if token.type == "fence" and token.info.strip() in languages]


def _examples(file: str, of_jax: bool) -> list[Token]:
    """The blocks of Python that need JAX, or those that do not."""
    return [block for block in _blocks(file, "python") if ("import jax" in block.content) == of_jax]


def _run(file: str, blocks: list[Token], folder: Path, mnist: Path) -> None:
    """Runs the blocks as one program in an empty folder, whose line numbers are the file's."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.map[0] + 1 - len(lines)) + block.content.splitlines()
    program = folder / f"{Path(file).stem}_md.py"
    program.write_text("\n".join(lines) + "\n")
    run = run_in(folder, program, TFOPS_MNIST=str(mnist), MPLBACKEND="agg")
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mnist.npz of drawn digits."""
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(path, **draw_arrays(1000, 200))
    return path


@pytest.mark.parametrize("file", [file for file in FILES if _examples(file, of_jax=False)])
def test_python_runs(file, mnist, tmp_path):
    """All blocks of a file, but those that need JAX."""
    _run(file, _examples(file, of_jax=False), tmp_path, mnist)


@pytest.mark.parametrize("file", [file for file in FILES if _examples(file, of_jax=True)])
def test_python_with_jax_runs(file, mnist, tmp_path):
    pytest.importorskip("tfops_kernels.jax", exc_type=ImportError)
    _run(file, _examples(file, of_jax=True), tmp_path, mnist)


def _commands(file: str) -> list[list[str]]:
    """The commands in a file's shell blocks, as words, without variables that are set before them."""
    lines = [line for block in _blocks(file, *SHELL) for line in block.content.replace("\\\n", " ").splitlines()]
    commands = [command for line in lines for command in line.removeprefix("$ ").split("&&")]
    words = [shlex.split(command, comments=True) for command in commands]
    return [named for command in words if (named := list(dropwhile(re.compile(r"\w+=").match, command)))]


def _sources(words: list[str]) -> list[Path]:
    """The files that a call of Python runs; with a program of models/, the package behind it too."""
    if words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        assert spec, f"there is no module {words[1]}"
        return [file for folder in spec.submodule_search_locations or [] for file in Path(folder).glob("*.py")] or [
            Path(spec.origin)
        ]
    path = ROOT / words[0]
    assert path.is_file(), f"there is no file {words[0]}"
    return list(path.parent.rglob("*.py"))


@pytest.mark.parametrize("file", [file for file in FILES if _blocks(file, *SHELL)])
def test_commands_name_what_exists(file):
    """Targets of make; modules and programs that Python runs, and their options."""
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for program, *words in _commands(file):
        if program == "make":
            named = {word for word in words if not word.startswith("-") and "=" not in word}
            assert named <= targets, f"make has no target {named - targets}"
        if program in ("python", "python3") and words[:2] != ["-m", "venv"]:
            text = "".join(source.read_text() for source in _sources(words))
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                written = {option, option.replace("--no-", "--", 1)}  # of argparse.BooleanOptionalAction both mean one
                found = any(f'"{each}"' in text for each in written)
                assert found or option == "--help", f"{words[0]} has no option {option}"
