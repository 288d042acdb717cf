"""What contributors go by is true: CONTRIBUTING.md, the hooks and forms, the citation, and the subjects of commits."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tfops_testing.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

pytestmark = pytest.mark.source_tree

SUBJECT = 72  # characters
CONTRIBUTING = "CONTRIBUTING.md"
HOOKS = ".pre-commit-config.yaml"
BUILT = ("build", ".venv")  # folders that are named, but come of building
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _yaml(name: str | Path) -> Any:
    return pytest.importorskip("yaml", reason="needs PyYAML").safe_load((ROOT / name).read_text(encoding="utf-8"))


def _git(*arguments: str) -> str:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git's history")
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _pyproject() -> dict[str, Any]:
    return tomllib.loads(_read("pyproject.toml"))


def _code(text: str) -> list[str]:
    """What Markdown has as code: the lines of blocks, and what is between backticks in lines that are not."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`]+)`", rest)


def _paths(text: str) -> set[str]:
    """Words in code, and targets of links, that are paths in the checkout."""
    words = {word.rstrip("/") for code in _code(text) for word in re.split(r"[\s=\"',;]+", code)}
    paths = {word for word in words if re.fullmatch(r"(\.?\w[\w.-]*/)+[\w.-]+|[\w-]+\.(md|toml|yaml|cff)", word)}
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    return {path for path in paths if path.split("/")[0] not in BUILT} | set(links)


def test_paths_of_contributing_exist():
    paths = _paths(_read(CONTRIBUTING))
    assert {"csrc/batch_norm/activation.h", "csrc/simt", ".ci/run", "SECURITY.md"} <= paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_names_in_the_steps_of_contributing_are_in_their_files():
    steps = re.findall(r"^\d+\. (.*(?:\n +\S.*)*)", _read(CONTRIBUTING).split("## How to add")[1], re.MULTILINE)
    assert len(steps) >= 5
    for step in steps:
        code = re.findall(r"`([^`]+)`", step)
        text = "".join(_read(path) for path in _paths(step) if (ROOT / path).is_file())
        names = [each for each in code if re.fullmatch(r"[A-Za-z_]\w+", each)]
        assert not [name for name in names if name not in text], step


def test_make_targets_of_contributing_exist():
    rules = re.findall(r"^([\w -]+):(?!=)", _read("Makefile"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    named = {name for code in _code(_read(CONTRIBUTING)) for name in re.findall(r"\bmake ([a-z][\w-]*)", code)}
    assert {"test", "format"} <= named <= targets


def test_hooks_take_the_versions_of_the_tests():
    def name_of(requirement: str) -> str:
        return re.split(r"[^\w-]", requirement)[0]

    groups = _pyproject()["dependency-groups"]
    wanted = {name_of(each): each for group in groups.values() for each in group if isinstance(each, str)}
    hooks = [hook for repository in _yaml(HOOKS)["repos"] for hook in repository["hooks"]]
    pinned = {each for hook in hooks for each in hook.get("additional_dependencies", [])}
    assert {"ruff", "clang-format"} <= {name_of(each) for each in pinned}
    assert all(re.search(r"==|~=", each) for each in pinned)
    assert not {each for each in pinned if wanted.get(name_of(each), each) != each}


@pytest.mark.parametrize("message", ["x" * SUBJECT, "x" * (SUBJECT + 1)], ids=len)
def test_hook_refuses_long_subjects_alone(message):
    (hook,) = [hook for each in _yaml(HOOKS)["repos"] for hook in each["hooks"] if hook["id"] == "subject"]
    assert hook["args"] == ["--multiline"]  # so that \A is the message's beginning, not that of each line
    assert bool(re.search(hook["entry"], f"{message}\n\n{'y' * 100}\n")) == (len(message) > SUBJECT)


def test_subjects_of_commits_are_short():
    """Of those since CONTRIBUTING.md says so."""
    added = _git("log", "--diff-filter=A", "--format=%H", "--", CONTRIBUTING).split()
    if not added:
        pytest.skip(f"git's history does not reach back to the commit of {CONTRIBUTING}")
    subjects = _git("log", "--no-merges", "--format=%s", f"{added[-1]}..HEAD").splitlines()
    assert not [subject for subject in subjects if len(subject) > SUBJECT]


def test_citation_and_package_agree():
    citation, project = _yaml("CITATION.cff"), _pyproject()["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Source"]
    assert citation["url"] == project["urls"]["Documentation"]
    # What the format requires, beside types.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_are_complete(path):
    form = _yaml(path)
    if path.name == "config.yml":
        assert {link["url"].split("/")[2] for link in form["contact_links"]} == {"tfops.github.io", "github.com"}
        return
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    if "bug" in path.name:
        assert "python -m tfops.info" in path.read_text()
    if "gpu" in path.name:
        assert "pytest -m gpu" in path.read_text()
