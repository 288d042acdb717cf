"""GitHub's workflows, which cannot run here, are linted, and all that they run are targets of make, which can.

So are the commands with which cibuildwheel builds the wheels that are published.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tfops_testing.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

yaml = pytest.importorskip("yaml", reason="needs PyYAML")
pytestmark = pytest.mark.source_tree

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CIBUILDWHEEL = PYPROJECT["tool"]["cibuildwheel"]
PLACEHOLDERS = {"{wheel}": "tfops.whl", "{dest_dir}": "build/dist", "{project}": "."}  # of cibuildwheel


def _run(name: str, *arguments: object) -> str:
    """The output of a program that comes with the dependency group `test`."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not program:
        pytest.skip(f"needs {name}")
    run = subprocess.run([program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


def _jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """The jobs of all workflows, by a name that tells which it is."""
    for path in WORKFLOWS:
        for name, job in _read(path)["jobs"].items():
            yield f"{path.stem}-{name}", job


def _matrix(job: dict[str, Any]) -> list[dict[str, str]]:
    """What a job's variables are in each of its runs."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    included = matrix.pop("include", [])
    products = itertools.product(*matrix.values())
    return [dict(zip(matrix, values, strict=True)) for values in products] + included


def _commands() -> Iterator[tuple[str, str]]:
    """Every command, with where it stands."""
    for name, job in _jobs():
        for step, variables in itertools.product(job.get("steps", []), _matrix(job)):
            lines = str(step.get("run", ""))
            for key, value in variables.items():
                lines = lines.replace(f"${{{{ matrix.{key} }}}}", value)
            yield from ((name, line) for line in lines.splitlines())
    for path in ACTIONS:
        steps = _read(path)["runs"]["steps"]
        yield from ((path.parent.name, line) for step in steps for line in step.get("run", "").splitlines())
    for key, command in CIBUILDWHEEL.items():
        if key.startswith("before-") or key.endswith("-command"):
            for placeholder, value in PLACEHOLDERS.items():
                command = command.replace(placeholder, value)
            yield f"cibuildwheel-{key}", command


COMMANDS = list(dict.fromkeys(_commands()))


def test_actionlint_finds_nothing():
    _run("actionlint", *WORKFLOWS)


def test_zizmor_finds_nothing():
    """Secrets that leak, permissions that are not needed, actions that are not pinned."""
    _run("zizmor", "--offline", "--no-progress", "--min-severity=medium", ROOT / ".github")


def test_there_are_commands():
    targets = {command.split()[1] for _, command in COMMANDS}
    assert {"lint", "test", "compat", "docs", "sanitize", "fuzz", "test-all", "reproducible", "sdist"} <= targets
    assert {"repair-wheel", "test-active"} <= targets


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=lambda value: value.replace("/", "-"))
def test_command_is_a_target_of_make(where, command):
    assert "${{" not in command, "what GitHub puts in here could be anything"
    program, target, *variables = shlex.split(command)
    assert program == "make"
    environment = {**os.environ, "GITHUB_REF_NAME": "v1.2.3"}
    words = [os.path.expandvars(word) for word in (target, *variables)]
    make = ["make", "--dry-run", "--no-print-directory", *words]
    run = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    # make takes a variable of any name: it must be one that the Makefile reads.
    makefile = (ROOT / "Makefile").read_text()
    for name in (variable.partition("=")[0] for variable in variables):
        assert re.search(rf"\$\({name}\)|needed,{name},", makefile), f"the Makefile does not read {name}"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("release-notes", "make release-notes needs TAG, such as TAG=v1.2.3"),
        ("repair-wheel", "make repair-wheel needs WHEEL, such as WHEEL=build/wheel/tfops-*.whl"),
    ],
)
def test_target_names_the_variable_that_it_needs(target, message):
    run = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert message in run.stderr


def _pythons() -> set[str]:
    """The versions of Python that the package is for."""
    classifiers = PYPROJECT["project"]["classifiers"]
    return set(re.findall(r"^Programming Language :: Python :: (3\.\d+)$", "\n".join(classifiers), re.MULTILINE))


def test_every_python_is_tested():
    used = {name: [run["python"] for run in _matrix(job) if "python" in run] for name, job in _jobs()}
    assert set(used["test-test"]) == _pythons()
    named = {version for versions in used.values() for version in versions}
    text = "".join(path.read_text() for path in (*WORKFLOWS, *ACTIONS))
    named |= set(re.findall(r'(?:python-version|default): "(3\.\d+)"', text))
    assert named == _pythons()


def test_wheels_are_built_for_every_python_and_processor():
    printed = _run("cibuildwheel", "--print-build-identifiers", "--platform=linux", "--archs=x86_64,aarch64")
    tags = [f"cp{version.replace('.', '')}-manylinux" for version in _pythons()]
    assert sorted(printed.split()) == sorted(f"{tag}_{arch}" for tag in tags for arch in ("x86_64", "aarch64"))
    runners = {run["runner"] for run in _matrix(dict(_jobs())["wheels-wheels"])}
    assert {"arm" in runner for runner in runners} == {True, False}


def test_what_cibuildwheel_installs_and_copies_exists():
    project = PYPROJECT["project"]
    assert set(CIBUILDWHEEL["test-extras"]) <= project["optional-dependencies"].keys()
    assert set(CIBUILDWHEEL["test-groups"]) <= PYPROJECT["dependency-groups"].keys()
    assert all((ROOT / name).exists() for name in CIBUILDWHEEL["test-sources"])


def test_releases_of_tensorflow_are_those_of_the_package(monkeypatch):
    """In workflows and in the settings of cibuildwheel, should they name any."""
    monkeypatch.syspath_prepend(ROOT / "cmake")
    from tensorflow_packages import RELEASES

    texts = [path.read_text() for path in (*WORKFLOWS, *ACTIONS)] + [str(CIBUILDWHEEL)]
    named = set(re.findall(r"(?<![\d.])2\.\d+(?![\d.])", "\n".join(texts)))
    assert named <= set(RELEASES)


def test_wheels_hold_ops_for_every_release_of_tensorflow():
    targets = {where: command.split()[1] for where, command in COMMANDS}
    assert targets["cibuildwheel-before-all"] == "tensorflow"
    rule = re.search(r"^tensorflow: (\S+)/\.fetched$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule
    assert CIBUILDWHEEL["config-settings"]["cmake.define.TFOPS_TENSORFLOW_PACKAGES"] == rule[1]


@pytest.mark.parametrize(("where", "job"), list(_jobs()), ids=lambda value: value if isinstance(value, str) else "")
def test_job_is_limited(where, job):
    """In time, and to one version of a system; what calls another workflow is limited there."""
    if "uses" not in job:
        assert job["timeout-minutes"] <= 180
        assert "latest" not in job["runs-on"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_may_only_read(path):
    """But for single jobs, none of which runs anything of this repository."""
    workflow = _read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"].startswith(path.stem)
    for job in workflow["jobs"].values():
        if "permissions" in job:
            assert not [step for step in job["steps"] if "run" in step or step["uses"].startswith("./")]
