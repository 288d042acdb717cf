"""The version stands in pyproject.toml; what else tells it, and the project's addresses, agree.

For CITATION.cff, test_house.py looks at both.
"""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
from pathlib import Path

import pytest

from tfops_testing.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

pytestmark = pytest.mark.source_tree

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = "CHANGELOG.md"


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_version_is_semantic():
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])


def test_installed_version_is_that_of_the_source_tree():
    assert importlib.metadata.version("tfops") == PROJECT["version"]


def test_top_of_the_changelog_is_this_version_or_what_comes():
    headings = re.findall(r"^## (.+)$", _read(CHANGELOG), re.MULTILINE)
    top, *released = headings
    if top != "[Unreleased]":
        released = headings
        assert top.startswith(f"[{PROJECT['version']}] - ")
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in released), released
    versions = [_numbers(heading.partition("]")[0][1:]) for heading in released]
    assert versions == sorted(set(versions), reverse=True)
    assert not versions or versions[0] <= _numbers(PROJECT["version"])
    dates = [heading.split(" - ")[1] for heading in released]
    assert dates == sorted(dates, reverse=True)


def test_every_section_of_the_changelog_has_a_link():
    text = _read(CHANGELOG)
    links = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    assert list(links) == re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert all(link.startswith(f"{PROJECT['urls']['Source']}/") for link in links.values())
    assert all(f"v{version}" in link for version, link in links.items() if version != "Unreleased")


def test_addresses_agree():
    urls = PROJECT["urls"]
    source, site = urls["Source"], urls["Documentation"]
    assert urls["Homepage"] == source
    assert urls["Issues"] == f"{source}/issues"
    page = urls["Changelog"].removeprefix(site).rstrip("/")
    mkdocs = _read("mkdocs.yml")
    assert f"- {page}.md\n" in mkdocs
    assert f"\nsite_url: {site}\n" in mkdocs
    assert f"\nrepo_url: {source}\n" in mkdocs
    owner, name = source.split("/")[-2:]
    assert site == f"https://{owner}.github.io/{name}/"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A project whose version 1.2.3 is ready to be tagged."""
    texts = {
        "pyproject.toml": '[project]\nname = "it"\nversion = "1.2.3"\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
        CHANGELOG: """# Changelog

## [1.2.3] - 2026-12-01

### Added

- This, and
  [that](docs/that.md).

## [1.2.2] - 2026-11-01

- Older.

[1.2.3]: https://example.com/v1.2.3
[1.2.2]: https://example.com/v1.2.2
""",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


notes = runpy.run_path(str(ROOT / ".github" / "release_notes.py"))["notes"] if (ROOT / ".github").exists() else None


def test_notes_are_the_section(release):
    assert notes("v1.2.3", release) == "### Added\n\n- This, and\n  [that](docs/that.md)."


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("pyproject.toml", "1.2.3", "1.2.4", r"the tag is 'v1\.2\.3', but the version in pyproject\.toml is '1\.2\.4'"),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", r"version in CITATION\.cff is '1\.2\.2'"),
        (CHANGELOG, "[1.2.3]", "[Unreleased]", r"version in CHANGELOG\.md is 'Unreleased'"),
        (CHANGELOG, " - 2026-12-01", "", r"no date for 1\.2\.3: write '## \[1\.2\.3\] - YYYY-MM-DD'"),
        (CHANGELOG, "##", "#", r"CHANGELOG\.md has no match"),
    ],
)
def test_notes_of_another_version_are_refused(release, file, old, new, message):
    path = release / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        notes("v1.2.3", release)


def test_notes_of_the_only_release_end_before_the_links(release):
    path = release / CHANGELOG
    path.write_text(re.sub(r"## \[1\.2\.2\].*?\n(?=\[)", "", path.read_text(), flags=re.DOTALL))
    assert notes("v1.2.3", release).endswith("docs/that.md).")
