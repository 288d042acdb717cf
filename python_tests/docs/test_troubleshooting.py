"""Every error message in the sources is on the page docs/troubleshooting.md, with <placeholders> for what varies.

A message is a list of its literal parts: those of f-strings in Python, of sums and absl::StrCat in C++, of strings with
${variables} in CMake.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfops_testing.paths import ROOT

pytestmark = pytest.mark.source_tree

GAP = None  # in a list of parts: what is not literal
STRING = r'"(?:[^"\\]|\\.)*"'
PYTHON = [path for folder in ("tfops", "csrc/python/tfops_kernels", "models") for path in (ROOT / folder).rglob("*.py")]
# Without csrc/fuzz, csrc/simt and csrc/tests, which no wheel holds.
FOLDERS = ("batch_norm", "python", "tensorflow", "xla")
CPP = [path for folder in FOLDERS for path in (ROOT / "csrc" / folder).rglob("*.*")]
CMAKE = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake")]

# Calls that tell a user something, beside `raise`: argparse's, those of `warnings`, and those of tfops.keras.convert.
TELLING = {"error", "warn", "_warn", "_refuse", "without"}
# In C++, what makes a status or an exception.
STATUS = r"StatusCode::k(?!Ok)\w+|InvalidArgument\(|absl::\w+Error\(|ffi::Error\b|\brefuse\(|ToStatus\(|\bthrow\b"


def _python_parts(node: ast.expr) -> list[str | None]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part for value in node.values for part in _python_parts(value)]
    if isinstance(node, ast.BinOp):
        return _python_parts(node.left) + _python_parts(node.right)
    return [GAP]


def _python_messages(source: str) -> Iterator[list[str | None]]:
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if isinstance(node, ast.Raise) or name in TELLING:
            yield from map(_python_parts, call.args)


def _cpp_messages(source: str) -> Iterator[list[str | None]]:
    source = re.sub(r"^ *#.*$|//.*$", "", source, flags=re.MULTILINE)
    for statement in re.findall(rf'(?:{STRING}|[^;"])+', source):
        if status := re.search(STATUS, statement):
            joined = re.sub(r'"\s+"', "", statement[status.start() :])  # strings side by side are one
            yield [part for string in re.findall(STRING, joined) for part in (string[1:-1], GAP)]


def _cmake_messages(source: str) -> Iterator[list[str | None]]:
    for strings in re.findall(rf"FATAL_ERROR((?:\s*{STRING})+)", source):
        text = "".join(string[1:-1] for string in re.findall(STRING, strings))
        yield [part for literal in re.split(r"\$\{\w+\}", text) for part in (literal, GAP)]


def _pattern(parts: list[str | None]) -> str:
    """A regular expression for a message on the page; "" if it has no words of its own: an error passed on."""
    literals = [" ".join(part.split()) if part.strip() else "" for part in parts if part is not GAP]
    while literals and not re.search("[A-Za-z]{2}", literals[-1]):
        literals.pop()
    while literals and not re.search("[A-Za-z]{2}", literals[0]):
        literals.pop(0)
    return r" ?<[^|]{,60}?> ?".join(map(re.escape, literals)) if " " in " ".join(literals) else ""


def messages() -> Iterator[tuple[Path, str]]:
    """The file and the pattern of each message."""
    for paths, find in ((PYTHON, _python_messages), (CPP, _cpp_messages), (CMAKE, _cmake_messages)):
        for path in paths:
            yield from ((path, pattern) for parts in find(path.read_text()) if (pattern := _pattern(parts)))


def test_every_message_is_on_the_page():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    page = " ".join(re.sub(r"\*\*`|`\*\*|`", "", text).split())
    found = list(messages())
    assert {path.suffix for path, _ in found} == {".py", ".cc", ".cu", ".h", ".txt", ".cmake"}
    missing = [f"{path.relative_to(ROOT)}: {pattern}" for path, pattern in found if not re.search(pattern, page)]
    assert not missing, "\n".join(missing)
