"""The README is short, and its links work wherever it is shown: in the repository, and on the package index."""

from __future__ import annotations

import re

import pytest

from tfops_testing.paths import ROOT
from tfops_testing.requirements import has_source_tree

pytestmark = pytest.mark.source_tree

README = (ROOT / "README.md").read_text() if has_source_tree() else ""
LINES = 150
REPOSITORY = r"https://(?:github\.com|raw\.githubusercontent\.com)/tfops/tfops/(?:(?:blob|tree)/)?main/"
SITE = "https://tfops.github.io/tfops/"


def test_readme_is_short():
    assert len(README.splitlines()) <= LINES


@pytest.mark.parametrize("address", sorted(set(re.findall(r"\]\(([^)\s]+)\)", README))))
def test_link_is_absolute_and_leads_somewhere(address):
    if named := re.fullmatch(REPOSITORY + "(.+)", address):
        assert (ROOT / named[1]).exists()
    else:
        assert address.startswith(SITE)
        page = address.removeprefix(SITE).rstrip("/") or "index"
        assert (ROOT / "docs" / f"{page}.md").is_file()


def test_address_is_that_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'Documentation = "{SITE}"' in project
    assert 'Source = "https://github.com/tfops/tfops"' in project
